"""SSF: a scale and a shift per channel behind every layer (Lian et al., arXiv 2210.08823)."""

import torch
from torch import nn

from .base import Context, Tuner


class SSF(Tuner):
    """OP(x) * (1 + scale) + shift, per channel, behind a linear layer, a convolution or a norm.

    Both start at zero, so that a fresh tuner changes nothing and weight decay pulls to the base; the authors' code
    draws them around 1 and 0 with a deviation of 0.02. Parameters: 2 * channels.

    Args:
        layer: the frozen `nn.Linear`, `nn.Conv2d`, `nn.GroupNorm` or `nn.LayerNorm`.
    """

    per_token = True

    def __init__(self, layer: nn.Module):
        super().__init__()
        channels = layer.weight.shape[0]
        self.channels_first = isinstance(layer, (nn.Conv2d, nn.GroupNorm))
        self.scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """context.output: the layer's result -> what is added to it, of the same shape."""
        scale, shift = self.scale, self.shift
        if self.channels_first:
            shape = (-1, *[1] * (context.output.ndim - 2))
            scale, shift = scale.view(shape), shift.view(shape)
        return context.output * scale + shift
