"""The tuners: small trainable modules that run in parallel with a frozen operation, x' = OP(x) + tuner(x).

Res-Attn is from Mao & Jiang, "Res-Attn: An Enhanced Res-Tuning Approach with Lightweight Attention
Mechanism" (arXiv 2312.16916); the parallel form, Res-Adapter, Res-Prefix and Res-Prompt are Res-Tuning's
(arXiv 2310.19859). A tuner is called as `tuner(x, beside)`, maps (B, N, dim) to (B, N, dim) and starts at
exactly zero, so a fresh one changes nothing. This file knows tensors only; where a tuner hangs on a model is
`attach`'s business.

Adding a tuner: write its module here with a zero-initialised way out, and enter it in `KINDS`. The arguments
of its `__init__` are fields of `TunerConfig` or of `Widths`, by name.
"""

import inspect
import math
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

# CUDA's fused attention kernels want heads whose width is a multiple of this. Zero columns in q, k and v change neither
# q.k (the scale is given explicitly) nor the first `rank` columns of the result, so padding is exact.
_HEAD_DIM = {"cuda": 8}


@dataclass(frozen=True)
class Beside:
    """What a tuner may use of the frozen model around it.

    Not a tuple, and without a `to`: offloading hooks would move what is inside.

    Attributes:
        attn: the frozen attention: of the tuner's own operation, or the same block's attn1 beside ff and block.
        text: (B, L, text width), where the operation is given it: attn2 and block.
    """

    attn: nn.Module | None = None
    text: torch.Tensor | None = None


@dataclass(frozen=True)
class Widths:
    """The widths that a tuner's shapes depend on.

    Attributes:
        dim: of the operation's tokens.
        inner_dim: of all heads of `Beside.attn` together.
        context_dim: of what `Beside.attn` makes its keys and values from.
        text_dim: of `Beside.text`, or of the operation's tokens where there is none.
    """

    dim: int
    inner_dim: int
    context_dim: int
    text_dim: int


class Tuner(nn.Module):
    """A tuner: `tuner(x, beside)` maps (B, N, dim) to (B, N, dim), zero at first."""

    per_token = False  # whether a token's result depends on that token alone, so that x may come in pieces
    calls_base = False  # whether it calls `beside.attn`: it then gets x in the base's dtype, and the whole batch


class ResAttn(Tuner):
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

    def forward(self, x: torch.Tensor, beside: Beside | None = None) -> torch.Tensor:
        """x: (B, N, dim) -> (B, N, dim), to be added to the operation's own result."""
        return self.proj_drop(self.o(self._attend(self.qkv(x).unflatten(2, (3, self.num_heads, self.rank)))))

    def _attend(self, *projected: torch.Tensor) -> torch.Tensor:
        """q, k and v, packed as (B, N, 3, num_heads, rank), or in several such -> (B, N, num_heads * rank)."""
        dropout = self.attn_drop if self.training else 0.0
        if projected[0].is_cuda and not dropout:
            from .frozen import on_gpu_in_half  # imports diffusers, for which --help would have to wait

            if all(map(on_gpu_in_half, projected)):
                from . import gpu_attention  # imports Triton, which is not everywhere

                if self.rank <= gpu_attention.WIDEST:
                    return gpu_attention.attention(self.scale, *projected).flatten(2)
        q, k, v = (part.transpose(1, 2) for x in projected for part in _widened(x).unbind(2))
        if q.device.type == "cpu" and not dropout:
            from . import narrow  # imports Numba, which nothing else here needs

            x = narrow.attention(q, k, v, self.scale)
        else:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        return x[..., : self.rank].transpose(1, 2).flatten(2)


def _widened(x: torch.Tensor) -> torch.Tensor:
    """The last dimension padded with zeros for the attention kernels of x's device."""
    missing = -x.shape[-1] % _HEAD_DIM.get(x.device.type, 1)
    return F.pad(x, (0, missing)) if missing else x


