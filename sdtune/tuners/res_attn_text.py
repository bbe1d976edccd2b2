"""Res-Attn whose keys and values come from the text: an extension of ours, since Algorithm 1 takes x alone."""

import math

import torch
from torch import nn

from .attention import attention
from .base import Context
from .res_attn import ResAttn


class ResAttnText(ResAttn):
    """Res-Attn with keys and values from the text where the operation receives one, which is attn2 and block.

    Elsewhere it is Res-Attn with `qkv` in two parts. It attends to all tokens of the text, the padding included, as
    Stable Diffusion's own attn2 does. Parameters: rank * num_heads * (2 * dim + 2 * text_dim) + dim.

    Args:
        text_dim: width of the text's tokens; that of x where the operation receives no text.
        dim, rank, num_heads, qkv_bias, attn_drop, proj_drop: as in `ResAttn`.
    """

    def __init__(
        self,
        dim: int,
        text_dim: int,
        rank: int = 4,
        num_heads: int = 4,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim, rank, num_heads, qkv_bias, attn_drop, proj_drop)
        del self.qkv
        self.q = nn.Linear(dim, rank * num_heads, bias=qkv_bias)
        self.kv = nn.Linear(text_dim, 2 * rank * num_heads, bias=qkv_bias)
        for projection in (self.q, self.kv):
            nn.init.kaiming_uniform_(projection.weight, a=math.sqrt(5))
            if qkv_bias:
                nn.init.zeros_(projection.bias)

    def forward(self, x: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        """x: (B, N, dim), context.text: (B, L, text_dim) or None -> (B, N, dim)."""
        text = x if context is None or context.text is None else context.text.to(x.dtype)
        q = self.q(x).unflatten(2, (1, self.num_heads, self.rank))
        kv = self.kv(text).unflatten(2, (2, self.num_heads, self.rank))
        x = attention(self.scale, q, kv, dropout=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.o(x))
