"""What users call on a pipeline, a bare UNet or a vision model of transformers: load, add, save, unload a tuner.

After that diffusers' own `set_adapters`, `disable_lora` / `enable_lora`, `delete_adapters`,
`get_active_adapters` and `get_list_adapters` treat the tuner as they treat a LoRA; so do the `set_adapter`,
`disable_adapters` and `enable_adapters` of transformers. A vision model's classification head is trained with the
tuner, and belongs to its file.
"""

import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from peft.tuners.tuners_utils import BaseTunerLayer

from ..bases.properties import describe_base, get_unet
from ..tuners.config import LORAS, NOAH, PEFT_METHODS, TunerConfig
from . import active_adapters, diffusers_guards, foreign_lora, inject, lora, noah, tuner_file


def load_tuner(pipe, source, adapter_name: str | None = None, *, weight_name: str = tuner_file.FILE_NAME, **hub) -> str:
    """Loads a tuner file into a pipeline, under `adapter_name`, and makes it the active adapter.

    A LoRA file of another tool is loaded by diffusers' `load_lora_weights`. A warning says how to draw with a tuner
    or LoRA whose file names another clip skip than the pipeline's last call had.

    Args:
        pipe: a diffusers pipeline with a `unet`, or the UNet itself, or a vision model of transformers.
        source: a .safetensors file, a folder with one, or a hub id.
        adapter_name: the adapter's name; by default tuner_0, tuner_1 and so on.
        weight_name: the file's name in a folder or hub repository.
        hub: for `huggingface_hub.hf_hub_download`: `revision`, `token`, `cache_dir`, ... `low_cpu_mem_usage`
            is accepted for diffusers' sake; loading never allocates the weights twice.

    Returns:
        The adapter's name.

    Raises:
        TunerFileError: if the file cannot be used or does not fit this UNet; the pipeline is as it was.
        ValueError: if the name is taken or cannot be one, or the UNet's projections are fused.
    """
    hub.pop("low_cpu_mem_usage", None)
    name = attach_file(pipe, source, adapter_name, weight_name=weight_name, **hub)
    trained, of_pipe = trained_clip_skip(pipe, name), (getattr(pipe, "_clip_skip", None) or 0) + 1
    if trained and trained != of_pipe:
        warnings.warn(
            f"{name} was trained with clip skip {trained}, and a call of this pipeline draws with {of_pipe}; draw with "
            f"pipe(**sdtune.encode_prompt(pipe, prompt, negative_prompt)), or with sdtune.compare, which do so by "
            "themselves", stacklevel=2,
        )  # fmt: skip
    return name


def trained_clip_skip(pipe, adapter_name: str) -> int | None:
    """The clip skip that an attached tuner or LoRA was trained with, as its file says; None if nothing says so."""
    adapter = _adapters(pipe).get(adapter_name)
    file = getattr(adapter, "file", None)
    return file.clip_skip if file else getattr(adapter, "clip_skip", None)


def _adapters(pipe) -> dict:
    """The adapters of the UNet, and those of the text encoder alone: name -> PEFT's configuration."""
    models = (getattr(pipe, "text_encoder", None), get_unet(pipe))
    return {n: c for model in models for n, c in (getattr(model, "peft_config", None) or {}).items()}


def attach_file(
    pipe, source, adapter_name: str | None = None, *, weight_name: str = tuner_file.FILE_NAME, **hub
) -> str:
    """`load_tuner` for callers that draw with the tuner's own clip skip: without the warning."""
    _replace_wrapper(pipe)
    unet = get_unet(pipe)
    taken, name = _adapters(pipe), adapter_name
    if name is None:
        name = next(n for n in map("tuner_{}".format, range(len(taken) + 1)) if n not in taken)
    inject.check_new_name(taken, name)
    path = tuner_file.find(source, weight_name, **hub)
    if tuner_file.is_plain_lora(path):
        _load_plain_lora(pipe, path, name)
        return name
    file = tuner_file.load(path)
    base = describe_base(pipe)
    tuner_file.check_family(file, base, path)
    predicts = [b.get("prediction_type", "epsilon") for b in (file.base, base)]
    if predicts[0] != predicts[1] and hasattr(pipe, "scheduler"):
        warnings.warn(
            f"{path} was trained on a base that predicts {predicts[0]}, and this pipeline's scheduler expects "
            f"{predicts[1]}: its pictures will be wrong; load it into a base like {file.base.get('name', 'its own')}",
            stacklevel=3,
        )
    expected = expected_shapes(unet, file.config, inject.count_classes(file.tensors))
    tuner_file.check_fits(file, expected, path)
    _attach(pipe, file.config, name, file.tensors)
    unet.peft_config[name].file = replace(file, tensors={})
    return name