class ResAttnText(ResAttn):
    """Res-Attn whose keys and values come from the text where its operation is given one: beside attn2 and block.

    Our extension: Algorithm 1 takes x alone. Elsewhere it is Res-Attn with `qkv` in two parts. All of the text's
    tokens are attended to, its padding too, as SD's own attn2 does. Parameters: rank * num_heads * (2 * dim +
    2 * text_dim) + dim.

    Args:
        text_dim: width of the text's tokens; that of x where the operation gets no text.
        dim, rank, num_heads, qkv_bias, attn_drop, proj_drop: as in `ResAttn`.
    """

    def __init__(
        self,
        dim: int,
        text_dim: int,
        rank: int = 4,
        num_heads: int = 4,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim, rank, num_heads, qkv_bias, attn_drop, proj_drop)
        del self.qkv
        self.q = nn.Linear(dim, rank * num_heads, bias=qkv_bias)
        self.kv = nn.Linear(text_dim, 2 * rank * num_heads, bias=qkv_bias)
        for projection in (self.q, self.kv):
            nn.init.kaiming_uniform_(projection.weight, a=math.sqrt(5))
            if qkv_bias:
                nn.init.zeros_(projection.bias)

    def forward(self, x: torch.Tensor, beside: Beside | None = None) -> torch.Tensor:
        """x: (B, N, dim), beside.text: (B, L, text_dim) or None -> (B, N, dim)."""
        text = x if beside is None or beside.text is None else beside.text.to(x.dtype)
        q = self.q(x).unflatten(2, (1, self.num_heads, self.rank))
        kv = self.kv(text).unflatten(2, (2, self.num_heads, self.rank))
        return self.proj_drop(self.o(self._attend(q, kv)))


class ResAdapter(Tuner):
    """act(x W_down) W_up: a bottleneck of width `length`, with biases and GELU (arXiv 2310.19859, Res-Adapter).

    In the parallel form there is no inner shortcut. `down` starts as PyTorch's linear layers do, `up` at zero.
    Parameters: 2 * dim * length + length + dim.

    Args:
        dim: width of the tokens.
        length: width of the bottleneck.
        proj_drop: dropout on the result while training, 0 to 1.
    """

    per_token = True

    def __init__(self, dim: int, length: int = 10, proj_drop: float = 0.0):
        super().__init__()
        self.down = nn.Linear(dim, length)
        self.up = nn.Linear(length, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor, beside: Beside | None = None) -> torch.Tensor:
        """x: (B, N, dim) -> (B, N, dim)."""
        return self.proj_drop(self.up(F.gelu(self.down(x))))


class _Prefix(Tuner):
    """What Res-Prefix and Res-Prompt share: the frozen attention's query and way out.

    Its layers are called, never read, so that a LoRA on them, offloading and casting act as in the attention itself.
    """

    per_token = calls_base = True

    def __init__(self, proj_drop: float):
        super().__init__()
        self.proj_drop = nn.Dropout(proj_drop)

    def _attend(self, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn: nn.Module) -> torch.Tensor:
        """x: (B, N, dim), k and v: (B, length, inner_dim) -> Attn(x W_q, k, v) W_o, (B, N, dim)."""
        q, k, v = (t.unflatten(2, (attn.heads, -1)).transpose(1, 2) for t in (attn.to_q(x), k, v))
        x = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype)).transpose(1, 2).flatten(2)
        out = attn.to_out[0]
        return self.proj_drop(out(x) - out(torch.zeros_like(x[:, :1])))  # OP(x) holds the bias of W_o already


