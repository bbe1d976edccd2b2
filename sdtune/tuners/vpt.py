"""VPT-Deep: trainable tokens in the input of every block (Jia et al., arXiv 2203.12119)."""

import math

import torch
from torch import nn

from .base import Tuner


class VPT(Tuner):
    """`length` trainable tokens that a block receives beside its own; their results are dropped after the block.

    Dropping them and giving the next block tokens of its own is VPT-Deep. The place among the tokens has no effect,
    since a block has no positions. The tokens take part in the block's attention, so a fresh tuner changes the
    result, unlike all others. They start uniform in ±sqrt(6 / (3 * 16² + dim)), as the authors' do for patches of 16
    pixels. Parameters: length * dim.

    Args:
        dim: width of the tokens.
        length: number of trainable tokens.
    """

    def __init__(self, dim: int, length: int = 10):
        super().__init__()
        limit = math.sqrt(6 / (3 * 16**2 + dim))
        self.prompt = nn.Parameter(torch.empty(length, dim).uniform_(-limit, limit))
