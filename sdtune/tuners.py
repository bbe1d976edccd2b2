"""The tuners: small trainable modules that run in parallel with a frozen operation, x' = OP(x) + tuner(x).

Res-Attn is from Mao & Jiang, "Res-Attn: An Enhanced Res-Tuning Approach with Lightweight Attention
Mechanism" (arXiv 2312.16916); the parallel form is Res-Tuning's (arXiv 2310.19859). A tuner maps
(B, N, dim) to (B, N, dim) and starts at exactly zero, so a fresh one changes nothing. This file knows
tensors only; where a tuner hangs on a model is `attach`'s business.

Adding a tuner: write its module here with a zero-initialised way out, and enter it in `KINDS`.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

# The fused attention kernels want wider heads than the rank of a tuner. Zero columns in q, k and v change
# neither q.k (the scale is given explicitly) nor the first `rank` columns of the result, so padding is exact.
_HEAD_DIM = {"cpu": 16, "cuda": 8}


class ResAttn(nn.Module):
    """Self-attention with low-rank projections (arXiv 2312.16916, Algorithm 1).

    One linear `qkv` (dim -> 3 * rank * num_heads), softmax attention with heads of width `rank` and
    scale rank**-0.5, and one linear `o` (rank * num_heads -> dim, with bias). `qkv` starts Kaiming-uniform
    (a = sqrt 5), `o` at zero. Parameters: 4 * dim * rank * num_heads + dim.

    The N x N scores are never materialised, except on CPU with `attn_drop` > 0 while training, where
    PyTorch has no fused kernel with dropout.

    Args:
        dim: width of the tokens; at least 1.
        rank: width of one head; at least 1. "8x4" in the paper's tables is rank 8, 4 heads.
        num_heads: number of heads; at least 1.
        qkv_bias: whether `qkv` has a bias.
        attn_drop: dropout on the attention weights while training, 0 to 1.
        proj_drop: dropout on the result while training, 0 to 1.
    """

    def __init__(
        self,
        dim: int,
        rank: int = 4,
        num_heads: int = 4,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.rank, self.num_heads = rank, num_heads
        self.scale = rank**-0.5
        self.qkv = nn.Linear(dim, 3 * rank * num_heads, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.o = nn.Linear(rank * num_heads, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.kaiming_uniform_(self.qkv.weight, a=math.sqrt(5))
        if qkv_bias:
            nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.o.weight)
        nn.init.zeros_(self.o.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, N, dim) -> (B, N, dim), to be added to the operation's own result."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.rank)
        width = _HEAD_DIM.get(x.device.type, self.rank)
        if self.rank % width:
            qkv = F.pad(qkv, (0, -self.rank % width))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        x = x[..., : self.rank].transpose(1, 2).reshape(batch, tokens, self.num_heads * self.rank)
        return self.proj_drop(self.o(x))


KINDS = {"res_attn": ResAttn}
BASELINES = ("lora", "dora")  # what tuners are compared with: `baselines` handles these kinds
OPS = ("attn1", "attn2", "ff", "block")


@dataclass(frozen=True)
class TunerConfig:
    """What a tuner is and where it hangs; written into every tuner file.

    Raises:
        ValueError: listing every field that is out of range, with what was found and what is possible.
    """

    kind: str = field(default="res_attn", metadata={"help": f"the tuner: {', '.join((*KINDS, *BASELINES))}"})
    rank: int = field(default=4, metadata={"help": "width of one attention head of the tuner"})
    num_heads: int = field(default=4, metadata={"help": "number of heads of the tuner"})
    ops: list[str] = field(
        default_factory=lambda: ["attn1", "attn2", "ff"],
        metadata={"help": f"the frozen operations that get a tuner beside them, any of: {' '.join(OPS)}"},
    )
    qkv_bias: bool = field(default=False, metadata={"help": "give the tuner's qkv projection a bias"})
    attn_drop: float = field(default=0.0, metadata={"help": "dropout on the tuner's attention weights"})
    proj_drop: float = field(default=0.0, metadata={"help": "dropout on the tuner's result"})

    def __post_init__(self):
        ops = [self.ops] if isinstance(self.ops, str) else self.ops
        object.__setattr__(self, "ops", list(ops) if isinstance(ops, (list, tuple)) else ops)
        wrong = []
        if self.kind not in [*KINDS, *BASELINES]:
            wrong.append(f"kind is {self.kind!r}; possible: {', '.join((*KINDS, *BASELINES))}")
        for name in ("rank", "num_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1024:
                wrong.append(f"{name} is {value!r}; it must be a whole number from 1 to 1024")
        known = isinstance(self.ops, list) and all(op in OPS and self.ops.count(op) == 1 for op in self.ops)
        if not self.ops or not known:
            wrong.append(f"ops is {self.ops!r}; it must name one or more of {', '.join(OPS)}, each once")
        elif self.kind in list(BASELINES) and "block" in self.ops:
            wrong.append(f"ops is {self.ops!r}; a {self.kind} can be on attn1, attn2 and ff, not on the whole block")
        if not isinstance(self.qkv_bias, bool):
            wrong.append(f"qkv_bias is {self.qkv_bias!r}; it must be true or false")
        for name in ("attn_drop", "proj_drop"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < 1:
                wrong.append(f"{name} is {value!r}; it must be at least 0 and below 1")
        if wrong:
            raise ValueError("this tuner configuration cannot be used: " + "; ".join(wrong))


def build(config: TunerConfig, dim: int) -> nn.Module:
    """A fresh tuner of the configured kind for tokens of width `dim`."""
    return KINDS[config.kind](
        dim, config.rank, config.num_heads, config.qkv_bias, config.attn_drop, config.proj_drop
    )  # fmt: skip
