"""Helpers for tests of a bare UNet: what it is given, and what it predicts."""

import torch


def batch(copies: int, dtype=torch.float32):
    """Four samples so many times: latents, timestep and text."""
    return _draw(4 * copies, dtype)


def inputs(dtype=torch.float32):
    """One sample: latents, timestep and text."""
    return _draw(1, dtype)


def predict(unet, **kwargs) -> torch.Tensor:
    """What a UNet predicts for `inputs`."""
    with torch.no_grad():
        return unet(*inputs(unet.dtype), **kwargs).sample


def _draw(count: int, dtype):
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(count, *shape, generator=generator).to(dtype) for shape in ((4, 16, 16), (9, 192)))
    return x, torch.tensor([500]), text
