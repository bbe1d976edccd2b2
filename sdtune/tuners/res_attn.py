"""Res-Attn: Algorithm 1 of Mao & Jiang, "Res-Attn: An Enhanced Res-Tuning Approach with Lightweight Attention
Mechanism" (arXiv 2312.16916)."""

import math

import torch
from torch import nn

from .attention import attention
from .base import Context, Tuner


class ResAttn(Tuner):
    """Self-attention with low-rank projections.

    `qkv` starts Kaiming-uniform (a = sqrt 5) and `o` at zero. Parameters: 4 * dim * rank * num_heads + dim.

    Args:
        dim: width of the tokens; at least 1.
        rank: width of one head; at least 1. "8x4" in the paper's tables is rank 8 and 4 heads.
        num_heads: number of heads; at least 1.
        qkv_bias: whether `qkv` has a bias.
        attn_drop: dropout on the attention weights in training, from 0 to below 1.
        proj_drop: dropout on the result in training, from 0 to below 1.
    """

    def __init__(
        self,
        dim: int,
        rank: int = 4,
        num_heads: int = 4,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.rank, self.num_heads = rank, num_heads
        self.scale = rank**-0.5
        self.qkv = nn.Linear(dim, 3 * rank * num_heads, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.o = nn.Linear(rank * num_heads, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.kaiming_uniform_(self.qkv.weight, a=math.sqrt(5))
        if qkv_bias:
            nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.o.weight)
        nn.init.zeros_(self.o.bias)

    def forward(self, x: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        """x: (B, N, dim) -> (B, N, dim), to be added to the operation's own result."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, self.rank))
        x = attention(self.scale, qkv, dropout=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.o(x))
