"""Hangs tuners in parallel on the operations of a UNet, and makes diffusers treat them as adapters.

A forward hook on the operation adds `scale * tuner(x)` to its result; nothing is wrapped or renamed, so
every key of the backbone stays as it was. The module that holds the tuners of one operation is a PEFT
`BaseTunerLayer`, and the UNet's `peft_config` knows the adapter's name: that is all diffusers needs for
`set_adapters`, `disable_adapters`, `enable_adapters`, `delete_adapters`, per-block weights, and
`cross_attention_kwargs={"scale": s}` to drive a tuner like a LoRA, and to mix the two.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from diffusers.models.attention import BasicTransformerBlock
from peft import PeftConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .tuners import FULL, Beside, FullTuning, Tuner, TunerConfig, Widths, build

_CHILD = "res_tuner"  # the name under which an operation holds its tuners
_ADAPTERS = re.compile(rf"(^|\.)(lora_\w+|{_CHILD})(\.|$)")  # in the paths of what belongs to adapters


class TunerPeftConfig(PeftConfig):
    """The entry of a tuner in `unet.peft_config`; `tuner` is its `TunerConfig`."""

    def __init__(self, tuner: TunerConfig):
        super().__init__()
        self.tuner = tuner


@dataclass(frozen=True)
class Operation:
    """A frozen operation: `name` in `tuners.OPS`, its module, and the block that it is in, or is.

    For full fine-tuning it is a single layer of the UNet, without a block. Kept as an attribute, it makes neither of
    them a submodule.
    """

    name: str
    module: nn.Module
    block: BasicTransformerBlock | None = None

    def new_tuner(self, config: TunerConfig) -> Tuner:
        return FullTuning(self.module) if config.kind == FULL else build(config, self.name, self.widths)

    @property
    def attention(self) -> nn.Module | None:
        """The frozen attention that a tuner may use: its own operation, or the block's attn1 (our reading)."""
        return self.block and (self.block.attn2 if self.name == "attn2" else self.block.attn1)

    @property
    def widths(self) -> Widths:
        block, attn = self.block, self.attention
        dim = block.norm1.normalized_shape[0] if hasattr(block.norm1, "normalized_shape") else block.dim
        with_text = block.attn2 if self.name == "block" and block.attn2 is not None else attn
        text_dim = dim if self.name == "ff" else with_text.cross_attention_dim
        return Widths(dim, attn.inner_dim, attn.cross_attention_dim, text_dim)


