"""Adds a tuner to a UNet of ComfyUI, or of Forge, whose `UnetPatcher` has the same methods: x' = OP(x) + tuner(x).

Attention is patched through ComfyUI's patches of its input and its output, which run also where another node replaces
the attention itself (as IP-Adapter nodes do). The feed-forward, the whole block and convolutions have no such patch:
there `forward` is replaced by an object patch that calls the one before it, so tuners stack and weights keep their
names.
Nothing of the model is changed; ComfyUI applies the patches when it draws and takes them back afterwards.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import nn

from sdtune.adapters import tuner_file
from sdtune.tuners import KINDS, Context, LowRankConvolution, Tuner, TunerConfig, Widths, build_tuner
from sdtune.tuners.config import LINEAR_LAYERS, RES_ATTN_LAYER, kind_on

_LAYER = re.compile(r"(input|middle|output)_blocks?\.(\d+)(?:\.\d+)?")  # a residual block or a spatial transformer
_CONVOLUTIONS = {
    "in_layers.2": "conv1", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
    "proj_in": "proj_in", "proj_out": "proj_out",
}  # fmt: skip
_count = itertools.count()


@dataclass(frozen=True)
class Block:
    """A transformer block of a ComfyUI UNet.

    Attributes:
        path: its path in the UNet, for example "input_blocks.1.1.transformer_blocks.0".
        place: what patches receive to tell blocks apart: ("input", number, index), "middle" or "output".
        module: the block.
    """

    path: str
    place: tuple[str, int, int]
    module: nn.Module


def find_blocks(unet: nn.Module) -> dict[str, Block]:
    """The transformer blocks of a ComfyUI UNet by their path in diffusers' UNet, by which tuner files name them.

    Raises:
        ValueError: if this is not a UNet of Stable Diffusion 1.x or 2.x.
    """
    found = {}
    for path, place, parent, layer in _find_layers(unet):
        for index, module in enumerate(getattr(layer, "transformer_blocks", [])):
            own = f"transformer_blocks.{index}"
            found[f"{parent}.{own}"] = Block(f"{path}.{own}", (*place, index), module)
    if not found:
        raise ValueError(
            f"{type(unet).__name__} has no transformer block that a tuner can be added to; expected the UNet of a "
            "Stable Diffusion 1.x or 2.x checkpoint"
        )
    return found


def find_convolutions(unet: nn.Module) -> dict[str, tuple[str, nn.Conv2d]]:
    """The convolutions that a tuner can be beside, by their path in diffusers' UNet: (path here, module)."""
    found = {}
    for path, _, parent, layer in _find_layers(unet):
        inner = dict(layer.named_modules())
        for own, name in _CONVOLUTIONS.items():
            module = inner.get(own)
            if isinstance(module, nn.Conv2d):
                found[f"{parent}.{name}"] = f"{path}.{own}", module
    return found


def _find_layers(unet: nn.Module) -> Iterator[tuple[str, tuple[str, int], str, nn.Module]]:
    """Residual blocks and spatial transformers: path, ("input", number), path in diffusers' UNet, module."""
    # a level ends with a layer that halves or doubles the side; a model without levels is no UNet
    sizes = [n + 1 for n in getattr(unet, "num_res_blocks", ())]
    counts = Counter()
    for path, module in unet.named_modules():
        match = _LAYER.fullmatch(path)
        part = "attentions" if hasattr(module, "transformer_blocks") else "resnets"
        if not match or part == "resnets" and not hasattr(module, "in_layers"):
            continue
        side, number = match[1], int(match[2])
        if side == "middle":
            parent, number = f"mid_block.{part}.{counts[part]}", 0
            counts[part] += 1
        elif side == "input":  # input_blocks.0 is the first convolution
            level, position = _level_and_position(number - 1, sizes)
            parent = f"down_blocks.{level}.{part}.{position}"
        else:
            level, position = _level_and_position(number, sizes[::-1])
            parent = f"up_blocks.{level}.{part}.{position}"
        yield path, (side, number), parent, module