class ResPrefix(_Prefix):
    """Attn(x W_q, K_pre, V_pre) W_o: the frozen query meets trainable keys and values (arXiv 2310.19859, Res-Prefix).

    It comes from Attn(Q, [K_pre; K], [V_pre; V]) = (1 - λ) Attn(Q, K, V) + λ Attn(Q, K_pre, V_pre), with λ dropped
    for the plain sum. Our reading: the frozen W_o applies to the result, its bias counts once; beside ff and block
    it is the same block's attn1 whose W_q and W_o are used. `k_pre` starts as N(0, 1), `v_pre` at zero.
    Parameters: 2 * length * inner_dim.

    Args:
        inner_dim: width of all heads of the frozen attention together.
        length: number of keys, and of values.
        proj_drop: dropout on the result while training, 0 to 1.
    """

    def __init__(self, inner_dim: int, length: int = 10, proj_drop: float = 0.0):
        super().__init__(proj_drop)
        self.k_pre = nn.Parameter(torch.empty(length, inner_dim))
        self.v_pre = nn.Parameter(torch.zeros(length, inner_dim))
        nn.init.normal_(self.k_pre)

    def forward(self, x: torch.Tensor, beside: Beside) -> torch.Tensor:
        """x: (B, N, dim) -> (B, N, dim)."""
        return self._attend(x, self.k_pre.expand(len(x), -1, -1), self.v_pre.expand(len(x), -1, -1), beside.attn)


class ResPrompt(_Prefix):
    """gate * Attn(x W_q, P W_k, P W_v) W_o: as Res-Prefix, with a trainable prompt P that goes through the frozen
    W_k and W_v (arXiv 2310.19859, Res-Prompt).

    Our reading: beside attn2, P is as wide as the text, since W_k and W_v take that there. P must differ from row
    to row for its rows to learn different things, so it cannot start at zero as `v_pre` does: `prompt` starts as
    N(0, 1), like a token after the norm, and `gate`, one factor per channel, at zero.
    Parameters: length * context_dim + dim.

    Args:
        dim: width of the tokens.
        context_dim: width of what the frozen attention makes keys and values from.
        length: number of tokens of the prompt.
        proj_drop: dropout on the result while training, 0 to 1.
    """

    def __init__(self, dim: int, context_dim: int, length: int = 10, proj_drop: float = 0.0):
        super().__init__(proj_drop)
        self.prompt = nn.Parameter(torch.empty(length, context_dim))
        self.gate = nn.Parameter(torch.zeros(dim))
        nn.init.normal_(self.prompt)

    def forward(self, x: torch.Tensor, beside: Beside) -> torch.Tensor:
        """x: (B, N, dim) -> (B, N, dim)."""
        attn, prompt = beside.attn, self.prompt.to(x.dtype).expand(len(x), -1, -1)
        return self.gate.to(x.dtype) * self._attend(x, attn.to_k(prompt), attn.to_v(prompt), attn)


class FullTuning(Tuner):
    """Full fine-tuning of one layer in the parallel form: OP(x; W + dW) = OP(x; W) + OP(x; dW), with dW zero at first.

    Linear layers, convolutions and the norms are linear in their weights, so this is exact; what it costs beside
    changing W in place is a second pass through each layer. Weight decay pulls dW to zero, so W to the base.

    Args:
        layer: the frozen `nn.Linear`, `nn.Conv2d`, `nn.GroupNorm` or `nn.LayerNorm`.
    """

    per_token = True
    LAYERS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.frozen = (layer,)  # in a tuple, so that it is no submodule
        for name, p in layer.named_parameters(recurse=False):
            setattr(self, name, nn.Parameter(torch.zeros(p.shape)))

    def forward(self, x: torch.Tensor, beside: Beside | None = None) -> torch.Tensor:
        """x: what the layer takes -> what it gives, with dW in place of its weights."""
        (layer,), weight, bias = self.frozen, self.weight, getattr(self, "bias", None)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        if isinstance(layer, nn.Conv2d):
            return layer._conv_forward(x, weight, bias)
        if isinstance(layer, nn.GroupNorm):
            return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)


KINDS = {
    "res_attn": ResAttn,
    "res_attn_text": ResAttnText,
    "res_adapter": ResAdapter,
    "res_prefix": ResPrefix,
    "res_prompt": ResPrompt,
}
LORAS = ("lora", "dora")  # `baselines` handles these
FULL = "full"  # full fine-tuning: beside every layer of the UNet, not beside `ops`
BASELINES = (*LORAS, FULL)  # what tuners are compared with
OPS = ("attn1", "attn2", "ff", "block")


