"""Finds the operations of a model that a tuner can be added to: attention, feed-forward, and the whole block.

This is the one place that knows how diffusers' UNet and the vision transformers of transformers (ViT, DeiT, DINOv2 and
others with their names) are built. Operations have diffusers' names: in a vision transformer attn1 is the multi-head
attention (MHA), ff the feed-forward (FFN), and there is no attn2.
"""

import re
from dataclasses import dataclass

from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from ..tuners.base import Tuner, Widths
from ..tuners.bypass import MapBypass
from ..tuners.config import (
    FULL,
    LINEAR,
    LINEAR_LAYERS,
    RES_ATTN_LAYER,
    SSF,
    TunerConfig,
    build_tuner,
    default_ops,
    kind_on,
)
from ..tuners.full import FullTuning
from ..tuners.head import Head
from ..tuners.res_attn_conv import LowRankConvolution
from ..tuners.ssf import SSF as ScaleAndShift

CHILD_NAME = "res_tuner"  # the name of the layer of tuners inside its operation
ADAPTER_PATHS = re.compile(rf"(^|\.)(lora_\w+|{CHILD_NAME})(\.|$)")  # matches paths inside adapters
_VISION_PARTS = {"attn1": "attention", "ff": "mlp"}  # what transformers calls an operation
_HEADS = ("classifier", "cls_classifier", "distillation_classifier")


@dataclass(frozen=True)
class FrozenAttention:
    """An attention of transformers under diffusers' names; no module, so that its layers get no second path."""

    heads: int
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    to_out: tuple[nn.Module]


@dataclass(frozen=True)
class Operation:
    """A frozen operation of a model. As a dataclass it can be an attribute of a module without becoming a submodule.

    Attributes:
        name: one of `tuners.TUNER_OPS`; "layer" for methods that change single layers; "bypass" for the last block,
            whose result a bypass replaces; "head" for a classification head.
        module: the frozen operation itself, or that of its linear layers which a `ResAttnLayer` is beside.
        block: the transformer block that contains it, or that it is; None for a single layer.
        blocks: all blocks of the model, for a bypass alone; of a UNet the upward blocks.
        channels: for a bypass of a UNet: of the first block's input and of all blocks' results.
        classes: number of classes of a head's replacement; None: as many as the head has.
        makes_result: whether the module makes the operation's result; the inner linear layers do not.
    """

    name: str
    module: nn.Module
    block: nn.Module | None = None
    blocks: tuple[nn.Module, ...] = ()
    channels: tuple[int, ...] = ()
    classes: int | None = None
    makes_result: bool = True

    def new_tuner(self, config: TunerConfig) -> Tuner:
        """A fresh tuner of this operation."""
        if self.name == "head":
            return Head(self.module, self.classes)
        if self.name == "layer":
            return (FullTuning if config.kind == FULL else ScaleAndShift)(self.module)
        if self.name == "conv":
            return LowRankConvolution(self.module, config.rank, config.proj_drop)
        if self.channels:
            return MapBypass(self.channels, config.length)
        return build_tuner(config, self.name, self.widths, self.module, self.makes_result)

    @property
    def attention(self) -> nn.Module | FrozenAttention | None:
        """The frozen attention that a tuner may use: the operation itself, or the block's attn1 for ff and block (our
        reading of Res-Tuning)."""
        if self.block is None:
            return None
        if isinstance(self.block, BasicTransformerBlock):
            return self.block.attn2 if self.name == "attn2" else self.block.attn1
        attn = self.block.attention
        return FrozenAttention(attn.num_attention_heads, attn.q_proj, attn.k_proj, attn.v_proj, (attn.o_proj,))

    @property
    def text_position(self) -> int | None:
        """The place of the text among the operation's arguments by position; None where it receives none."""
        if self.block is None or not isinstance(self.block, BasicTransformerBlock):
            return None
        return {"block": 2, "attn1": 1, "attn2": 1}.get(self.name)

    @property
    def receives_chunks(self) -> bool:
        """Whether the feed-forward receives the tokens in chunks, which diffusers' UNet can be told to do."""
        block = self.block
        return self.name == "ff" and getattr(block, "_chunk_size", None) is not None and block._chunk_dim == 1

    @property
    def widths(self) -> Widths:
        """The widths that the shapes of this operation's tuner depend on."""
        block, attn = self.block, self.attention
        if isinstance(attn, FrozenAttention):
            dim = attn.to_q.in_features
            return Widths(dim, attn.to_q.out_features, dim, dim, len(self.blocks))
        dim = block.norm1.normalized_shape[0] if hasattr(block.norm1, "normalized_shape") else block.dim
        with_text = block.attn2 if self.name == "block" and block.attn2 is not None else attn
        text_dim = dim if self.name == "ff" else with_text.cross_attention_dim
        return Widths(dim, attn.inner_dim, attn.cross_attention_dim, text_dim)


def is_vision_model(model: nn.Module) -> bool:
    """Whether the model is a vision transformer of transformers, to which tuners can be added."""
    return any(_is_vision_block(m) for m in model.modules())


def _is_vision_block(module: nn.Module) -> bool:
    return hasattr(getattr(module, "attention", None), "q_proj") and hasattr(module, "mlp")


def find_heads(model: nn.Module) -> dict[str, nn.Linear]:
    """The classification heads of a vision model, by their path; none in a UNet."""
    return {n: m for n, m in model.named_children() if n in _HEADS and isinstance(m, nn.Linear)}


def check_classifier(model: nn.Module, kind: str) -> None:
    """Raises ValueError, naming the kind of tuner, unless this is a vision transformer with a classification head."""
    if not is_vision_model(model) or not find_heads(model):
        raise ValueError(
            f"{kind} is for vision transformers with a classification head, such as ViTForImageClassification; found "
            f"{type(model).__name__}"
        )


