"""A weight per adapter and sample, so that one batch draws with many adapters and mixes of them."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer

from .hook import ParallelTuners
from .sample_weights import per_sample_shape, tile_weights, to_device
from .state import preserve_adapters


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
    with preserve_adapters(unet) as layers, ExitStack() as hooks:
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


def _scale_samples(tensors: dict[str, torch.Tensor], layer, args: tuple) -> None:
    """Before a LoRA layer: its scaling times the sample's weight, (B, 1, 1) for tokens, (B, 1, 1, 1) for pictures.

    Only now are the device and the length of the batch known, and a call's own scale is in `layer.scaling`.
    """
    x, layer.plain_scaling = args[0], dict(layer.scaling)
    for name in tensors.keys() & layer.scaling.keys():
        own = to_device(tile_weights(tensors[name], len(x)), x.device)
        layer.scaling[name] = layer.scaling[name] * per_sample_shape(own, x)


def _unscale_samples(layer, args: tuple, output) -> None:
    layer.scaling.update(layer.__dict__.pop("plain_scaling", {}))
