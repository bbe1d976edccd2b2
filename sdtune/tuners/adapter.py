"""Adapter: a bottleneck behind an operation (Houlsby et al., arXiv 1902.00751); one per block, behind its feed-forward,
where Pfeiffer et al. (arXiv 2005.00247) place it."""

import torch
import torch.nn.functional as F
from torch import nn

from .base import Context, Tuner


class Adapter(Tuner):
    """gelu(OP(x) W_down) W_up, with biases: x' = OP(x) + tuner(OP(x)), in sequence with the operation.

    `down` starts as PyTorch's linear layers do, `up` at zero. Parameters: 2 * dim * length + length + dim.

    Args:
        dim: width of the tokens.
        length: width of the bottleneck; 96 in the comparisons of VPT and Res-Tuning on ViT-B/16.
        proj_drop: dropout on the result in training, from 0 to below 1.
    """

    per_token = True

    def __init__(self, dim: int, length: int = 96, proj_drop: float = 0.0):
        super().__init__()
        self.down = nn.Linear(dim, length)
        self.up = nn.Linear(length, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """context.output: (B, N, dim) -> (B, N, dim)."""
        return self.proj_drop(self.up(F.gelu(self.down(context.output))))
