"""Tensors of weights per sample, in the shape, length and place that a batch needs."""

from functools import lru_cache

import torch


def tile_weights(weights: torch.Tensor, batch: int) -> torch.Tensor:
    """The cells' weights (C,) for a batch that holds all the cells once or more: (batch,)."""
    if batch % len(weights):
        raise ValueError(f"a batch of {batch} samples cannot hold {len(weights)} cells, each with its own weight")
    return weights.repeat(batch // len(weights))


def to_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A few numbers on another device. The same ones are sent once: while a GPU's work is recorded, nothing can be."""
    return _cached_tensor(tuple(numbers.tolist()), numbers.dtype, device)


@lru_cache(maxsize=256)
def _cached_tensor(numbers: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def per_sample_shape(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Weights (B,) in the shape that multiplies x (B, ...) sample by sample."""
    return weights.view(-1, *[1] * (x.ndim - 1))
