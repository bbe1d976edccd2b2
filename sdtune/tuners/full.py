"""Full fine-tuning in the parallel form: the difference of a layer's weights, kept beside the frozen layer."""

import torch
import torch.nn.functional as F
from torch import nn

from .base import Context, Tuner


class FullTuning(Tuner):
    """OP(x; W + dW) = OP(x; W) + OP(x; dW), with dW zero at the start.

    Linear layers, convolutions and norms are linear in their weights, so this is exact; compared with changing W in
    place it costs a second pass through each layer. Weight decay pulls dW to zero, and so W to the base.

    Args:
        layer: the frozen `nn.Linear`, `nn.Conv2d`, `nn.GroupNorm` or `nn.LayerNorm`.
    """

    per_token = True
    LAYERS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.frozen = (layer,)  # in a tuple, so that it does not become a submodule
        for name, p in layer.named_parameters(recurse=False):
            setattr(self, name, nn.Parameter(torch.zeros(p.shape)))

    def forward(self, x: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        """x: the layer's input -> the layer's result with dW in place of its weights."""
        (layer,), weight, bias = self.frozen, self.weight, getattr(self, "bias", None)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        if isinstance(layer, nn.Conv2d):
            return layer._conv_forward(x, weight, bias)
        if isinstance(layer, nn.GroupNorm):
            return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
