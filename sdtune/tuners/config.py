"""The settings of a tuner, `TunerConfig`, and the registry of all kinds of tuner."""

import inspect
from dataclasses import asdict, dataclass, field

from torch import nn

from .adapter import Adapter
from .base import Tuner, Widths
from .bypass import Bypass
from .res_adapter import ResAdapter
from .res_attn import ResAttn
from .res_attn_conv import ResAttnConv
from .res_attn_layer import ResAttnLayer
from .res_attn_text import ResAttnText
from .res_prefix import ResPrefix
from .res_prompt import ResPrompt
from .vpt import VPT

KINDS = {
    "res_attn": ResAttn,
    "res_attn_text": ResAttnText,
    "res_attn_conv": ResAttnConv,
    "res_attn_layer": ResAttnLayer,
    "res_adapter": ResAdapter,
    "res_prefix": ResPrefix,
    "res_prompt": ResPrompt,
}
RES_ATTN_LAYER = "res_attn_layer"  # beside each of `LINEAR_LAYERS`, not beside the operation
LORAS = ("lora", "dora")  # made by PEFT, in `adapters.lora`
FULL = "full"  # full fine-tuning of every layer of the UNet; `ops` has no effect
BASELINES = (*LORAS, FULL)  # what tuners are compared with
# Methods of the literature for vision transformers, which the paper compares Res-Attn with.
LINEAR = "linear"  # the head alone
SSF = "ssf"  # a scale and a shift behind every layer; `ops` has no effect
SEQUENTIAL = {"adapter": Adapter, "vpt": VPT, "bypass": Bypass}
PEFT_METHODS = ("oft", "lokr", "ia3")  # made by PEFT
NOAH = "noah"  # lora, adapter and vpt together, in `adapters.noah`
VISION_KINDS = (LINEAR, SSF, *SEQUENTIAL, NOAH, *PEFT_METHODS)
ALL_KINDS = (*KINDS, *BASELINES, *VISION_KINDS)
WITHOUT_OPS = (FULL, LINEAR, SSF, NOAH, "vpt", "bypass")  # what they are added to is given
TUNER_OPS = ("attn1", "attn2", "ff", "block")  # what a tuner can be added to
OPS = (*TUNER_OPS, "conv")
CONV_KINDS = (*LORAS, "res_attn_conv", "lokr")  # the kinds that can be on conv
DEFAULT_OPS = ["attn1", "attn2", "ff"]
# The linear layers of an operation, by their path in the block of a UNet; the last one makes its result.
LINEAR_LAYERS = {
    "attn1": ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    "attn2": ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    "ff": ("ff.net.0.proj", "ff.net.2"),
}


def fields_of(kind: str) -> list[str]:
    """The fields of `TunerConfig` other than `kind` that have an effect on tuners of this kind."""
    ops = [] if kind in WITHOUT_OPS else ["ops"]
    if kind in (*LORAS, *PEFT_METHODS):
        return [*ops, "rank"] if kind != "ia3" else ops
    if kind in (FULL, LINEAR, SSF):
        return ops
    if kind == NOAH:
        return ["rank", "length"]
    parameters = inspect.signature((KINDS | SEQUENTIAL)[kind]).parameters
    return ops + [n for n in parameters if n in TunerConfig.__dataclass_fields__]


def settings_without_effect(config: "TunerConfig") -> list[str]:
    """The fields that differ from their default and have no effect on tuners of this kind."""
    used = {"kind", "ffn_kind", *fields_of(config.kind), *(fields_of(config.ffn_kind) if config.ffn_kind else [])}
    default = TunerConfig(config.kind)
    return [name for name in vars(config) if name not in used and getattr(config, name) != getattr(default, name)]


def default_ops(kind: str) -> list[str]:
    """The operations that this kind of tuner is added to where none are named."""
    return [*DEFAULT_OPS, "conv"] if kind == "res_attn_conv" else list(DEFAULT_OPS)


