"""OFT files of PEFT (Qiu et al., arXiv 2306.07280): each layer's input is rotated, in blocks of its channels.

PEFT's layers have no weight: 0.5 would silently be 1. Here a weight w stands for (1 - w) x + w R x, as in LyCORIS.
The OFT of LyCORIS rotates the outputs of a layer instead, by another formula, and is not read.
"""

import json
import warnings
from pathlib import Path

import torch
from peft import OFTConfig
from peft.tuners.oft import layer as oft
from torch import nn

from .tuner_file import TunerFileError

_CONFIG = "adapter_config.json"
_OLDEST = (0, 18)  # the PEFT from which on the rotation is computed as today


def block_size(elements: int) -> int | None:
    """The side b of the skew-symmetric blocks that have b * (b - 1) / 2 elements; None if there is none."""
    side = round((1 + (1 + 8 * elements) ** 0.5) / 2)
    return side if side * (side - 1) == 2 * elements else None


def read_config(path: Path) -> dict:
    """What PEFT's configuration beside a file says about how it rotates.

    Raises:
        TunerFileError: if there is none, or it is of another method or of a PEFT that rotated otherwise.
    """
    config_path = path.with_name(_CONFIG)
    try:
        values = json.loads(config_path.read_text(encoding="utf-8"))
        kind, version = values["peft_type"], str(values.get("peft_version", "0.0"))
        terms = values.get("num_cayley_neumann_terms", OFTConfig.num_cayley_neumann_terms)
        config = {"use_cayley_neumann": bool(values["use_cayley_neumann"]), "num_cayley_neumann_terms": int(terms),
                  "coft": bool(values["coft"]), "eps": float(values["eps"]),
                  "block_share": bool(values["block_share"])}  # fmt: skip
        release = tuple(int(part) for part in version.split(".")[:2])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TunerFileError(
            f"{path} is an OFT of PEFT, whose {_CONFIG} beside it cannot be used ({type(error).__name__}: {error}); it "
            "says how the layers are rotated, so put the one that was saved with the file there"
        ) from error
    if kind != "OFT" or config["use_cayley_neumann"] and release < _OLDEST:
        raise TunerFileError(
            f"{config_path} is of {kind} and PEFT {version}; expected OFT, with use_cayley_neumann of PEFT 0.18 or "
            "newer, which rotates otherwise than those before it; train it again with a newer PEFT"
        )
    return config


def find_problems(shape: tuple[int, ...], wide: tuple[int, ...] | None, config: dict) -> list[str]:
    """What keeps a tensor of a file from being the rotation of a layer with weights of shape `wide`, if that is known.

    A rotation is (blocks, elements of a block); with block_share it is one block for all.
    """
    side = block_size(shape[1]) if len(shape) == 2 else None
    if side is None:
        return [f"has a rotation of shape {list(shape)}, which is none of square blocks"]
    if wide is None:
        return []
    if any(size > 1 for size in wide[2:]):
        return ["is a convolution of more than one pixel, where PEFT adds up overlapping patches"]
    width = side if config["block_share"] and len(wide) > 1 and wide[1] % side == 0 else wide[1]
    return (
        [] if shape[0] * side == width else [f"is rotated in {shape[0]} blocks of {side}, this base's is {width} wide"]
    )


def add(model: nn.Module, name: str, config: dict, weights: dict[str, torch.Tensor]) -> None:
    """Adds PEFT's OFT layers, whose weight can be set, and gives them the file's weights.

    Args:
        config: from `read_config`.
        weights: path of a layer -> (blocks, elements of a block).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # 2 divides not every width; the blocks are replaced anyway
        model.add_adapter(OFTConfig(r=0, oft_block_size=2, target_modules=list(weights), **config), adapter_name=name)
    for path, value in weights.items():
        layer = model.get_submodule(path)
        base = layer.get_base_layer()
        if not hasattr(layer, "scaling"):
            layer.__class__, layer.scaling = _CLASSES[type(layer)], {}
        side, width = block_size(value.shape[1]), base.weight[0].numel()
        rotation = _WeightedRotation(
            len(value), value.shape[1], side, width, kernel_size=getattr(base, "kernel_size", (0, 0)), **config
        )
        rotation.weight = nn.Parameter(value.to(base.weight.device, base.weight.dtype), requires_grad=False)
        rotation.to(base.weight.device)
        rotation.scaling, rotation.name = layer.scaling, name
        layer.oft_R[name], layer.scaling[name] = rotation, 1.0
        layer.r[name], layer.oft_block_size[name] = width // side, side


class _WeightedRotation(oft.OFTRotationModule):
    """PEFT's rotation with a weight, which it reads from the `scaling` of its layer."""

    def forward(self, x):
        weight, rotated = self.scaling[self.name], super().forward(x)
        return rotated if weight == 1 else torch.lerp(x, rotated, weight)

    def get_weight(self):  # with which PEFT fuses
        rotation = super().get_weight()
        return torch.lerp(torch.eye(len(rotation)).to(rotation), rotation, self.scaling[self.name])


class _WithWeight:
    """The methods with which PEFT and diffusers set the weight of an adapter, for a layer of PEFT's OFT."""

    def set_scale(self, adapter, scale):
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale):
        for name in self.scaling.keys() & set(self.active_adapters):
            self.scaling[name] *= scale

    def unscale_layer(self, scale=None):
        for name in self.scaling.keys() & set(self.active_adapters):
            self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    def delete_adapter(self, adapter_name):
        super().delete_adapter(adapter_name)
        self.scaling.pop(adapter_name, None)


class OFTLinear(_WithWeight, oft.Linear):
    pass


class OFTConv2d(_WithWeight, oft.Conv2d):
    pass


_CLASSES = {oft.Linear: OFTLinear, oft.Conv2d: OFTConv2d}