def find_operations(model: nn.Module, config: TunerConfig, classes: int | None = None) -> dict[str, Operation]:
    """The operations that `config.ops` names, by their path in the model; for methods that change single layers all its
    layers; and the heads of a vision model, which are trained with every kind.

    For a vision model the default operations are attn1 and ff.

    Args:
        classes: number of classes of the heads; default: as many as the model's have.

    Raises:
        ValueError: if the model has no transformer block, or a block lacks a named operation, or the method is for
            vision models only.
    """
    heads = {path: Operation("head", module, classes=classes) for path, module in find_heads(model).items()}
    blocks = {p: m for p, m in model.named_modules() if isinstance(m, BasicTransformerBlock) or _is_vision_block(m)}
    vision = any(map(_is_vision_block, blocks.values()))
    if config.kind == "bypass" and hasattr(model, "up_blocks"):
        ends = (model.mid_block, *model.up_blocks)
        channels = tuple(block.resnets[-1].out_channels for block in ends)
        name = f"up_blocks.{len(model.up_blocks) - 1}"
        return {name: Operation("bypass", model.up_blocks[-1], None, tuple(model.up_blocks), channels)}
    if config.kind in (LINEAR, "bypass"):
        check_classifier(model, config.kind)
    if config.kind in (FULL, SSF):
        return {
            # a LoRA keeps the layer as its base_layer
            path.replace(".base_layer", ""): Operation("layer", module)
            for path, module in model.named_modules()
            if isinstance(module, FullTuning.LAYERS) and module.weight is not None and not ADAPTER_PATHS.search(path)
            and path not in heads
        } | heads  # fmt: skip
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no BasicTransformerBlock, to which a tuner could be added; expected the UNet "
            "of a Stable Diffusion 1.x or 2.x, or a vision transformer of transformers such as "
            "ViTForImageClassification or Dinov2ForImageClassification"
        )
    if config.kind == LINEAR:
        return heads
    if config.kind == "bypass":
        path, last = list(blocks.items())[-1]
        return {path: Operation("bypass", last, last, tuple(blocks.values()))} | heads
    ops = ["block"] if config.kind == "vpt" else config.ops
    if vision and ops == default_ops(config.kind):
        ops = [op for op in ops if op in _VISION_PARTS]
    found, lacking = {}, []
    for path, block in blocks.items():
        for op in (op for op in ops if op != "conv"):
            places = _places(block, op, kind_on(config, op))
            for name in places:
                module = _submodule(block, name)
                lacking += [f"{path}.{name}"] if module is None else []
                place = f"{path}.{name}".removesuffix(".")
                found[place] = Operation(op, module, block, makes_result=name == places[-1])
    if "conv" in ops:
        convolutions = {
            path.replace(".base_layer", ""): Operation("conv", module)
            for path, module in model.named_modules()
            if isinstance(module, nn.Conv2d) and not ADAPTER_PATHS.search(path)
            and path.replace(".base_layer", "").rpartition(".")[2] in _LORA_LAYERS["conv"]
        }  # fmt: skip
        found |= convolutions
        lacking += [] if convolutions else ["conv"]
    if lacking:
        raise ValueError(f"this model lacks the operations {', '.join(lacking)}; leave them out of ops")
    return found | heads


def _places(block: nn.Module, op: str, kind: str) -> tuple[str, ...]:
    """The paths within a block of what a tuner of this kind is beside; "" is the block itself."""
    vision = _is_vision_block(block)
    if kind == RES_ATTN_LAYER:
        return (_VISION_LINEAR_LAYERS if vision else LINEAR_LAYERS).get(op, (op,))
    return ("",) if op == "block" else (_VISION_PARTS.get(op, op) if vision else op,)


def _submodule(block: nn.Module, path: str) -> nn.Module | None:
    """The module at this path, within the LoRA that may have wrapped it; None where there is none."""
    try:
        module = block.get_submodule(path)
    except AttributeError:
        return None
    return getattr(module, "base_layer", module)


# The layers of an operation that LoRA and its relatives are on; of a vision transformer's attention q and v, as in the
# comparisons of NOAH and Res-Tuning. "conv" is what LoCon adds to LoRA (LyCORIS, arXiv 2309.14859).
_LORA_LAYERS = {
    **LINEAR_LAYERS,
    "conv": ("conv1", "conv2", "conv_shortcut", "proj_in", "proj_out"),
}
_VISION_LINEAR_LAYERS = {
    "attn1": tuple(f"attention.{name}_proj" for name in "qkvo"),
    "ff": ("mlp.fc1", "mlp.fc2"),
}
_VISION_LORA_LAYERS = _VISION_LINEAR_LAYERS | {"attn1": ("attention.q_proj", "attention.v_proj")}


def lora_layer_names(model: nn.Module, config: TunerConfig) -> list[str]:
    """The ends of the paths of all layers that a LoRA of this configuration is on.

    Raises:
        ValueError: if a vision model lacks an operation.
    """
    if not is_vision_model(model):
        return [name for op in config.ops for name in _LORA_LAYERS[op]]
    ops = config.ops if config.ops != default_ops(config.kind) else ["attn1", "ff"]
    lacking = [op for op in ops if op not in _VISION_LORA_LAYERS]
    if lacking:
        raise ValueError(
            f"a {config.kind} on a vision model can be on attn1 and ff, not on {', '.join(lacking)}; leave that out"
        )
    return [name for op in ops for name in _VISION_LORA_LAYERS[op]]
