"""Res-Prompt: a trainable prompt that goes through the frozen W_k and W_v (Res-Tuning, arXiv 2310.19859)."""

import torch
from torch import nn

from .base import Context
from .res_prefix import PrefixTuner


class ResPrompt(PrefixTuner):
    """gate * Attn(x W_q, P W_k, P W_v) W_o.

    Our reading: for attn2 P is as wide as the text, since W_k and W_v take that there. The rows of P must differ from
    each other to learn different things, so P cannot start at zero: `prompt` starts as N(0, 1), like a token after the
    norm, and `gate`, one factor per channel, starts at zero. Parameters: length * context_dim + dim.

    Args:
        dim: width of the tokens.
        context_dim: width of the tokens from which the frozen attention makes keys and values.
        length: number of tokens of the prompt.
        proj_drop: dropout on the result in training, from 0 to below 1.
    """

    def __init__(self, dim: int, context_dim: int, length: int = 10, proj_drop: float = 0.0):
        super().__init__(proj_drop)
        self.prompt = nn.Parameter(torch.empty(length, context_dim))
        self.gate = nn.Parameter(torch.zeros(dim))
        nn.init.normal_(self.prompt)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """x: (B, N, dim) -> (B, N, dim)."""
        attn, prompt = context.attn, self.prompt.to(x.dtype).expand(len(x), -1, -1)
        return self.gate.to(x.dtype) * self.attend(x, attn.to_k(prompt), attn.to_v(prompt), attn)
