"""What every tuner is: a module called as `tuner(x, context)` that maps (B, N, dim) to (B, N, dim), zero at the start.

To add a kind: write a file beside this one with a module whose last projection starts at zero, and enter it in
`config.KINDS`. The arguments of its `__init__` are fields of `TunerConfig` or of `Widths`, by name.
"""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Context:
    """What a tuner may read of the frozen model around it.

    It is not a tuple and has no method `to`, because the hooks of CPU offloading would move what such a value holds.

    Attributes:
        attn: the frozen attention: of the tuner's own operation, or the same block's attn1 for ff and block. It has
            diffusers' names: `heads`, `to_q`, `to_k`, `to_v`, `to_out[0]`.
        text: (B, L, text width), where the operation receives it: attn2 and block.
        output: the operation's own result.
        inputs: what every block of the model received, the first block's first; for `Bypass` alone.
    """

    attn: nn.Module | None = None
    text: torch.Tensor | None = None
    output: torch.Tensor | None = None
    inputs: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Widths:
    """The widths that the shapes of a tuner depend on.

    Attributes:
        dim: of the operation's tokens.
        inner_dim: of all heads of `Context.attn` together.
        context_dim: of the tokens from which `Context.attn` makes keys and values.
        text_dim: of `Context.text`, or of the operation's tokens where there is no text.
        blocks: number of blocks of the model; for `Bypass` alone.
    """

    dim: int
    inner_dim: int
    context_dim: int
    text_dim: int
    blocks: int = 0


class Tuner(nn.Module):
    """The base class of all tuners.

    Attributes:
        per_token: whether the result for a token depends on that token alone, so that x may come in chunks.
        calls_base: whether the tuner calls `context.attn`; it then receives x in the base's dtype and the whole batch.
    """

    per_token = False
    calls_base = False
