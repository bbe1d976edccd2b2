"""Adapter: a bottleneck behind an operation (Houlsby et al., arXiv 1902.00751); one per block, behind its feed-forward,
where Pfeiffer et al. (arXiv 2005.00247) place it."""

import torch

from .base import Context
from .res_adapter import ResAdapter


class Adapter(ResAdapter):
    """The bottleneck of `ResAdapter` in sequence with the operation: x' = OP(x) + tuner(OP(x)).

    Its `length` is 96 in the comparisons of VPT and Res-Tuning on ViT-B/16.
    """

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """context.output: (B, N, dim) -> (B, N, dim)."""
        return super().forward(context.output)
