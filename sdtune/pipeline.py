"""What users call on a diffusers pipeline (or a bare UNet): load, add, save, unload a tuner.

After that diffusers' own `set_adapters`, `disable_lora` / `enable_lora`, `delete_adapters`,
`get_active_adapters` and `get_list_adapters` treat the tuner as they treat a LoRA.
"""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

from . import attach, baselines, store
from .tuners import LORAS, TunerConfig

# What makes two bases alike for a tuner, in the words of the UNet's config.
_SHAPE = ("block_out_channels", "layers_per_block", "cross_attention_dim", "attention_head_dim", "in_channels")


def load_tuner(pipe, source, adapter_name: str | None = None, *, weight_name: str = store.FILE_NAME, **hub) -> str:
    """Loads a tuner file into a pipeline, under `adapter_name`, and makes it the active adapter.

    A LoRA file of another tool is handed to diffusers' `load_lora_weights`.

    Args:
        pipe: a diffusers pipeline with a `unet`, or the UNet itself.
        source: a .safetensors file, a folder with one, or a hub id.
        adapter_name: its name; by default tuner_0, tuner_1 and so on.
        weight_name: the file's name in a folder or hub repository.
        hub: for `huggingface_hub.hf_hub_download`: `revision`, `token`, `cache_dir`, ... `low_cpu_mem_usage`
            is accepted for diffusers' sake; loading never allocates the weights twice.

    Returns:
        The adapter's name.

    Raises:
        TunerFileError: if the file cannot be used or does not fit this UNet; the pipeline is as it was.
        ValueError: if the name is taken or cannot be one.
    """
    hub.pop("low_cpu_mem_usage", None)
    unet = unet_of(pipe)
    taken, name = getattr(unet, "peft_config", {}), adapter_name
    if name is None:
        name = next(n for n in map("tuner_{}".format, range(len(taken) + 1)) if n not in taken)
    attach.check_new_name(unet, name)
    path = store.find(source, weight_name, **hub)
    if store.is_plain_lora(path):
        _load_plain_lora(pipe, path, name)
        return name
    file = store.load(path)
    store.check_fits(file, expected_shapes(unet, file.config), path)
    _attach(pipe, file.config, name, file.tensors)
    unet.peft_config[name].file = replace(file, tensors={})
    return name


def _load_plain_lora(pipe, path: Path, name: str) -> None:
    if pipe is unet_of(pipe):
        raise store.TunerFileError(f"{path} is a LoRA of another tool; load it into a pipeline, not into a bare UNet")
    models = [m for m in (pipe.unet, getattr(pipe, "text_encoder", None)) if m is not None]
    with attach.left_as_it_was(*models):
        try:
            pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
        except Exception as error:  # diffusers raises many kinds
            if any(name in names for names in pipe.get_list_adapters().values()):
                pipe.delete_adapters(name)
            reason = " ".join(str(error).split())[:300]
            raise store.TunerFileError(f"{path} is a LoRA that does not fit this base: {reason}") from error
    pipe.enable_lora()
    pipe.set_adapters(name)


def add_tuner(pipe, config: TunerConfig | None = None, adapter_name: str = "tuner_0") -> str:
    """Hangs a fresh tuner on a pipeline's UNet; it starts at zero, so pictures stay as they were.

    Args:
        pipe: a diffusers pipeline with a `unet`, or the UNet itself.
        config: what to hang where; by default Res-Attn 4x4 on attn1, attn2 and ff.

    Raises:
        ValueError: if the name is taken or cannot be one, or the UNet lacks the operations.
    """
    attach.check_new_name(unet_of(pipe), adapter_name)
    _attach(pipe, config or TunerConfig(), adapter_name)
    return adapter_name


def _home(config: TunerConfig):
    """The module that knows tuners of this kind: `attach` or `baselines`, which have the same verbs."""
    return baselines if config.kind in LORAS else attach