def _load_plain_lora(pipe, path: Path, name: str) -> None:
    if not hasattr(pipe, "unet"):
        raise tuner_file.TunerFileError(
            f"{path} is a LoRA of another tool; load it into a pipeline, not into a bare {type(pipe).__name__}"
        )
    models = [m for m in (pipe.unet, getattr(pipe, "text_encoder", None)) if m is not None]
    with active_adapters.preserve_adapters(*models):
        try:
            foreign_lora.load(pipe, path, name)
        except tuner_file.TunerFileError:
            raise
        except Exception as error:  # diffusers raises many kinds
            if any(name in (getattr(model, "peft_config", None) or {}) for model in models):
                pipe.delete_adapters(name)
            reason = " ".join(str(error).split())[:300]
            raise tuner_file.TunerFileError(f"{path} is a LoRA that does not fit this base: {reason}") from error
    pipe.enable_lora()
    pipe.set_adapters(name)
    _adapters(pipe)[name].clip_skip = tuner_file.trained_clip_skip(path)
    for model in models:
        diffusers_guards.guard(model)


def add_tuner(pipe, config: TunerConfig | None = None, adapter_name: str = "tuner_0") -> str:
    """Adds a fresh tuner to a pipeline's UNet; it starts at zero, so it changes no picture yet.

    Args:
        pipe: a diffusers pipeline with a `unet`, or the UNet itself, or a vision model of transformers.
        config: the tuner and its operations; by default Res-Attn 4x4 on attn1, attn2 (not in a vision model) and ff.

    Raises:
        ValueError: if the name is taken or cannot be one, or the UNet lacks the operations.
    """
    _replace_wrapper(pipe)
    inject.check_new_name(_adapters(pipe), adapter_name)
    _attach(pipe, config or TunerConfig(), adapter_name)
    return adapter_name


def _adapter_module(config: TunerConfig):
    """The module for adapters of this kind, `inject`, `lora` or `noah`, which have the same functions."""
    if config.kind == NOAH:
        return noah
    return lora if config.kind in (*LORAS, *PEFT_METHODS) else inject


def expected_shapes(unet, config: TunerConfig, classes: int | None = None) -> dict[str, tuple[int, ...]]:
    """Every tensor that a tuner or LoRA of this configuration has on this model: its key in a file -> its shape.

    Args:
        classes: number of classes of a vision model's head; default: as many as the model's own.
    """
    return _adapter_module(config).expected_shapes(unet, config, classes)


def tuner_config(pipe, adapter_name: str) -> TunerConfig:
    """The configuration of an attached tuner (or of a LoRA that sdtune added or trained).

    Raises:
        ValueError: naming those that are there, if there is none of that name.
    """
    adapters = getattr(get_unet(pipe), "peft_config", None) or {}
    ours = [n for n, c in adapters.items() if hasattr(c, "tuner")]
    if adapter_name not in ours:
        there = ", ".join(map(repr, ours)) or "none"
        raise ValueError(f"no tuner named {adapter_name!r} is attached; attached tuners: {there}")
    return adapters[adapter_name].tuner


def tuner_parameters(pipe, adapter_name: str) -> dict[str, torch.nn.Parameter]:
    """The parameters of an attached tuner, keyed as in its file (without the leading "unet.")."""
    return _adapter_module(tuner_config(pipe, adapter_name)).adapter_parameters(get_unet(pipe), adapter_name)


