"""Res-Attn beside the linear layers of operations: an extension of ours; Algorithm 1 is beside whole operations."""

import torch
import torch.nn.functional as F
from torch import nn

from .attention import attention
from .base import Context, Tuner


class ResAttnLayer(Tuner):
    """o(z) with z = down(x), beside a linear layer within an operation; beside the layer that makes the operation's
    result o(z + attention(q z, k z, v z)).

    In x' = OP(x) + tuner(x) the OP is here a single projection of attention or feed-forward, as it is for a LoRA (arXiv
    2106.09685), whose form o(down(x)) is. Each head has maps q, k and v from its own `rank` channels of z to `rank`
    numbers. `down` starts Gaussian with a variance of 1 / features in, q and k with one of 1 / rank, v and `o` at zero:
    v, so that training begins as a LoRA's. For a UNet `training.gradient_start` then chooses other rows of `down`.
    Parameters: rank * num_heads * (features in + features out), and 3 * rank² * num_heads where it attends.

    Args:
        layer: the frozen `nn.Linear`.
        makes_result: whether the layer makes the result of its operation.
        rank: width of one head; at least 1.
        num_heads: number of heads; at least 1.
        attn_drop: dropout on the attention weights in training, from 0 to below 1.
        proj_drop: dropout on the result in training, from 0 to below 1.
    """

    def __init__(
        self,
        layer: nn.Linear,
        makes_result: bool = True,
        rank: int = 4,
        num_heads: int = 4,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.rank, self.num_heads = rank, num_heads
        self.scale = rank**-0.5
        self.down = nn.Linear(layer.in_features, rank * num_heads, bias=False)
        self.qkv = nn.Parameter(torch.empty(num_heads, rank, 3 * rank)) if makes_result else None
        self.attn_drop = attn_drop
        self.o = nn.Linear(rank * num_heads, layer.out_features, bias=False)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.normal_(self.down.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(self.o.weight)
        if makes_result:
            nn.init.normal_(self.qkv, std=rank**-0.5)
            nn.init.zeros_(self.qkv[:, :, 2 * rank :])

    @property
    def per_token(self) -> bool:
        return self.qkv is None

    def forward(self, x: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        """x: (B, N, features in) -> (B, N, features out), to be added to the layer's own result."""
        z = self.down(x)
        if self.qkv is not None:
            qkv = F.linear(z, self._qkv_of_all_heads()).unflatten(2, (3, self.num_heads, self.rank))
            z = z + attention(self.scale, qkv, dropout=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.o(z))

    def _qkv_of_all_heads(self) -> torch.Tensor:
        """`qkv` as one map of all channels, (3 * rank * num_heads, rank * num_heads), zero between different heads."""
        heads, rank = self.num_heads, self.rank
        of_heads = self.qkv.unflatten(2, (3, rank)).permute(2, 0, 3, 1)  # (3, H, R, R)
        if heads > 1:
            apart = torch.eye(heads, dtype=of_heads.dtype, device=of_heads.device).view(1, heads, 1, heads, 1)
            of_heads = of_heads.unsqueeze(3) * apart
        return of_heads.reshape(3 * heads * rank, heads * rank)
