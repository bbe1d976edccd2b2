"""LoRA, Adapter and VPT together, as NOAH composes them (Zhang et al., arXiv 2206.04673).

NOAH finds the width of each part in each layer by an evolutionary search over a supernet. Here widths are given, the
same in every layer: `rank` for LoRA on q and v, `length` for the Adapter behind the feed-forward and for the tokens.
The functions are those of `inject`.
"""

from dataclasses import asdict, replace

import torch
from torch import nn

from ..tuners.config import TunerConfig
from . import inject, lora
from .operations import check_classifier, find_operations
from .peft_config import ResAttnConfig


def _parts(config: TunerConfig) -> tuple[TunerConfig, list[TunerConfig]]:
    """The LoRA, and the tuners beside it."""
    plain = replace(config, kind="lora", ops=["attn1"])
    return plain, [replace(config, kind="adapter", ops=["ff"]), replace(config, kind="vpt")]


def add_adapter(model, config: TunerConfig, name: str, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Adds all parts under one name to a vision model, with one head, and activates them.

    Raises:
        ValueError: if it is no vision model with a head.
    """
    plain, others = _parts(config)
    inject.check_new_name(getattr(model, "peft_config", None) or {}, name)
    check_classifier(model, config.kind)
    operations = [_without_heads(find_operations(model, part)) for part in others]
    lora.add_adapter(model, plain, name, tensors)
    for part, ops in zip(others, operations):
        inject.add_to_operations(model, ops, part, name, tensors)
    model.peft_config[name] = ResAttnConfig(**asdict(config))
    inject.activate(model, name)


def _without_heads(ops: dict) -> dict:
    return {path: op for path, op in ops.items() if op.name != "head"}


def expected_shapes(model, config: TunerConfig, classes: int | None = None) -> dict[str, tuple[int, ...]]:
    """Every tensor of all parts and of the head: its key -> its shape."""
    check_classifier(model, config.kind)
    plain, others = _parts(config)
    found = lora.expected_shapes(model, plain, classes)
    for part in others:
        found |= inject.shapes_of(_without_heads(find_operations(model, part)), part)
    return found


def adapter_parameters(model, name: str) -> dict[str, nn.Parameter]:
    """The parameters of all parts and of the head."""
    return lora.adapter_parameters(model, name)


def remove_adapter(model, name: str, pipe=None) -> None:
    """Removes all parts."""
    inject.remove_adapter(model, name)
