"""Replacements of methods of diffusers' UNet, which do not know of tuners, and of the text encoder's, for as long as
adapters are attached."""

import re
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from functools import partial

from diffusers import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer

from ..tuners.config import FULL
from .hook import ParallelTuners, cannot_fuse_message, tuner_layers, tuner_names
from .operations import CHILD_NAME

_PROJECTION = re.compile(r"\.to_[qkv](\.|$)")


def fuse_lora(unet, lora_scale=1.0, safe_fusing=False, adapter_names=None):
    """diffusers' `fuse_lora`, which refuses an active tuner before any LoRA is merged."""
    names = {n for _, layer in tuner_layers(unet) if not layer.disable_adapters
             for n in (adapter_names or layer.active_adapters) if n in layer.tuners}  # fmt: skip
    if names:
        raise ValueError(cannot_fuse_message(sorted(names)))
    try:
        type(unet).fuse_lora(unet, lora_scale, safe_fusing=safe_fusing, adapter_names=adapter_names)
    finally:
        for _, layer in tuner_layers(unet):  # lora_scale is meant for the fused LoRAs only
            layer.unscale_layer()


def load_lora_adapter(unet, *args, **kwargs):
    """diffusers' `load_lora_adapter`; tuners become inactive, since the adapter loaded last is the active one."""
    before, name = set(getattr(unet, "peft_config", {})), kwargs.get("adapter_name")
    if name in tuner_names(unet):
        raise ValueError(f"adapter name {name!r} is already in use, by a tuner; a LoRA needs another name")
    result = type(unet).load_lora_adapter(unet, *args, **kwargs)
    added = [n for n in unet.peft_config if n not in before] if hasattr(unet, "peft_config") else []
    for _, layer in tuner_layers(unet) if added else []:
        layer.unet_adapters = unet.peft_config
        layer.set_adapter(added)
    return result


def unload_lora(unet):
    """diffusers' `unload_lora`, which would not find a LoRA on a layer inside an operation that has tuners."""
    for _, layer in tuner_layers(unet):
        setattr(layer.operation.module, CHILD_NAME, None)
    type(unet).unload_lora(unet)


def set_adapters(unet, adapter_names, weights=None):
    """diffusers' `set_adapters`, whose weights per block cannot be used with full fine-tuning: some layers are in no
    block."""
    if any(isinstance(w, dict) for w in (weights if isinstance(weights, (list, tuple)) else [weights])):
        full = [n for n in tuner_names(unet) if unet.peft_config[n].tuner.kind == FULL]
        if full:
            raise ValueError(f"no weights per block while {full[0]!r}, a full fine-tuning, is attached; give a number")
    type(unet).set_adapters(unet, adapter_names, weights)


def guard(model) -> None:
    """Makes the `save_pretrained` of a UNet or a pipeline's text encoder, also if the pipeline calls it, write the base
    alone and say that it leaves the adapters out, and the UNet refuse to fuse projections that have adapters."""
    if isinstance(model, ModelMixin):
        model.save_pretrained = partial(save_unet, model)
        model.fuse_qkv_projections = partial(fuse_qkv_projections, model)
    else:
        model.save_pretrained = partial(save_text_encoder, model)


def remove_guard(unet) -> None:
    for name in ("save_pretrained", "fuse_qkv_projections"):
        unet.__dict__.pop(name, None)


def fuse_qkv_projections(unet) -> None:
    """diffusers' `fuse_qkv_projections`, after which the layers of queries, keys and values, and the adapters on them,
    are not called any more."""
    names = {
        name
        for path, layer in unet.named_modules()
        if isinstance(layer, BaseTunerLayer) and _PROJECTION.search(path)
        for name in (layer.tuners if isinstance(layer, ParallelTuners) else layer._get_available_adapters())
    }
    if names:
        raise ValueError(
            f"the projections cannot be fused while {', '.join(map(repr, sorted(names)))} is on them: it would draw "
            "without its part there; unload it first, or draw with the projections as they are"
        )
    type(unet).fuse_qkv_projections(unet)


def check_projections(unet, keys: Iterable[str]) -> None:
    """Raises ValueError if an adapter with these keys is on projections that `fuse_qkv_projections` has fused."""
    if not isinstance(unet, ModelMixin) or not any(map(_PROJECTION.search, keys)):
        return
    if any(type(p).__name__.startswith("Fused") for p in unet.attn_processors.values()):
        raise ValueError(
            "this UNet's projections of queries, keys and values are fused, so an adapter on them would draw nothing; "
            "call pipe.unfuse_qkv_projections() first"
        )


def save_unet(
    unet, save_directory, is_main_process=True, *, safe_serialization=True, variant=None, max_shard_size="10GB", **more
):
    """diffusers' `save_pretrained`, which would write adapters in a form that `from_pretrained` does not read, and the
    layers below a LoRA under names that it does not know."""
    with _without_adapters(unet):
        type(unet).save_pretrained(
            unet, save_directory, is_main_process, safe_serialization=safe_serialization, variant=variant,
            max_shard_size=max_shard_size, **more,
        )  # fmt: skip


def save_text_encoder(text_encoder, save_directory, *args, variant=None, max_shard_size="50GB", **more):
    """transformers' `save_pretrained`, which would write the adapter alone."""
    with _without_adapters(text_encoder):
        type(text_encoder).save_pretrained(
            text_encoder, save_directory, *args, variant=variant, max_shard_size=max_shard_size, **more
        )


@contextmanager
def _without_adapters(model):
    """A context in which a model's weights are those of the base, under its names."""
    if names := list(getattr(model, "peft_config", None) or {}):
        warnings.warn(
            f"save_pretrained writes the base without its adapters {', '.join(map(repr, names))}; save each of them "
            "with sdtune.save_tuner(pipe, path, name) (a LoRA of another tool is in its own file)",
            stacklevel=5,
        )
    layers = [path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    state = {
        key.replace(".base_layer", ""): tensor
        for key, tensor in model.state_dict().items()
        if not any(key.startswith(f"{p}.") and not key.startswith(f"{p}.base_layer.") for p in layers)
    }
    loaded = getattr(model, "_hf_peft_config_loaded", False)
    model.state_dict, model._hf_peft_config_loaded = lambda *_, **__: dict(state), False
    try:
        yield
    finally:
        model.__dict__.pop("state_dict")
        model._hf_peft_config_loaded = loaded
