"""What the rest of sdtune asks of a base: its UNet, its size, its usual guidance, its description."""

from pathlib import Path

import torch

# What makes two bases alike for a tuner, in the words of the UNet's config.
_SHAPE = ("block_out_channels", "layers_per_block", "cross_attention_dim", "attention_head_dim", "in_channels")


def get_unet(pipe) -> torch.nn.Module:
    """The UNet of a pipeline, or what was given if it is one.

    Raises:
        ValueError: if there is no UNet in it.
    """
    unet = getattr(pipe, "unet", pipe)
    if not hasattr(unet, "set_adapters") or not isinstance(unet, torch.nn.Module):
        raise ValueError(f"expected a diffusers pipeline with a UNet, or a UNet; found {type(pipe).__name__}")
    unet = unet
    return getattr(unet, "_orig_mod", unet)  # of torch.compile(pipe.unet)


def is_small(pipe) -> bool:
    """Whether the base is of the size of tiny-sd, not of Stable Diffusion: some defaults depend on it."""
    return get_unet(pipe).num_parameters() < 1e8


def default_guidance(pipe) -> float:
    """The guidance that suits the base: SD v1.5's usual 7.5, or tiny-sd's 3 (see its model card)."""
    return 3.0 if is_small(pipe) else 7.5


def describe_base(pipe) -> dict:
    """Name, shape and prediction type of a pipeline's base, for the metadata of a tuner file."""
    unet = get_unet(pipe)
    name = str(getattr(pipe, "name_or_path", "") or getattr(unet, "name_or_path", "") or "unknown")
    scheduler = getattr(pipe, "scheduler", None)
    return {
        "name": Path(name).name if Path(name).exists() else name,
        "shape": {k: unet.config[k] for k in _SHAPE},
        "prediction_type": scheduler.config.get("prediction_type", "epsilon") if scheduler else "epsilon",
    }
