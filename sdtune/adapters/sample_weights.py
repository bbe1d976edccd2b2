"""Weights per sample as tensors of the length, device and shape that a batch needs."""

from functools import lru_cache

import torch


def tile_weights(weights: torch.Tensor, batch: int) -> torch.Tensor:
    """Weights of C samples (C,) repeated for a batch that contains all samples one or more times: (batch,)."""
    if batch % len(weights):
        raise ValueError(f"a batch of {batch} samples is no multiple of {len(weights)}, the number of weights")
    return weights.repeat(batch // len(weights))


def to_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A few numbers on another device. The same numbers are copied once only: while a CUDA graph is captured no copy is
    possible."""
    return _cached_tensor(tuple(numbers.tolist()), numbers.dtype, device)


@lru_cache(maxsize=256)
def _cached_tensor(numbers: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def per_sample_shape(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Weights (B,) in the shape (B, 1, ...) that multiplies x (B, ...) sample by sample."""
    return weights.view(-1, *[1] * (x.ndim - 1))
