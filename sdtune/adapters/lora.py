"""LoRA and DoRA, through PEFT, on the layers of the same operations; the functions are those of `inject`.

Their files are read by diffusers (`pipe.load_lora_weights`) and carry our metadata.
"""

import torch
from peft import LoraConfig
from torch import nn

from ..tuners.config import TunerConfig

# The layers of an operation, as diffusers names them. "conv" is what LoCon adds to LoRA (LyCORIS, arXiv 2309.14859).
LAYERS = {
    "attn1": ("to_q", "to_k", "to_v", "to_out.0"),
    "attn2": ("to_q", "to_k", "to_v", "to_out.0"),
    "ff": ("net.0.proj", "net.2"),
    "conv": ("conv1", "conv2", "conv_shortcut", "proj_in", "proj_out"),
}


def _layer_names(config: TunerConfig) -> list[str]:
    """The ends of the paths of all layers that an adapter of this configuration is on."""
    return [layer if op == "conv" else f"{op}.{layer}" for op in config.ops for layer in LAYERS[op]]


def add_adapter(unet, config: TunerConfig, name: str, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Adds a LoRA or DoRA of `config.rank` (alpha equal to it) on every layer of `config.ops`, and activates it.

    Fresh weights start as in diffusers' training scripts, A Gaussian and B zero; the keys of
    `tensors` are those of `adapter_parameters`.
    """
    if tensors is None:
        lora = LoraConfig(
            r=config.rank, lora_alpha=config.rank, init_lora_weights="gaussian", target_modules=_layer_names(config),
            use_dora=config.kind == "dora",
        )  # fmt: skip
        unet.add_adapter(lora, adapter_name=name)
    else:
        unet.load_lora_adapter({f"unet.{k}": t for k, t in tensors.items()}, prefix="unet", adapter_name=name)
    unet.peft_config[name].tuner = config


def expected_shapes(unet, config: TunerConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that an adapter of this configuration has on this UNet, by its key, and its shape."""
    ends, shapes = tuple(f".{name}" for name in _layer_names(config)), {}
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
    """The adapter's parameters under the keys that diffusers saves: "<layer path>.lora_A.weight" and so on."""
    found = {}
    for key, parameter in unet.named_parameters():
        path, _, rest = key.partition(".lora_")
        parts = rest.split(".")
        if parts[1:2] == [name]:
            del parts[1]
            key = f"{path}.lora_{'.'.join(parts)}"
            found[key.removesuffix(".weight") if "magnitude" in key else key] = parameter
    return found


def remove_adapter(unet, name: str, pipe=None) -> None:
    """Removes the adapter; the UNet's own layers return when no other adapter is left."""
    (pipe or unet).delete_adapters(name)
    if not getattr(unet, "peft_config", None):
        unet.unload_lora()
