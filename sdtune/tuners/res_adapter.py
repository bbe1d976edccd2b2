"""Res-Adapter: the bottleneck of Res-Tuning (arXiv 2310.19859). It is not ByteDance's ResAdapter, which is about
resolutions."""

import torch
import torch.nn.functional as F
from torch import nn

from .base import Context, Tuner


class ResAdapter(Tuner):
    """gelu(x W_down) W_up, with biases. In the parallel form there is no inner shortcut.

    `down` starts as PyTorch's linear layers do, `up` at zero. Parameters: 2 * dim * length + length + dim.

    Args:
        dim: width of the tokens.
        length: width of the bottleneck.
        proj_drop: dropout on the result in training, from 0 to below 1.
    """

    per_token = True

    def __init__(self, dim: int, length: int = 10, proj_drop: float = 0.0):
        super().__init__()
        self.down = nn.Linear(dim, length)
        self.up = nn.Linear(length, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        """x: (B, N, dim) -> (B, N, dim)."""
        return self.proj_drop(self.up(F.gelu(self.down(x))))