def _level_and_position(number: int, sizes: list[int]) -> tuple[int, int]:
    for level, size in enumerate(sizes):
        if number < size:
            return level, number
        number -= size
    raise ValueError(f"the UNet has more blocks than its num_res_blocks says; {number} are left over")


def _widths(block: nn.Module, op: str) -> Widths:
    """The widths that the shapes of a tuner of this operation depend on."""
    attn, dim = _attention(block, op), block.norm1.normalized_shape[0]
    with_text = block.attn2 if op == "block" else attn
    text_dim = dim if op == "ff" else with_text.to_k.in_features
    return Widths(dim, attn.to_q.out_features, attn.to_k.in_features, text_dim)


def _attention(block: nn.Module, op: str) -> nn.Module:
    """The frozen attention that a tuner of this operation may use."""
    return block.attn2 if op == "attn2" else block.attn1


class PlacedTuner:
    """A tuner of one operation, whose weights follow the device and dtype of what it is called with.

    Args:
        tuner: with the weights of the file.
        attention: the frozen attention, for the kinds that call it.
    """

    def __init__(self, tuner: Tuner, attention: nn.Module | None):
        self.tuner, self.attention = tuner.eval().requires_grad_(False), attention
        self.state = tuner.state_dict()  # as in the file, so that a detour through a short dtype loses nothing

    def __call__(self, x: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        """x: (B, N, dim), or of a convolution (B, C, H, W), text: (B, L, text width) or None -> the tuner's result."""
        now = next(self.tuner.parameters())
        if (now.device, now.dtype) != (x.device, x.dtype):
            moved = {name: tensor.to(x.device, x.dtype) for name, tensor in self.state.items()}
            self.tuner.load_state_dict(moved, assign=True)
        return self.tuner(x, Context(self.attention, text))


def place_tuners(unet: nn.Module, file: tuner_file.TunerFile, source: str) -> dict[tuple[str, str], PlacedTuner]:
    """The tuners of a file, keyed by (path in diffusers' UNet of the block, or of the convolution, operation or layer).

    Raises:
        TunerFileError: if the file does not fit the UNet, or holds a LoRA, a DoRA or a full fine-tuning.
    """
    config: TunerConfig = file.config
    if config.kind not in KINDS:
        advice = {
            "lora": "load it with ComfyUI's own Load LoRA node, or Forge's <lora:...>",
            "dora": "write it in kohya's key names with `python -m sdtune.adapters.export FILE --to kohya`, and load "
            "that with the Load LoRA node, or Forge's <lora:...>",
        }
        raise tuner_file.TunerFileError(
            f"{source} holds a {config.kind}; " + advice.get(config.kind, "only diffusers can load it, with sdtune")
        )
    blocks, convolutions = find_blocks(unet), find_convolutions(unet)
    tuners = {}  # by path and operation: its prefix in the file, the tuner, the frozen attention that it may use
    with torch.device("meta"):
        for path, block in blocks.items():
            for op in config.ops:
                if kind_on(config, op) == RES_ATTN_LAYER:
                    for name in (names := LINEAR_LAYERS[op]):
                        layer = block.module.get_submodule(name)
                        tuner = build_tuner(config, op, _widths(block.module, op), layer, name == names[-1])
                        tuners[path, name] = f"{path}.{name}", tuner, None
                elif op != "conv":
                    tuner = build_tuner(config, op, _widths(block.module, op))
                    prefix = path if op == "block" else f"{path}.{op}"
                    tuners[path, op] = prefix, tuner, _attention(block.module, op)
        if "conv" in config.ops:
            for path, (_, module) in convolutions.items():
                tuners[path, "conv"] = path, LowRankConvolution(module, config.rank), None
    tuner_file.check_fits(
        file,
        {f"{prefix}.{n}": tuple(p.shape) for prefix, tuner, _ in tuners.values() for n, p in tuner.named_parameters()},
        source,
    )
    placed = {}
    for key, (prefix, tuner, attn) in tuners.items():
        own = {name: file.tensors[f"{prefix}.{name}"] for name, _ in tuner.named_parameters()}
        tuner.load_state_dict(own, assign=True)
        placed[key] = PlacedTuner(tuner, attn)
    return placed


def add_tuner(model, file: tuner_file.TunerFile, strength: float = 1.0, source: str = "this file"):
    """A clone of a model to which the tuner is added.

    Args:
        model: ComfyUI's `ModelPatcher`, or Forge's `UnetPatcher`. It may have other patches, tuners and LoRAs.
        file: what `tuner_file.load` has read.
        strength: factor of the tuner's result; 1 is as trained.
        source: the file's name, for messages.

    Raises:
        TunerFileError: if the file does not fit this model.
    """
    model = model.clone()
    unet = model.model.diffusion_model
    blocks, convolutions = find_blocks(unet), find_convolutions(unet)
    placed = place_tuners(unet, file, source)
    if strength == 0:
        return model
    for op in ("attn1", "attn2"):
        tuners = {blocks[path].place: tuner for (path, name), tuner in placed.items() if name == op}
        if tuners:
            _patch_attention(model, op, tuners, strength)
    for (path, op), tuner in placed.items():
        if op not in ("attn1", "attn2"):
            inner = "" if op == "block" else f".{op}"  # the feed-forward, or a linear layer
            own = convolutions[path][0] if op == "conv" else blocks[path].path + inner
            name = f"diffusion_model.{own}.forward"
            wrap = _with_block_tuner if op == "block" else _with_tuner
            model.add_object_patch(name, wrap(_current_forward(model, name), tuner, strength))
    return model


# The patches are closures, not objects, of which `clone()` makes deep copies.


def _patch_attention(model, op: str, tuners: dict[tuple, PlacedTuner], strength: float) -> None:
    """Patches the input of all attentions of one kind, to remember it, and their output, to which it adds the tuner."""
    key = f"sdtune.{op}.{next(_count)}"

    def remember_input(n, context, value, options):
        # `options` is one dict per call of a block, and reaches the patch of the output. As in diffusers, only attn2
        # has the text: attn1 receives its own input as context.
        options[key] = n, context if op == "attn2" else None
        return n, context, value

    def add_residual(n, options):
        x, text = options.pop(key)
        tuner = tuners.get((*options.get("block", (None, None))[:2], options.get("block_index", 0)))
        if tuner is None:
            return n
        if x.shape != n.shape:
            raise ValueError(
                f"the input of {op} has the shape {list(x.shape)} and its result {list(n.shape)}: a node that merges "
                "tokens works on the same model. Put the tuner's node after it"
            )
        return n + (strength * tuner(x, text)).to(n.dtype)

    getattr(model, f"set_model_{op}_patch")(remember_input)
    getattr(model, f"set_model_{op}_output_patch")(add_residual)
    # before the patches that are there, so that the tuner sees the input as the model made it
    patches = model.model_options["transformer_options"]["patches"]
    patches[f"{op}_patch"] = [patches[f"{op}_patch"][-1], *patches[f"{op}_patch"][:-1]]


def _with_tuner(forward: Callable, tuner: PlacedTuner, strength: float) -> Callable:
    def forward_with_tuner(x, *args, **kwargs):
        residual = strength * tuner(x)
        y = forward(x, *args, **kwargs)
        return y + residual.to(y.dtype)

    forward_with_tuner.before = forward
    return forward_with_tuner


def _with_block_tuner(forward: Callable, tuner: PlacedTuner, strength: float) -> Callable:
    def forward_with_tuner(x, context=None, *args, **kwargs):
        residual = strength * tuner(x, context)  # first, since the block changes x in place
        y = forward(x, context, *args, **kwargs)
        return y + residual.to(y.dtype)

    forward_with_tuner.before = forward
    return forward_with_tuner


def _current_forward(model, name: str) -> Callable:
    """What `forward` is with the patches of this model and without those of others that share its weights."""
    if name in model.object_patches:
        return model.object_patches[name]
    if name in model.object_patches_backup:
        return model.object_patches_backup[name]
    forward = attrgetter(name)(model.model)
    # a clone that was drawn with may still be patched in, and in Forge clones do not share `object_patches_backup`
    while hasattr(forward, "before"):
        forward = forward.before
    return forward
