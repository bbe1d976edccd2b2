"""LoRA and its relatives, through PEFT, on the layers of the same operations; the functions are those of `inject`.

Their files are read by diffusers (`pipe.load_lora_weights`) and carry our metadata. As rows of comparisons there are
LoKr (arXiv 2309.14859), and for vision models OFT (arXiv 2306.07280) and IA3 (arXiv 2205.05638). OFT by PEFT 0.21
cannot be used in a UNet: `set_scale` fails, and before a 3x3 convolution it adds up patches where they overlap.
"""

import re

import torch
from peft import IA3Config, LoKrConfig, LoraConfig, OFTConfig, PeftConfig
from peft.tuners.lycoris_utils import LycorisLayer
from torch import nn

from ..tuners.config import LORAS, TunerConfig
from . import inject
from .operations import CHILD_NAME, Operation, find_heads, is_vision_model, lora_layer_names

_PARAMETER = re.compile(r"(.*?)\.((?:lora|oft|lokr|ia3)_.*)")


def _peft_config(model, config: TunerConfig) -> PeftConfig:
    """PEFT's configuration for this kind, with the defaults of PEFT except for the rank, and alpha equal to it."""
    layers = lora_layer_names(model, config)
    if config.kind in LORAS:
        # fresh weights start as in diffusers' training scripts, A Gaussian and B zero
        return LoraConfig(
            r=config.rank, lora_alpha=config.rank, init_lora_weights="gaussian", target_modules=layers,
            use_dora=config.kind == "dora",
        )  # fmt: skip
    if config.kind != "lokr" and not is_vision_model(model):
        raise ValueError(f"{config.kind} is for vision transformers only; found {type(model).__name__}")
    if config.kind == "oft":
        return OFTConfig(r=0, oft_block_size=2 * config.rank, target_modules=layers)  # a block must divide the width
    if config.kind == "lokr":
        return LoKrConfig(r=config.rank, alpha=config.rank, target_modules=layers)
    return IA3Config(target_modules=layers, feedforward_modules=[n for n in layers if n.endswith("fc2")])


def _heads(model, classes: int | None = None) -> dict[str, Operation]:
    return {path: Operation("head", module, classes=classes) for path, module in find_heads(model).items()}


def add_adapter(unet, config: TunerConfig, name: str, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Adds a LoRA or DoRA of `config.rank` (alpha equal to it) on every layer of `config.ops`, and activates it; to a
    vision model also the other methods of PEFT, and a head that is trained with it.

    The keys of `tensors` are those of `adapter_parameters`.
    """
    if tensors is not None and config.kind in LORAS and not is_vision_model(unet):
        unet.load_lora_adapter({f"unet.{k}": t for k, t in tensors.items()}, prefix="unet", adapter_name=name)
    else:
        unet.add_adapter(_peft_config(unet, config), adapter_name=name)
        show_groups(unet)
        inject.add_to_operations(unet, _heads(unet, inject.count_classes(tensors)), config, name, tensors)
        if tensors is not None:
            for key, parameter in adapter_parameters(unet, name).items():
                parameter.data.copy_(tensors[key])
        if is_vision_model(unet):
            inject.activate(unet, name)
    unet.peft_config[name].tuner = config


def show_groups(model) -> None:
    """Gives PEFT's LoHa and LoKr layers of convolutions the attribute `groups`, for which its LoRA layers ask them."""
    for layer in model.modules():
        if isinstance(layer, LycorisLayer) and isinstance(layer.get_base_layer(), nn.Conv2d):
            layer.groups = layer.get_base_layer().groups


def expected_shapes(unet, config: TunerConfig, classes: int | None = None) -> dict[str, tuple[int, ...]]:
    """Every tensor that an adapter of this configuration has on this model, by its key, and its shape.

    Args:
        classes: number of classes of a vision model's head; default: as many as the model's own.
    """
    shapes = inject.shapes_of(_heads(unet, classes), config)
    if config.kind not in LORAS:
        peft_config = _peft_config(unet, config)
        with torch.device("meta"):
            # PEFT knows the shapes of its methods only once they are added
            twin = type(unet)(unet.config) if is_vision_model(unet) else type(unet).from_config(unet.config)
            twin.add_adapter(peft_config, adapter_name="twin")
        return {k: tuple(p.shape) for k, p in adapter_parameters(twin, "twin").items()} | shapes
    ends = tuple(f".{name}" for name in lora_layer_names(unet, config))
    for path, layer in unet.named_modules():
        if not path.endswith(ends) or not hasattr(layer, "weight"):
            continue
        out, into, *kernel = layer.weight.shape
        shapes[f"{path}.lora_A.weight"] = (config.rank, into, *kernel)
        shapes[f"{path}.lora_B.weight"] = (out, config.rank, *[1] * len(kernel))
        if config.kind == "dora":
            shapes[f"{path}.lora_magnitude_vector"] = (1, out, 1, 1) if kernel else (out,)
    return shapes


def adapter_parameters(unet, name: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters under the keys that diffusers saves, "<layer path>.lora_A.weight" and so on; and those
    of its head."""
    found = inject.adapter_parameters(unet, name)
    for key, parameter in unet.named_parameters():
        match = _PARAMETER.fullmatch(key)
        parts = match[2].split(".") if match and f".{CHILD_NAME}." not in key else []
        if parts[1:2] == [name]:
            del parts[1]
            key = f"{match[1]}.{'.'.join(parts)}"
            found[key.removesuffix(".weight") if "magnitude" in key else key] = parameter
    return found


def remove_adapter(unet, name: str, pipe=None) -> None:
    """Removes the adapter; the model's own layers return when no other adapter is left."""
    if is_vision_model(unet):
        inject.remove_adapter(unet, name)
        return
    (pipe or unet).delete_adapters(name)
    if not getattr(unet, "peft_config", None):
        unet.unload_lora()
