"""Adds tuners to the operations of a UNet, in parallel, so that diffusers treats them as adapters.

A forward hook on the operation (`hook.add_residual`) adds `scale * tuner(x)` to its result. Nothing is wrapped or
renamed, so every key of the base stays as it was. The layer that holds the tuners of an operation is a PEFT
`BaseTunerLayer`, and the UNet's `peft_config` has the adapter's name. With these, diffusers' `set_adapters`,
`disable_adapters`, `enable_adapters`, `delete_adapters`, weights per block and `cross_attention_kwargs={"scale": s}`
work on a tuner as on a LoRA, and on mixtures of the two.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..tuners.config import TunerConfig
from .diffusers_guards import fuse_lora, load_lora_adapter, set_adapters, unload_lora
from .hook import (
    INPUT_NAME,
    ParallelTuners,
    add_residual,
    insert_prompts,
    keep_input,
    replace_head,
    tuner_layers,
    tuner_names,
)
from .operations import CHILD_NAME, Operation, find_operations, is_vision_model
from .peft_config import ResAttnConfig

_HOOKS, _PRE_HOOKS = (add_residual, replace_head), (insert_prompts, keep_input)


def expected_shapes(unet, config: TunerConfig, classes: int | None = None) -> dict[str, tuple[int, ...]]:
    """Every tensor that a tuner of this configuration has on this model: "<op path>.<parameter>" -> shape.

    Args:
        classes: number of classes of a vision model's head; default: as many as the model's own.
    """
    return shapes_of(find_operations(unet, config, classes), config)


def shapes_of(ops: dict[str, Operation], config: TunerConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of the tuners of these operations: "<op path>.<parameter>" -> shape."""
    with torch.device("meta"):
        return {
            f"{path}.{name}": tuple(p.shape)
            for path, op in ops.items()
            for name, p in op.new_tuner(config).named_parameters()
        }


def check_new_name(taken: Mapping[str, object], name: str) -> None:
    """Raises ValueError unless `name` can name a new adapter beside those that are there."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"adapter_name is {name!r}; it must be a non-empty string without a dot")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"adapter_name is {name!r}, a word that PyTorch reserves; choose another name")
    if name in taken:
        raise ValueError(
            f"adapter_name {name!r} is already in use; present: {', '.join(taken)}. "
            "Choose another name, or unload the old one first"
        )


def add_adapter(unet, config: TunerConfig, name: str, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Adds a tuner to `unet` as adapter `name`, fresh or with the weights `tensors`, and makes it the active adapter.

    Fresh weights are drawn from torch's global generator on the CPU. The tuner is put on the device of its operation
    and into the dtype of the UNet. Other adapters stay attached but inactive, as when a LoRA is loaded.

    Raises:
        ValueError: if the name is in use, the model lacks the operations, or its weights are offloaded. Nothing is
            changed then.
    """
    check_new_name(getattr(unet, "peft_config", None) or {}, name)
    add_to_operations(unet, find_operations(unet, config, count_classes(tensors)), config, name, tensors)
    unet.peft_config[name] = ResAttnConfig(**asdict(config))
    if not is_vision_model(unet):
        unet.fuse_lora = partial(fuse_lora, unet)  # unlike a method, a partial can be pickled
        unet.load_lora_adapter = partial(load_lora_adapter, unet)
        unet.unload_lora, unet.set_adapters = partial(unload_lora, unet), partial(set_adapters, unet)
    activate(unet, name)


def count_classes(tensors: dict[str, torch.Tensor] | None) -> int | None:
    """The number of classes of the head in a file; None where there is no head in it."""
    return next((len(t) for k, t in (tensors or {}).items() if k.endswith("classifier.bias")), None)


