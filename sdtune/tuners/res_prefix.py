"""Res-Prefix: trainable keys and values for the frozen query (Res-Tuning, arXiv 2310.19859)."""

import torch
import torch.nn.functional as F
from torch import nn

from .base import Context, Tuner


class PrefixTuner(Tuner):
    """What Res-Prefix and Res-Prompt share: the frozen attention's query and output projections.

    These layers are called and their weights are never read, so that a LoRA on them, offloading and casting act as they
    do in the frozen attention itself.
    """

    per_token = calls_base = True

    def __init__(self, proj_drop: float):
        super().__init__()
        self.proj_drop = nn.Dropout(proj_drop)

    def attend(self, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn: nn.Module) -> torch.Tensor:
        """x: (B, N, dim), k and v: (B, length, inner_dim) -> Attn(x W_q, k, v) W_o, (B, N, dim)."""
        q, k, v = (t.unflatten(2, (attn.heads, -1)).transpose(1, 2) for t in (attn.to_q(x), k, v))
        x = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype)).transpose(1, 2).flatten(2)
        out = attn.to_out[0]
        return self.proj_drop(out(x) - out(torch.zeros_like(x[:, :1])))  # OP(x) already has the bias of W_o


class ResPrefix(PrefixTuner):
    """Attn(x W_q, K_pre, V_pre) W_o.

    It comes from Attn(Q, [K_pre; K], [V_pre; V]) = (1 - λ) Attn(Q, K, V) + λ Attn(Q, K_pre, V_pre), with λ dropped for
    the plain sum. Our reading: the frozen W_o applies to the result and its bias counts once; for ff and block W_q and
    W_o are those of the same block's attn1. `k_pre` starts as N(0, 1), `v_pre` at zero. Parameters:
    2 * length * inner_dim.

    Args:
        inner_dim: width of all heads of the frozen attention together.
        length: number of keys, and of values.
        proj_drop: dropout on the result in training, from 0 to below 1.
    """

    def __init__(self, inner_dim: int, length: int = 10, proj_drop: float = 0.0):
        super().__init__(proj_drop)
        self.k_pre = nn.Parameter(torch.empty(length, inner_dim))
        self.v_pre = nn.Parameter(torch.zeros(length, inner_dim))
        nn.init.normal_(self.k_pre)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """x: (B, N, dim) -> (B, N, dim)."""
        return self.attend(x, self.k_pre.expand(len(x), -1, -1), self.v_pre.expand(len(x), -1, -1), context.attn)