def fields_of(kind: str) -> list[str]:
    """The fields of `TunerConfig` that make a difference to tuners of this kind, beside `kind`."""
    if kind in BASELINES:
        return [] if kind == FULL else ["ops", "rank"]
    return ["ops"] + [n for n in inspect.signature(KINDS[kind]).parameters if n in TunerConfig.__dataclass_fields__]


@dataclass(frozen=True)
class TunerConfig:
    """What a tuner is and where it hangs; written into every tuner file.

    Raises:
        ValueError: listing every field that is out of range, with what was found and what is possible.
    """

    kind: str = field(default="res_attn", metadata={"help": f"the tuner: {', '.join((*KINDS, *BASELINES))}"})
    rank: int = field(default=4, metadata={"help": "width of one attention head of Res-Attn; of a LoRA: its rank"})
    num_heads: int = field(default=4, metadata={"help": "number of heads of Res-Attn"})
    ops: list[str] = field(
        default_factory=lambda: ["attn1", "attn2", "ff"],
        metadata={"help": f"the frozen operations that get a tuner beside them, any of: {' '.join(OPS)}"},
    )
    qkv_bias: bool = field(default=False, metadata={"help": "give Res-Attn's qkv projection a bias"})
    attn_drop: float = field(default=0.0, metadata={"help": "dropout on Res-Attn's attention weights"})
    proj_drop: float = field(default=0.0, metadata={"help": "dropout on the tuner's result"})
    length: int = field(
        default=10, metadata={"help": "tokens of Res-Prefix and Res-Prompt; width of Res-Adapter's bottleneck"}
    )
    ffn_kind: str | None = field(
        default=None, metadata={"help": "another kind of tuner beside ff (dual tuning); default: the same as elsewhere"}
    )

    def __post_init__(self):
        ops = [self.ops] if isinstance(self.ops, str) else self.ops
        object.__setattr__(self, "ops", list(ops) if isinstance(ops, (list, tuple)) else ops)
        wrong = []
        if self.kind not in [*KINDS, *BASELINES]:
            wrong.append(f"kind is {self.kind!r}; possible: {', '.join((*KINDS, *BASELINES))}")
        for name in ("rank", "num_heads", "length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1024:
                wrong.append(f"{name} is {value!r}; it must be a whole number from 1 to 1024")
        known = isinstance(self.ops, list) and all(op in OPS and self.ops.count(op) == 1 for op in self.ops)
        if not self.ops or not known:
            wrong.append(f"ops is {self.ops!r}; it must name one or more of {', '.join(OPS)}, each once")
        elif self.kind == FULL and self.ops != TunerConfig().ops:
            wrong.append(f"ops is {self.ops!r}; full fine-tuning changes every layer of the UNet: leave ops out")
        elif self.kind in list(LORAS) and "block" in self.ops:
            wrong.append(f"ops is {self.ops!r}; a {self.kind} can be on attn1, attn2 and ff, not on the whole block")
        if self.ffn_kind is not None:
            if self.ffn_kind not in list(KINDS):
                wrong.append(f"ffn_kind is {self.ffn_kind!r}; possible: {', '.join(KINDS)}")
            elif self.kind in list(BASELINES):
                wrong.append(f"ffn_kind is {self.ffn_kind!r}; beside a {self.kind} there can be no other kind")
            elif known and "ff" not in self.ops:
                wrong.append(f"ffn_kind is {self.ffn_kind!r}, but ops is {self.ops!r}, without ff")
        if not isinstance(self.qkv_bias, bool):
            wrong.append(f"qkv_bias is {self.qkv_bias!r}; it must be true or false")
        for name in ("attn_drop", "proj_drop"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < 1:
                wrong.append(f"{name} is {value!r}; it must be at least 0 and below 1")
        if wrong:
            raise ValueError("this tuner configuration cannot be used: " + "; ".join(wrong))


def build(config: TunerConfig, op: str, widths: Widths) -> Tuner:
    """A fresh tuner of the kind that the configuration wants beside `op`."""
    kind = KINDS[config.ffn_kind if op == "ff" and config.ffn_kind else config.kind]
    offered = asdict(config) | asdict(widths)
    return kind(**{name: offered[name] for name in inspect.signature(kind).parameters})
