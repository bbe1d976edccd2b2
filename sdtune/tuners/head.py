"""The classification head that is trained with a tuner of a vision model."""

import torch
import torch.nn.functional as F
from torch import nn

from .base import Context, Tuner


class Head(Tuner):
    """A linear layer that takes the place of the model's own head while its adapter is active.

    Args:
        layer: the model's head; a fresh head of as many classes starts with its weights.
        classes: number of classes; default: as many as `layer` has. With another number it starts at zero.
    """

    per_token = True

    def __init__(self, layer: nn.Linear, classes: int | None = None):
        super().__init__()
        out, into = layer.weight.shape
        self.weight = nn.Parameter(torch.zeros(classes or out, into))
        self.bias = nn.Parameter(torch.zeros(classes or out))
        if classes in (None, out) and not self.weight.is_meta:
            self.weight.data.copy_(layer.weight)
            if layer.bias is not None:
                self.bias.data.copy_(layer.bias)

    def forward(self, x: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        """x: (B, width) features -> (B, classes) logits."""
        return F.linear(x, self.weight, self.bias)
