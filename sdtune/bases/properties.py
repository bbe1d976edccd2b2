"""What the rest of sdtune asks of a base: its UNet or vision model, its size, its usual guidance, its description."""

from pathlib import Path

import torch

# What makes two bases alike for a tuner, in the words of the UNet's config.
_SHAPE = ("block_out_channels", "layers_per_block", "cross_attention_dim", "attention_head_dim", "in_channels")
_VISION_SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")


def get_unet(pipe) -> torch.nn.Module:
    """The UNet of a pipeline, or what was given if it is one, or if it is a model of transformers.

    Raises:
        ValueError: if there is no UNet in it.
    """
    unet = getattr(pipe, "unet", pipe)
    if not (hasattr(unet, "set_adapters") or is_transformers_model(unet)) or not isinstance(unet, torch.nn.Module):
        raise ValueError(
            "expected a diffusers pipeline with a UNet, or a UNet, or a vision model of transformers; found "
            f"{type(pipe).__name__}"
        )
    return getattr(unet, "_orig_mod", unet)  # of torch.compile(pipe.unet)


def is_transformers_model(model) -> bool:
    """Whether this is a model of transformers, whose adapters it drives with `set_adapter`, without an s."""
    return hasattr(model, "set_adapter") and hasattr(getattr(model, "config", None), "model_type")


def is_small(pipe) -> bool:
    """Whether the base is of the size of tiny-sd, not of Stable Diffusion: some defaults depend on it."""
    return get_unet(pipe).num_parameters() < 1e8


def native_size(pipe) -> tuple[int, int]:
    """Width and height in pixels of the pictures that a pipeline draws by default."""
    side = pipe.unet.config.sample_size
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    return width * pipe.vae_scale_factor, height * pipe.vae_scale_factor


def default_guidance(pipe) -> float:
    """The guidance that suits the base: SD v1.5's usual 7.5, or tiny-sd's 3 (see its model card)."""
    return 3.0 if is_small(pipe) else 7.5


def describe_base(pipe) -> dict:
    """Name, shape and prediction type of a pipeline's base, for the metadata of a tuner file."""
    unet = get_unet(pipe)
    name = str(getattr(pipe, "name_or_path", "") or getattr(unet, "name_or_path", "") or "unknown")
    if is_transformers_model(unet):
        return {
            "name": Path(name).name if Path(name).exists() else name,
            "family": unet.config.model_type,
            "shape": {k: getattr(unet.config, k) for k in _VISION_SHAPE if hasattr(unet.config, k)},
        }
    scheduler = getattr(pipe, "scheduler", None)
    return {
        "name": Path(name).name if Path(name).exists() else name,
        "shape": {k: unet.config[k] for k in _SHAPE},
        "prediction_type": scheduler.config.get("prediction_type", "epsilon") if scheduler else "epsilon",
    }
