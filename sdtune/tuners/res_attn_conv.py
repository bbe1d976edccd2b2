"""Res-Attn with convolutions: an extension of ours for the parts of a UNet that Algorithm 1 does not reach."""

import torch
import torch.nn.functional as F
from torch import nn

from .attention import attention
from .base import Context, Tuner
from .res_attn import ResAttn


class ResAttnConv(ResAttn):
    """Res-Attn whose values also go past the attention: o(attention(q, k, v) + gelu(v)).

    Beside a convolution the same kind is `LowRankConvolution`. In Algorithm 1 a token's own content reaches the result
    only as much as its attention rests on itself. Parameters: as `ResAttn`.
    """

    def forward(self, x: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        """x: (B, N, dim) -> (B, N, dim), to be added to the operation's own result."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, self.rank))
        x = attention(self.scale, qkv, dropout=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.o(x + F.gelu(qkv[:, :, 2].flatten(2))))


class LowRankConvolution(Tuner):
    """o(conv(x)) beside a convolution: `conv` has its kernel, stride and padding and `rank` channels, `o` is 1 x 1.

    It is the LoRA of LoCon (LyCORIS, arXiv 2309.14859), and starts as diffusers' LoRAs do: `conv` Gaussian with a
    deviation of 1 / rank, `o` at zero. Parameters: rank * (channels in * kernel + channels out).

    Args:
        layer: the frozen `nn.Conv2d`.
        rank: channels of `conv`.
        proj_drop: dropout on the result in training, from 0 to below 1.
    """

    def __init__(self, layer: nn.Conv2d, rank: int = 4, proj_drop: float = 0.0):
        super().__init__()
        self.conv = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False)
        self.o = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.normal_(self.conv.weight, std=1 / rank)
        nn.init.zeros_(self.o.weight)

    def forward(self, x: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        """x: (B, channels in, H, W) -> (B, channels out, H, W), to be added to the convolution's result."""
        return self.proj_drop(self.o(self.conv(x)))