@dataclass(frozen=True)
class TunerConfig:
    """The settings of a tuner and the operations it is added to; written into every tuner file.

    Raises:
        ValueError: listing every field that is out of range, with what was found and what is possible.
    """

    kind: str = field(default="res_attn", metadata={"help": f"the tuner: {', '.join((*KINDS, *BASELINES))}"})
    rank: int = field(
        default=4,
        metadata={"help": "width of one attention head of Res-Attn; of a LoRA, DoRA or convolution: its rank"},
    )
    num_heads: int = field(default=4, metadata={"help": "number of heads of Res-Attn"})
    ops: list[str] | None = field(
        default=None,
        metadata={
            "help": "the frozen operations that get a tuner in parallel, any of: attn1, attn2 and ff, the "
            "self-attention, cross-attention and feed-forward of a block; block, the whole of it, not for "
            f"{', '.join((RES_ATTN_LAYER, *LORAS))}; conv, the convolutions of residual blocks and the projections "
            f"around attention, for {', '.join(k for k in CONV_KINDS if k not in PEFT_METHODS)}; default: "
            f"{' '.join(DEFAULT_OPS)}, for res_attn_conv also conv"
        },
    )
    qkv_bias: bool = field(default=False, metadata={"help": "give Res-Attn's qkv projection a bias"})
    attn_drop: float = field(default=0.0, metadata={"help": "dropout on Res-Attn's attention weights"})
    proj_drop: float = field(default=0.0, metadata={"help": "dropout on the tuner's result"})
    length: int = field(
        default=10, metadata={"help": "tokens of Res-Prefix and Res-Prompt; width of Res-Adapter's bottleneck"}
    )
    ffn_kind: str | None = field(
        default=None, metadata={"help": "another kind of tuner for ff (dual tuning); default: the same as elsewhere"}
    )

    def __post_init__(self):
        default = default_ops(self.kind)
        ops = default if self.ops is None else [self.ops] if isinstance(self.ops, str) else self.ops
        object.__setattr__(self, "ops", list(ops) if isinstance(ops, (list, tuple)) else ops)
        wrong = []
        if self.kind not in list(ALL_KINDS):
            wrong.append(
                f"kind is {self.kind!r}; possible: {', '.join((*KINDS, *BASELINES))}, and for vision transformers "
                f"{', '.join(VISION_KINDS)}"
            )
        for name in ("rank", "num_heads", "length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1024:
                wrong.append(f"{name} is {value!r}; it must be a whole number from 1 to 1024")
        known = isinstance(self.ops, list) and all(op in OPS and self.ops.count(op) == 1 for op in self.ops)
        if not self.ops or not known:
            wrong.append(f"ops is {self.ops!r}; it must name one or more of {', '.join(OPS)}, each once")
        elif self.kind == FULL and self.ops != default:
            wrong.append(f"ops is {self.ops!r}; full fine-tuning changes every layer of the UNet: leave ops out")
        elif self.kind in list(WITHOUT_OPS) and self.ops != default:
            wrong.append(f"ops is {self.ops!r}; what {self.kind} is added to is given: leave ops out")
        elif self.kind in [*LORAS, *PEFT_METHODS, RES_ATTN_LAYER] and "block" in self.ops:
            ops = ", ".join(op for op in OPS if op != "block" and (op != "conv" or self.kind in CONV_KINDS))
            wrong.append(f"ops is {self.ops!r}; a {self.kind} can be on {ops}, not on the whole block")
        elif self.kind not in list(CONV_KINDS) and "conv" in self.ops:
            wrong.append(f"ops is {self.ops!r}; only {', '.join(CONV_KINDS)} can be on conv: leave it out")
        if self.ffn_kind is not None:
            if self.ffn_kind not in list(KINDS):
                wrong.append(f"ffn_kind is {self.ffn_kind!r}; possible: {', '.join(KINDS)}")
            elif self.kind in [*BASELINES, *VISION_KINDS]:
                wrong.append(f"ffn_kind is {self.ffn_kind!r}; a {self.kind} cannot be combined with another kind")
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


def kind_on(config: TunerConfig, op: str) -> str:
    """The kind of tuner that the configuration names for the operation `op`."""
    return config.ffn_kind if op == "ff" and config.ffn_kind else config.kind


def build_tuner(
    config: TunerConfig, op: str, widths: Widths, layer: nn.Module | None = None, makes_result: bool = True
) -> Tuner:
    """A fresh tuner of the kind that the configuration names for the operation `op`.

    Args:
        widths: of the operation.
        layer: for `ResAttnLayer`, the linear layer of the operation that it is beside.
        makes_result: whether that layer makes the operation's result.
    """
    kind = (KINDS | SEQUENTIAL)[kind_on(config, op)]
    offered = asdict(config) | asdict(widths) | {"layer": layer, "makes_result": makes_result}
    return kind(**{name: offered[name] for name in inspect.signature(kind).parameters})