def add_to_operations(
    unet, ops: dict[str, Operation], config: TunerConfig, name: str, tensors: dict[str, torch.Tensor] | None
) -> None:
    """Adds a tuner to each of these operations, as `add_adapter` does, without activating it."""
    tuners = {}
    for path, op in ops.items():
        device = next(op.module.parameters()).device
        if device.type == "meta" and any(hasattr(m, "_hf_hook") for m in op.module.modules()):
            raise ValueError(
                "this UNet's weights are offloaded; pass the pipeline, or remove its offloading hooks first"
            )
        if tensors is None:
            tuner = op.new_tuner(config)
        else:
            with torch.device("meta"):
                tuner = op.new_tuner(config)
            own = {n: tensors[f"{path}.{n}"] for n, _ in tuner.named_parameters()}
            tuner.load_state_dict(own, assign=True)
        tuners[path] = tuner.to(device, unet.dtype).train(op.module.training)

    if getattr(unet, "peft_config", None) is None:
        unet.peft_config = {}
    unet._hf_peft_config_loaded = True
    for path, op in ops.items():
        if op.module._modules.get(CHILD_NAME) is None:
            setattr(op.module, CHILD_NAME, ParallelTuners(op))
        _register_hooks(op)
        layer = getattr(op.module, CHILD_NAME)
        if op.blocks:  # a bypass beside other tuners of the last block
            layer.operation = op
        layer.tuners[name], layer.weights[name] = tuners[path], 1.0
    for _, layer in tuner_layers(unet):  # also those that are left over from deleted adapters
        layer.unet_adapters = unet.peft_config


def _register_hooks(op: Operation) -> None:
    """Registers the hooks of an operation, each once for a module."""
    hook = replace_head if op.name == "head" else add_residual
    if not any(h is hook for h in op.module._forward_hooks.values()):
        op.module.register_forward_hook(hook, with_kwargs=True)
    pre = {"block": [(op.module, insert_prompts)], "bypass": [(block, keep_input) for block in op.blocks]}
    for module, hook in pre.get(op.name, []):
        if not any(h is hook for h in module._forward_pre_hooks.values()):
            module.register_forward_pre_hook(hook, with_kwargs=True)


def activate(unet, name: str) -> None:
    """Makes the adapter the only active one."""
    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter([name])
            module.enable_adapters(True)
    _forget_compiled_code()


def adapter_parameters(unet, name: str) -> dict[str, nn.Parameter]:
    """The tuner's parameters, keyed "<op path>.<parameter>" as in its file."""
    return {
        f"{path}.{n}": p
        for path, layer in tuner_layers(unet)
        if name in layer.tuners
        for n, p in layer.tuners[name].named_parameters()
    }


def remove_adapter(unet, name: str, pipe=None) -> None:
    """Removes the tuner `name`; after the last one the UNet is as it was before any was added.

    Args:
        pipe: the UNet's pipeline, if there is one; then adapters in its text encoder are updated, too.
    """
    if is_vision_model(unet):
        _delete_from_vision_model(unet, name)
    else:
        (pipe or unet).delete_adapters(name)
    for _, layer in tuner_layers(unet):
        if not layer.tuners:
            op = layer.operation
            delattr(op.module, CHILD_NAME)
            for module in {op.module, *op.blocks}:
                _remove_hooks(module)
                module.__dict__.pop(INPUT_NAME, None)
    _forget_compiled_code()
    if not tuner_names(unet):
        for name in ("fuse_lora", "load_lora_adapter", "unload_lora", "set_adapters"):
            unet.__dict__.pop(name, None)


def _remove_hooks(module: nn.Module) -> None:
    for hooks, with_kwargs, ours in (
        (module._forward_hooks, module._forward_hooks_with_kwargs, _HOOKS),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, _PRE_HOOKS),
    ):
        for key in [k for k, hook in hooks.items() if hook in ours]:
            del hooks[key], with_kwargs[key]


def _delete_from_vision_model(model, name: str) -> None:
    """Deletes an adapter; layers that PEFT has wrapped return when no other adapter is left on them.

    transformers' own `delete_adapter` knows the methods of PEFT only, and leaves the wrapped layers.
    """
    active = [n for n in model.active_adapters() if n != name] or [n for n in model.peft_config if n != name][:1]
    for path, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.delete_adapter(name)
            layer.set_adapter(active)
            if not isinstance(layer, ParallelTuners) and not layer._get_available_adapters():
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config[name]
    if not model.peft_config:
        del model.peft_config
        model._hf_peft_config_loaded = False


def _forget_compiled_code() -> None:
    """Makes torch.compile compile again what it has compiled: it does not notice hooks that come or go."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