class ParallelTuners(nn.Module, BaseTunerLayer):
    """The tuners that hang on one operation, by adapter name, each with its weight."""

    adapter_layer_names = ("tuners",)

    def __init__(self, operation: Operation):
        nn.Module.__init__(self)
        self.operation = operation
        self.tuners = nn.ModuleDict()
        self.weights: dict[str, float | torch.Tensor] = {}  # set_adapters' weight, or one per sample (B,)
        self.call_scales: dict[str, float] = {}  # cross_attention_kwargs' scale, during one call
        self.adapters_of_unet: dict[str, PeftConfig] = {}  # the UNet's peft_config
        self.cast_input_dtype_enabled = True  # diffusers' layerwise casting switches it off
        self._active_adapter = []
        self._disable_adapters = False

    def forward(self, x: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor | None:
        """The weighted sum of the active tuners at x, (B, N, dim) beside `tuners.OPS`, or None where there is none.

        `text` (B, L, text width) is what the operation got as `encoder_hidden_states`.
        """
        total = None
        for name in [] if self._disable_adapters else self.active_adapters:
            scale = self.weights.get(name, 0.0) * self.call_scales.get(name, 1.0)
            if name not in self.tuners:
                continue
            if isinstance(scale, torch.Tensor):
                part = self._per_sample(name, x, text, scale)
            elif scale == 0:
                continue
            else:
                part = self._tune(name, x, text)
                part = part if scale == 1 else part * scale
            total = part if total is None or part is None else total + part
        return total

    def _tune(self, name: str, x: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        tuner, block = self.tuners[name], self.operation.block
        chunked = self.operation.name == "ff" and block._chunk_size is not None and block._chunk_dim == 1
        if chunked and not tuner.per_token:
            raise ValueError(
                f"the tuner {name!r} attends to all tokens, but its feed-forward gets a few at a time; chunk "
                "it along the batch, set_chunk_feed_forward(size, dim=0), or not at all, set_chunk_feed_forward(None)"
            )
        if not tuner.calls_base and not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, next(tuner.parameters()).dtype)
        return tuner(x, Beside(self.operation.attention, text))

    def _per_sample(self, name: str, x: torch.Tensor, text: torch.Tensor | None, weights: torch.Tensor):
        """Each sample's result times its own weight; samples of weight 0 are left out where that is possible."""
        weights = _tiled(weights, len(x))
        rows = weights.nonzero()[:, 0]  # on the CPU, as the weights are: no wait for a GPU
        if not len(rows):
            return None
        if self.tuners[name].calls_base:  # a LoRA in the base may expect the whole batch, too
            rows = torch.arange(len(x))
        weights, rows = _placed(weights[rows], x.device), _placed(rows, x.device)
        part = self._tune(name, x[rows], None if text is None else text[rows])
        part = (part * _beside_samples(weights, part)).to(part.dtype)
        return part.new_zeros(len(x), *part.shape[1:]).index_copy(0, rows, part)

    # What diffusers and PEFT call on every adapter layer.

    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter not in self.tuners:
            return
        if self.call_scales.get(adapter) == 0:
            # diffusers cannot divide a scale of 0 away and sets the weight to 1 instead: undo the call's scale
            # only, so that the weight that the user has set survives
            self.call_scales[adapter] = 1.0
        else:
            self.weights[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        for name in self.active_adapters:
            self.call_scales[name] = scale

    def unscale_layer(self, scale: float | None = None) -> None:
        self.call_scales.clear()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = [n for n in adapter_names or self.active_adapters if n in self.tuners]
        if names and not self._disable_adapters:
            raise ValueError(_cannot_fuse(names))

    def unmerge(self) -> None:
        pass  # nothing is ever merged

    def get_base_layer(self) -> None:
        """None: diffusers' `unload_lora_weights` puts this in the place of an adapter layer, which removes it."""
        return None

    base_layer = property(get_base_layer)

    @property
    def r(self) -> dict[str, int]:
        """One entry per LoRA of the whole UNet: diffusers numbers unnamed LoRAs by its length."""
        return {n: c.r for n, c in self.adapters_of_unet.items() if not isinstance(c, TunerPeftConfig)}

    @property
    def lora_A(self) -> nn.ModuleDict:
        """What diffusers' `set_lora_device` moves."""
        return self.tuners

    lora_B = lora_A

    def delete_adapter(self, adapter_name: str) -> None:
        if self.active_adapters == [adapter_name]:
            # PEFT activates, layer by layer, one that is left: a LoRA layer its first LoRA. All must choose the same.
            left = sorted(n for n in self.adapters_of_unet if n != adapter_name)
            self.set_adapter([n for n in left if n in self.r][:1] or left[:1])
        super().delete_adapter(adapter_name)
        self.weights.pop(adapter_name, None)
        self.call_scales.pop(adapter_name, None)


def _tiled(weights: torch.Tensor, batch: int) -> torch.Tensor:
    """The cells' weights (C,) for a batch that holds all the cells once or more: (batch,)."""
    if batch % len(weights):
        raise ValueError(f"a batch of {batch} samples cannot hold {len(weights)} cells, each with its own weight")
    return weights.repeat(batch // len(weights))


def _placed(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A few numbers on another device. The same ones are sent once: while a GPU's work is recorded, nothing can be."""
    return _sent(tuple(numbers.tolist()), numbers.dtype, device)


@lru_cache(maxsize=256)
def _sent(numbers: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def _beside_samples(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Weights (B,) in the shape that multiplies x (B, ...) sample by sample."""
    return weights.view(-1, *[1] * (x.ndim - 1))


def _cannot_fuse(names: list[str]) -> str:
    return (
        f"the tuner{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))} cannot be fused into the base's "
        "weights: a tuner's result depends on its input through its own attention or activation, so no change of "
        "the frozen weights equals it (a LoRA's does; a full fine-tuning's would, and is kept beside them as well). "
        "Leave it attached, or deactivate it first with "
        'set_adapters(...), or fuse only LoRAs with fuse_lora(adapter_names=["..."])'
    )


def _add_residual(op: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor | None:
    """The forward hook: x' = OP(x) + tuner(x), with OP's own input x."""
    holder = op._modules.get(_CHILD)
    if holder is None:  # unload_lora_weights took the tuners away
        return None
    x = args[0] if args else kwargs["hidden_states"]
    place = 2 if isinstance(op, BasicTransformerBlock) else 1  # gradient checkpointing passes everything by position
    text = kwargs.get("encoder_hidden_states", args[place] if len(args) > place else None)
    residual = holder(x, text[0] if isinstance(text, tuple) else text)  # an IP-Adapter adds pictures to the text
    if residual is None:
        return None
    residual = residual.to(output.dtype)
    if torch.is_grad_enabled():
        return output + residual
    return output.add_(residual)  # the operation has just made it; this saves a quarter of what a tuner costs


def _fuse_lora(unet, lora_scale=1.0, safe_fusing=False, adapter_names=None):
    """diffusers' `fuse_lora`, refusing an active tuner before any LoRA has been merged."""
    names = {n for _, holder in _holders(unet) if not holder.disable_adapters
             for n in (adapter_names or holder.active_adapters) if n in holder.tuners}  # fmt: skip
    if names:
        raise ValueError(_cannot_fuse(sorted(names)))
    try:
        type(unet).fuse_lora(unet, lora_scale, safe_fusing=safe_fusing, adapter_names=adapter_names)
    finally:
        for _, holder in _holders(unet):  # lora_scale is for the LoRAs that are fused
            holder.unscale_layer()


def _load_lora_adapter(unet, *args, **kwargs):
    """diffusers' `load_lora_adapter`: as with two LoRAs, the one loaded last is the active one."""
    before, name = set(getattr(unet, "peft_config", {})), kwargs.get("adapter_name")
    if name in tuner_names(unet):
        raise ValueError(f"adapter name {name!r} is already in use, by a tuner; a LoRA needs another name")
    result = type(unet).load_lora_adapter(unet, *args, **kwargs)
    added = [n for n in unet.peft_config if n not in before] if hasattr(unet, "peft_config") else []
    for _, holder in _holders(unet) if added else []:
        holder.adapters_of_unet = unet.peft_config
        holder.set_adapter(added)
    return result


def _unload_lora(unet):
    """diffusers' `unload_lora`; a LoRA may be on a layer with a tuner beside it, which it would not find any more."""
    for _, holder in _holders(unet):
        setattr(holder.operation.module, _CHILD, None)
    type(unet).unload_lora(unet)


def _set_adapters(unet, adapter_names, weights=None):
    """diffusers' `set_adapters`, which reads the block from a layer's path, and not all layers of a UNet are in one."""
    if any(isinstance(w, dict) for w in (weights if isinstance(weights, (list, tuple)) else [weights])):
        full = [n for n in tuner_names(unet) if unet.peft_config[n].tuner.kind == FULL]
        if full:
            raise ValueError(f"no weights per block while {full[0]!r}, a full fine-tuning, is attached; give a number")
    type(unet).set_adapters(unet, adapter_names, weights)


def _holders(unet) -> list[tuple[str, ParallelTuners]]:
    """Every operation that has tuners beside it: its path in the UNet without adapters, and what holds them."""
    found = ((n.removesuffix(f".{_CHILD}"), m) for n, m in unet.named_modules() if isinstance(m, ParallelTuners))
    return [(n.replace(".base_layer", ""), m) for n, m in found]


def find_ops(unet, config: TunerConfig) -> dict[str, Operation]:
    """The operations that `config.ops` names, by their path in the UNet; for full fine-tuning all its layers.

    Raises:
        ValueError: if the model has no transformer block, or a block lacks a named operation.
    """
    if config.kind == FULL:
        return {
            path.replace(".base_layer", ""): Operation("layer", module)  # a LoRA on a layer holds it as its base_layer
            for path, module in unet.named_modules()
            if isinstance(module, FullTuning.LAYERS) and module.weight is not None and not _ADAPTERS.search(path)
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
            f"{type(unet).__name__} has no BasicTransformerBlock to hang a tuner on; expected the UNet of a "
            "Stable Diffusion 1.x or 2.x"
        )
    if lacking:
        raise ValueError(f"this UNet lacks the operations {', '.join(lacking)}; leave them out of ops")
    return found


def expected_shapes(unet, config: TunerConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a tuner of this configuration has on this UNet: "<op path>.<parameter>" -> shape."""
    with torch.device("meta"):
        return {
            f"{path}.{name}": tuple(p.shape)
            for path, op in find_ops(unet, config).items()
            for name, p in op.new_tuner(config).named_parameters()
        }


def check_new_name(unet, name: str) -> None:
    """Raises ValueError unless `name` can name a new adapter of this UNet."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"adapter_name is {name!r}; it must be a non-empty string without a dot")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"adapter_name is {name!r}, a word that PyTorch reserves; choose another name")
    if name in getattr(unet, "peft_config", {}):
        raise ValueError(
            f"adapter_name {name!r} is already in use; present: {', '.join(unet.peft_config)}. "
            "Choose another name, or unload the old one first"
        )


def attach(unet, config: TunerConfig, name: str, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Hangs a tuner on `unet` as adapter `name`, with fresh weights or with `tensors`, and activates it alone.

    Fresh weights are drawn from torch's global generator on the CPU. The tuner takes the device of the operation
    beside it and the dtype that the UNet computes in. Other adapters stay attached but inactive, as when a LoRA
    is loaded.

    Raises:
        ValueError: for a name in use, or a model without the operations, or with its weights elsewhere. Nothing
            is changed then.
    """
    check_new_name(unet, name)
    ops = find_ops(unet, config)
    tuners = {}
    for path, op in ops.items():
        device = next(op.module.parameters()).device
        if device.type == "meta" and any(hasattr(m, "_hf_hook") for m in op.module.modules()):
            raise ValueError("this UNet's weights are offloaded; hand over the pipeline, or remove its hooks first")
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
    unet.peft_config[name] = TunerPeftConfig(config)
    unet._hf_peft_config_loaded = True
    for path, op in ops.items():
        if op.module._modules.get(_CHILD) is None:
            setattr(op.module, _CHILD, ParallelTuners(op))
            if not any(hook is _add_residual for hook in op.module._forward_hooks.values()):
                op.module.register_forward_hook(_add_residual, with_kwargs=True)
        holder = getattr(op.module, _CHILD)
        holder.tuners[name], holder.weights[name] = tuners[path], 1.0
        holder.adapters_of_unet = unet.peft_config
    unet.fuse_lora = partial(_fuse_lora, unet)  # unlike a method, a partial can be pickled
    unet.load_lora_adapter = partial(_load_lora_adapter, unet)
    unet.unload_lora, unet.set_adapters = partial(_unload_lora, unet), partial(_set_adapters, unet)
    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter([name])
            module.enable_adapters(True)


def tuner_names(unet) -> list[str]:
    """The names of the tuners (not the LoRAs) attached to this UNet."""
    return [n for n, c in (getattr(unet, "peft_config", None) or {}).items() if isinstance(c, TunerPeftConfig)]


@contextmanager
def left_as_it_was(*models):
    """Restores, at the end of a `with`, which adapters are active, their weights, and what is trainable."""
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    before = [(m, list(m.active_adapters), m._disable_adapters, scales(m), dict(scales(m))) for m in layers]
    trainable = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        yield layers
    finally:
        for layer, active, disabled, weights, kept in before:
            layer._active_adapter, layer._disable_adapters = active, disabled
            weights.update(kept)
        for parameter, required in trainable:
            parameter.requires_grad_(required)


@contextmanager
def switched_off(unet):
    """The UNet without the effect of any of its adapters, for the length of a `with`."""
    with left_as_it_was(unet) as layers:
        for layer in layers:
            layer._disable_adapters = True
        yield


def can_share_a_pass(unet, names: Iterable[str]) -> bool:
    """Whether `per_sample_weights` can weigh these adapters; those that this UNet does not have are no hindrance."""
    return _hindrance(unet, [n for n in names if n in (getattr(unet, "peft_config", None) or {})]) is None


def _hindrance(unet, names: list[str]) -> str | None:
    """Why these adapters cannot have a weight per sample, if they cannot: the first reason found."""
    seen = set()
    for path, module in unet.named_modules():
        if getattr(module, "_chunk_size", None) is not None and names:
            return f"the feed-forward of {path} gets its input in chunks; call set_chunk_feed_forward(None) on it first"
        here = [n for n in names if isinstance(module, BaseTunerLayer) and n in module._get_available_adapters()]
        seen.update(here)
        for name in here if not isinstance(module, ParallelTuners) else []:
            if not isinstance(module, (lora.Linear, lora.Conv2d)):
                return f"adapter {name!r} is no LoRA of linear layers and convolutions, but a {type(module).__name__}"
            if name in module.lora_variant:
                return f"adapter {name!r} is a {type(module.lora_variant[name]).__name__}, which has no plain scale"
            if module.merged:
                return f"adapter {name!r} is on {path}, into which {', '.join(module.merged_adapters)} is fused"
    missing = [n for n in names if n not in seen]
    return f"no layer of this UNet has an adapter named {', '.join(map(repr, missing))}" if missing else None


@contextmanager
def per_sample_weights(unet, weights: Mapping[str, Sequence[float]], repeat: int = 1):
    """Exactly the named adapters, each with a weight per sample of the batch, for the length of a `with`.

    What comes out for a sample is what `set_adapters` with its weights gives. A batch may hold the samples several
    times over, one copy after the other, as under classifier-free guidance ([all uncond, all cond]): weights are
    tiled to its length. After the `with`, active adapters, weights and switches are as they were.

    Args:
        weights: tuner or LoRA -> one weight per sample, as many for each.
        repeat: how many copies a batch holds at least; 2 under guidance.

    Raises:
        ValueError: if there is no such adapter, or it cannot have a weight per sample (DoRA, a fused LoRA, ...).
    """
    why = _hindrance(unet, list(weights))
    lengths = {n: len(w) for n, w in weights.items()}
    if why is None and (len(set(lengths.values())) > 1 or 0 in lengths.values()):
        why = f"every adapter needs as many weights as there are samples; found {lengths}"
    if why:
        raise ValueError(f"weights per sample are not possible: {why}")
    tensors = {n: torch.tensor(list(w), dtype=torch.float32, device="cpu").repeat(repeat) for n, w in weights.items()}
    with left_as_it_was(unet) as layers, ExitStack() as hooks:
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = list(tensors), False  # set_adapter would unfreeze, too
            if isinstance(layer, ParallelTuners):
                layer.weights.update({n: t for n, t in tensors.items() if n in layer.tuners})
            elif tensors.keys() & layer._get_available_adapters():
                for name in tensors:
                    layer.set_scale(name, 1.0)
                hooks.callback(layer.register_forward_pre_hook(partial(_scale_samples, tensors)).remove)
                hooks.callback(layer.register_forward_hook(_unscale_samples, always_call=True).remove)
        yield


def scales(layer: BaseTunerLayer) -> dict[str, float]:
    """The weights of an adapter layer's adapters, to be changed in place: a LoRA's include its alpha / r."""
    return layer.weights if isinstance(layer, ParallelTuners) else getattr(layer, "scaling", {})


def _scale_samples(tensors: dict[str, torch.Tensor], layer, args: tuple) -> None:
    """Before a LoRA layer: its scaling times the sample's weight, (B, 1, 1) for tokens, (B, 1, 1, 1) for pictures.

    Only now are the device and the length of the batch known, and a call's own scale is in `layer.scaling`.
    """
    x, layer.plain_scaling = args[0], dict(layer.scaling)
    for name in tensors.keys() & layer.scaling.keys():
        own = _placed(_tiled(tensors[name], len(x)), x.device)
        layer.scaling[name] = layer.scaling[name] * _beside_samples(own, x)


def _unscale_samples(layer, args: tuple, output) -> None:
    layer.scaling.update(layer.__dict__.pop("plain_scaling", {}))


def parameters_of(unet, name: str) -> dict[str, nn.Parameter]:
    """The tuner's parameters, keyed "<op path>.<parameter>" as in its file."""
    return {
        f"{path}.{n}": p
        for path, holder in _holders(unet)
        if name in holder.tuners
        for n, p in holder.tuners[name].named_parameters()
    }


def detach(unet, name: str, pipe=None) -> None:
    """Removes the tuner `name` altogether; the last one leaves the UNet as if there had never been any.

    Given its pipeline, the LoRAs in other parts of that learn of it, too.
    """
    (pipe or unet).delete_adapters(name)
    for _, holder in _holders(unet):
        if not holder.tuners:
            op = holder.operation.module
            delattr(op, _CHILD)
            for key in [k for k, hook in op._forward_hooks.items() if hook is _add_residual]:
                del op._forward_hooks[key], op._forward_hooks_with_kwargs[key]
    if not tuner_names(unet):
        for name in ("fuse_lora", "load_lora_adapter", "unload_lora", "set_adapters"):
            unet.__dict__.pop(name, None)