def expected_shapes(unet, config: TunerConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a tuner or LoRA of this configuration has on this UNet: its key in a file -> its shape."""
    return _home(config).expected_shapes(unet, config)


def config_of(pipe, adapter_name: str) -> TunerConfig:
    """The configuration of an attached tuner (or of a LoRA that sdtune added or trained).

    Raises:
        ValueError: naming those that are there, if there is none of that name.
    """
    adapters = getattr(unet_of(pipe), "peft_config", None) or {}
    ours = [n for n, c in adapters.items() if hasattr(c, "tuner")]
    if adapter_name not in ours:
        there = ", ".join(map(repr, ours)) or "none"
        raise ValueError(f"no tuner named {adapter_name!r} is attached; attached tuners: {there}")
    return adapters[adapter_name].tuner


def parameters_of(pipe, adapter_name: str) -> dict[str, torch.nn.Parameter]:
    """The parameters of an attached tuner, keyed as in its file (without the leading "unet.")."""
    return _home(config_of(pipe, adapter_name)).parameters_of(unet_of(pipe), adapter_name)


def _attach(pipe, config: TunerConfig, name: str, tensors: dict[str, torch.Tensor] | None = None) -> None:
    unet = unet_of(pipe)
    with _offloading_paused(pipe):
        _home(config).attach(unet, config, name, tensors)
        if pipe is not unet:
            pipe.set_adapters(name)  # a LoRA may be active in the text encoder, too


def save_tuner(
    pipe,
    path: str | Path,
    adapter_name: str = "tuner_0",
    *,
    dtype: torch.dtype = torch.float16,
    trigger_words: str | None = None,
    training: dict | None = None,
) -> Path:
    """Writes the tuner's weights and how to load them, and nothing of the base.

    Args:
        path: a file ending in .safetensors, or a folder.
        dtype: of the weights in the file.
        trigger_words, training: go into the metadata; by default those of the file it was loaded from.

    Returns:
        The path of the file.

    Raises:
        ValueError: if no such tuner is attached, or a weight is not finite.
    """
    unet = unet_of(pipe)
    config = config_of(unet, adapter_name)
    old = getattr(unet.peft_config[adapter_name], "file", None)
    with _offloading_paused(pipe):  # offloaded weights are elsewhere
        tensors = {k: p.detach().cpu() for k, p in parameters_of(unet, adapter_name).items()}
    file = store.TunerFile(
        config,
        tensors,
        describe_base(pipe),
        trigger_words if trigger_words is not None else getattr(old, "trigger_words", ""),
        training if training is not None else getattr(old, "training", {}),
    )
    return store.save(path, file, dtype)


def unload_tuner(pipe, adapter_name: str) -> None:
    """Removes a tuner; after the last one the UNet is as if there had never been any.

    Raises:
        ValueError: if no tuner of that name is attached.
    """
    config = config_of(pipe, adapter_name)
    with _offloading_paused(pipe):
        _home(config).detach(unet_of(pipe), adapter_name, pipe)


def unet_of(pipe) -> torch.nn.Module:
    """The UNet of a pipeline, or what was given if it is one.

    Raises:
        ValueError: if there is no UNet in it.
    """
    unet = getattr(pipe, "unet", pipe)
    if not hasattr(unet, "set_adapters") or not isinstance(unet, torch.nn.Module):
        raise ValueError(f"expected a diffusers pipeline with a UNet, or a UNet; found {type(pipe).__name__}")
    return unet


def is_small(pipe) -> bool:
    """Whether the base is of the size of tiny-sd, not of Stable Diffusion: some defaults depend on it."""
    return unet_of(pipe).num_parameters() < 1e8


def usual_guidance(pipe) -> float:
    """The guidance that suits the base: SD v1.5's usual 7.5, or tiny-sd's 3 (see its model card)."""
    return 3.0 if is_small(pipe) else 7.5


def describe_base(pipe) -> dict:
    """Name, shape and prediction type of a pipeline's base, for the metadata of a tuner file."""
    unet = unet_of(pipe)
    name = str(getattr(pipe, "name_or_path", "") or getattr(unet, "name_or_path", "") or "unknown")
    scheduler = getattr(pipe, "scheduler", None)
    return {
        "name": Path(name).name if Path(name).exists() else name,
        "shape": {k: unet.config[k] for k in _SHAPE},
        "prediction_type": scheduler.config.get("prediction_type", "epsilon") if scheduler else "epsilon",
    }


@contextmanager
def _offloading_paused(pipe):
    """Takes a pipeline's CPU offloading off and puts it on again, as diffusers does around loading a LoRA.

    Uses three of diffusers' private helpers: there are no public ones, and its own loaders use these.
    """
    if pipe is unet_of(pipe):  # a bare UNet
        try:
            yield
        finally:
            _maybe_remove_and_reapply_group_offloading(pipe)
        return
    model, sequential, group = pipe._optionally_disable_offloading(pipe)
    try:
        yield
    finally:
        if model:
            pipe.enable_model_cpu_offload(device=pipe._offload_device)
        elif sequential:
            pipe.enable_sequential_cpu_offload(device=pipe._offload_device)
        elif group:
            _maybe_remove_and_reapply_group_offloading(pipe.unet)
