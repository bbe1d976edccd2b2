"""Replacements of five methods of diffusers' UNet, which do not know of tuners, while tuners are attached."""

import warnings
from functools import partial

from diffusers import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer

from ..tuners.config import FULL
from .hook import cannot_fuse_message, tuner_layers, tuner_names
from .operations import CHILD_NAME


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


def guard_saving(unet) -> None:
    """Makes `save_pretrained`, also a pipeline's, write the base alone and say that it leaves the adapters out."""
    if isinstance(unet, ModelMixin):  # transformers' models have another method
        unet.save_pretrained = partial(save_pretrained, unet)


def save_pretrained(
    unet, save_directory, is_main_process=True, *, safe_serialization=True, variant=None, max_shard_size="10GB", **more
):
    """diffusers' `save_pretrained`, which would write adapters in a form that `from_pretrained` does not read, and the
    layers below a LoRA under names that it does not know."""
    if names := list(getattr(unet, "peft_config", None) or {}):
        warnings.warn(
            f"save_pretrained writes the base without its adapters {', '.join(map(repr, names))}; save each of them "
            "with sdtune.save_tuner(pipe, path, name) (a LoRA of another tool is in its own file)",
            stacklevel=3,
        )
        layers = [path for path, module in unet.named_modules() if isinstance(module, BaseTunerLayer)]
        state = {
            key.replace(".base_layer", ""): tensor
            for key, tensor in unet.state_dict().items()
            if not any(key.startswith(f"{p}.") and not key.startswith(f"{p}.base_layer.") for p in layers)
        }
        unet.state_dict = lambda *_, **__: state
    try:
        type(unet).save_pretrained(
            unet, save_directory, is_main_process, safe_serialization=safe_serialization, variant=variant,
            max_shard_size=max_shard_size, **more,
        )  # fmt: skip
    finally:
        unet.__dict__.pop("state_dict", None)