def _attach(pipe, config: TunerConfig, name: str, tensors: dict[str, torch.Tensor] | None = None) -> None:
    unet = get_unet(pipe)
    diffusers_guards.check_projections(unet, tensors or expected_shapes(unet, config))
    with _offloading_paused(pipe):
        _adapter_module(config).add_adapter(unet, config, name, tensors)
        if isinstance(unet, ModelMixin):  # a vision model's own `save_pretrained` stays as it is
            diffusers_guards.guard(unet)
        if hasattr(pipe, "unet"):
            pipe.set_adapters(name)  # deactivates a LoRA in the text encoder, too


def save_tuner(
    pipe,
    path: str | Path,
    adapter_name: str = "tuner_0",
    *,
    dtype: torch.dtype = torch.float16,
    trigger_words: str | None = None,
    training: dict | None = None,
    labels: list[str] | None = None,
) -> Path:
    """Writes the tuner's weights and its configuration into a file, and nothing of the base.

    Args:
        path: a file ending in .safetensors, or a folder.
        dtype: of the weights in the file.
        trigger_words, training, labels: go into the metadata; by default those of the file it was loaded from. `labels`
            are the names of the classes of a vision model's head.

    Returns:
        The path of the file.

    Raises:
        ValueError: if no such tuner is attached, or a weight is not finite.
    """
    unet = get_unet(pipe)
    config = tuner_config(unet, adapter_name)
    old = getattr(unet.peft_config[adapter_name], "file", None) or tuner_file.TunerFile(config, {})
    with _offloading_paused(pipe):  # offloaded weights are not in the modules
        tensors = {k: p.detach().cpu() for k, p in tuner_parameters(unet, adapter_name).items()}
    given = {"trigger_words": trigger_words, "training": training, "labels": labels}
    given = {name: value for name, value in given.items() if value is not None}
    base = old.base or describe_base(pipe)
    file = replace(old, config=config, tensors=tensors, base=base, **given)
    return tuner_file.save(path, file, dtype)


def unload_tuner(pipe, adapter_name: str) -> None:
    """Removes a tuner, or a LoRA; after the last tuner the UNet is as it was before any was added.

    Raises:
        ValueError: naming those that are there, if there is none of that name.
    """
    there, unet = _adapters(pipe), get_unet(pipe)
    if adapter_name not in there:
        names = ", ".join(map(repr, there)) or "none"
        raise ValueError(f"no tuner named {adapter_name!r} is attached; attached adapters: {names}")
    owner = pipe if hasattr(pipe, "unet") else None
    with _offloading_paused(pipe):
        if hasattr(there[adapter_name], "tuner"):
            module = _adapter_module(tuner_config(pipe, adapter_name))
            module.remove_adapter(unet, adapter_name, owner)
        else:  # a LoRA of another tool
            (owner or unet).delete_adapters(adapter_name)
        for model in filter(None, (unet, getattr(pipe, "text_encoder", None))):
            if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
                diffusers_guards.remove_guard(model)


def _replace_wrapper(pipe) -> None:
    """Puts the UNet itself, compiled in place, where `pipe.unet = torch.compile(pipe.unet)` has put a wrapper.

    A pipeline of diffusers finds no adapters in the wrapper: `set_adapters` fails, and `disable_lora` does nothing.
    """
    wrapper = getattr(pipe, "unet", None)
    if unet := getattr(wrapper, "_orig_mod", None):
        unet._compiled_call_impl = wrapper.dynamo_ctx(unet._call_impl)  # as `unet.compile` does, with the same options
        pipe.unet = unet


@contextmanager
def _offloading_paused(pipe):
    """A context that removes a pipeline's CPU offloading and restores it, as diffusers does around loading a LoRA.

    Uses three of diffusers' private helpers: there are no public ones, and its own loaders use these.
    """
    if not hasattr(pipe, "unet"):  # a bare UNet
        try:
            yield
        finally:
            _maybe_remove_and_reapply_group_offloading(get_unet(pipe))
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
