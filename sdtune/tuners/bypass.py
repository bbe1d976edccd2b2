"""Res-Tuning's bypass: tuners beside the whole backbone, with no gradient through it (arXiv 2310.19859)."""

import torch
import torch.nn.functional as F
from torch import nn

from .base import Context, Tuner


class _Bottleneck(nn.Module):
    def __init__(self, dim: int, length: int):
        super().__init__()
        self.down = nn.Linear(dim, length)
        self.up = nn.Linear(length, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(F.gelu(self.down(x)))


class BypassBlock(nn.Module):
    """λ lateral(x_l) + (1 - λ) vertical(b_{l-1}), both bottlenecks with a shortcut; λ is the sigmoid of `gate`."""

    def __init__(self, dim: int, length: int):
        super().__init__()
        self.lateral, self.vertical = _Bottleneck(dim, length), _Bottleneck(dim, length)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, bypass: torch.Tensor) -> torch.Tensor:
        share = self.gate.sigmoid()
        return share * self.lateral(x) + (1 - share) * self.vertical(bypass)


class Bypass(Tuner):
    """b_0 = x_0 and b_l = λ_l T(x_l) + (1 - λ_l) T'(b_{l-1}), where x_l is the detached result of block l.

    b_L takes the place of the last block's result.

    The bottlenecks have a shortcut, as in the authors' code (ms-swift), and start at zero there; λ starts at 0.5 (our
    reading). A fresh bypass is therefore a running mean of all blocks' results, not the base. Parameters:
    blocks * (2 * (2 * dim * length + length + dim) + 1).

    Args:
        dim: width of the tokens.
        blocks: number of blocks of the backbone.
        length: width of the bottlenecks.
    """

    calls_base = True  # it needs the whole batch

    def __init__(self, dim: int, blocks: int, length: int = 10):
        super().__init__()
        self.blocks = nn.ModuleList(BypassBlock(dim, length) for _ in range(blocks))

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """context.inputs: what each block received, context.output: the last one's result -> what is added to that."""
        inputs = [t.detach().to(self.blocks[0].gate.dtype) for t in (*context.inputs, context.output)]
        bypass = inputs[0]
        for block, result in zip(self.blocks, inputs[1:]):
            bypass = block(result, bypass)
        return bypass - inputs[-1]


class MapBypass(Tuner):
    """The bypass beside the upward half of a UNet, whose levels differ in channels and size.

    b_0 = x_0 and b_l = λ_l T(x_l) + (1 - λ_l) T'(b_{l-1}), where x_0 is the result of the middle block and x_l that of
    upward block l, detached; b_L is added to x_L. T is a bottleneck of 1 x 1 convolutions without a shortcut, T' one
    from the channels of level l - 1 to those of level l, at the size of x_l (nearest pixel). The last level starts at
    zero. This is our reading: the authors' code has bottlenecks in groups of channels, 3 x 3 convolutions between
    levels, and a shortcut, with which a fresh bypass would not be the base. Parameters: length times twice the channels
    of all x_l for l > 0, plus length times the channels of both ends of every T', plus biases and a factor per level.

    Args:
        channels: of x_0 to x_L.
        length: width of the bottlenecks.
    """

    calls_base = True

    def __init__(self, channels: tuple[int, ...], length: int = 10):
        super().__init__()

        def bottleneck(into: int, out: int) -> nn.ModuleDict:
            return nn.ModuleDict({"down": nn.Conv2d(into, length, 1), "up": nn.Conv2d(length, out, 1)})

        self.lateral = nn.ModuleList(bottleneck(c, c) for c in channels[1:])
        self.vertical = nn.ModuleList(bottleneck(a, b) for a, b in zip(channels, channels[1:]))
        self.gate = nn.Parameter(torch.zeros(len(channels) - 1))
        for last in (self.lateral[-1], self.vertical[-1]):
            nn.init.zeros_(last["up"].weight)
            nn.init.zeros_(last["up"].bias)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """context.inputs: what each upward block received, context.output: the last one's result, (B, C, H, W)."""
        maps = [t.detach().to(self.gate.dtype) for t in (*context.inputs, context.output)]
        bypass = maps[0]
        for x, lateral, vertical, share in zip(maps[1:], self.lateral, self.vertical, self.gate.sigmoid()):
            below = F.interpolate(F.gelu(vertical["down"](bypass)), x.shape[-2:], mode="nearest")
            beside = F.gelu(lateral["down"](x))
            bypass = share * lateral["up"](beside) + (1 - share) * vertical["up"](below)
        return bypass
