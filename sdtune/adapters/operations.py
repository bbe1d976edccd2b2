"""Finds the operations of a UNet that a tuner can be added to: attention, feed-forward, and the whole block."""

import re
from dataclasses import dataclass

from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from ..tuners.base import Tuner, Widths
from ..tuners.config import FULL, TunerConfig, build_tuner
from ..tuners.full import FullTuning

CHILD_NAME = "res_tuner"  # the name of the layer of tuners inside its operation
ADAPTER_PATHS = re.compile(rf"(^|\.)(lora_\w+|{CHILD_NAME})(\.|$)")  # matches paths inside adapters


@dataclass(frozen=True)
class Operation:
    """A frozen operation of a UNet. As a dataclass it can be an attribute of a module without becoming a submodule.

    Attributes:
        name: one of `tuners.TUNER_OPS`; "layer" for full fine-tuning, which changes single layers.
        module: the frozen operation itself.
        block: the transformer block that contains it, or that it is; None for a single layer.
    """

    name: str
    module: nn.Module
    block: BasicTransformerBlock | None = None

    def new_tuner(self, config: TunerConfig) -> Tuner:
        """A fresh tuner of this operation."""
        return FullTuning(self.module) if config.kind == FULL else build_tuner(config, self.name, self.widths)

    @property
    def attention(self) -> nn.Module | None:
        """The frozen attention that a tuner may use: the operation itself, or the block's attn1 for ff and block (our
        reading of Res-Tuning)."""
        return self.block and (self.block.attn2 if self.name == "attn2" else self.block.attn1)

    @property
    def widths(self) -> Widths:
        """The widths that the shapes of this operation's tuner depend on."""
        block, attn = self.block, self.attention
        dim = block.norm1.normalized_shape[0] if hasattr(block.norm1, "normalized_shape") else block.dim
        with_text = block.attn2 if self.name == "block" and block.attn2 is not None else attn
        text_dim = dim if self.name == "ff" else with_text.cross_attention_dim
        return Widths(dim, attn.inner_dim, attn.cross_attention_dim, text_dim)


def find_operations(unet, config: TunerConfig) -> dict[str, Operation]:
    """The operations that `config.ops` names, by their path in the UNet; for full fine-tuning all its layers.

    Raises:
        ValueError: if the model has no transformer block, or a block lacks a named operation.
    """
    if config.kind == FULL:
        return {
            # a LoRA keeps the layer as its base_layer
            path.replace(".base_layer", ""): Operation("layer", module)
            for path, module in unet.named_modules()
            if isinstance(module, FullTuning.LAYERS) and module.weight is not None and not ADAPTER_PATHS.search(path)
        }
    found, lacking = {}, []
    for path, block in unet.named_modules():
        if not isinstance(block, BasicTransformerBlock):
            continue
        for op in config.ops:
            module = block if op == "block" else getattr(block, op, None)
            if module is None:
                lacking.append(f"{path}.{op}")
            found[path if op == "block" else f"{path}.{op}"] = Operation(op, module, block)
    if not found:
        raise ValueError(
            f"{type(unet).__name__} has no BasicTransformerBlock, to which a tuner could be added; expected the UNet "
            "of a Stable Diffusion 1.x or 2.x"
        )
    if lacking:
        raise ValueError(f"this UNet lacks the operations {', '.join(lacking)}; leave them out of ops")
    return found
