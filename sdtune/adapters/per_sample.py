"""A weight per adapter and sample, so that one batch draws with many adapters and mixes of them."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer

from ..kernels.cuda.graphs import is_compiled
from .active_adapters import preserve_adapters
from .hook import ParallelTuners
from .sample_weights import per_sample_shape, tile_weights, to_device


def can_share_a_pass(unet, names: Iterable[str]) -> bool:
    """Whether `per_sample_weights` works with these adapters; names that this UNet does not have are ignored."""
    return _reason_against(unet, [n for n in names if n in (getattr(unet, "peft_config", None) or {})]) is None


def _reason_against(unet, names: list[str]) -> str | None:
    """The first reason found why these adapters cannot have a weight per sample, or None."""
    seen = set()
    if names and is_compiled(unet):
        return "the UNet is compiled, and which samples an adapter applies to is decided anew in each pass"
    for path, module in unet.named_modules():
        if getattr(module, "_chunk_size", None) is not None and names:
            return f"the feed-forward of {path} receives its input in chunks; call set_chunk_feed_forward(None) first"
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
    """A context in which exactly the named adapters are active, each with a weight per sample of the batch.

    The result for a sample equals that of `set_adapters` with its weights. A batch may contain the samples several
    times, one copy after the other, as under classifier-free guidance ([all uncond, all cond]): the weights are tiled
    to its length. Afterwards the active adapters, their weights and switches are as before.

    Args:
        weights: name of a tuner or LoRA -> one weight per sample; all of the same length.
        repeat: the least number of copies in a batch; 2 under guidance.

    Raises:
        ValueError: if there is no such adapter, or it cannot have a weight per sample (DoRA, a fused LoRA, ...).
    """
    why = _reason_against(unet, list(weights))
    lengths = {n: len(w) for n, w in weights.items()}
    if why is None and (len(set(lengths.values())) > 1 or 0 in lengths.values()):
        why = f"every adapter needs as many weights as there are samples; found {lengths}"
    if why:
        raise ValueError(f"weights per sample are not possible: {why}")
    tensors = {n: torch.tensor(list(w), dtype=torch.float32, device="cpu").repeat(repeat) for n, w in weights.items()}
    with preserve_adapters(unet) as layers, ExitStack() as hooks:
        for layer in layers:
            # set_adapter would also make the adapters trainable
            layer._active_adapter, layer._disable_adapters = list(tensors), False
            if isinstance(layer, ParallelTuners):
                layer.weights.update({n: t for n, t in tensors.items() if n in layer.tuners})
            elif tensors.keys() & layer._get_available_adapters():
                for name in tensors:
                    layer.set_scale(name, 1.0)
                hooks.callback(layer.register_forward_pre_hook(partial(_scale_samples, tensors)).remove)
                hooks.callback(layer.register_forward_hook(_unscale_samples, always_call=True).remove)
        yield


def _scale_samples(tensors: dict[str, torch.Tensor], layer, args: tuple) -> None:
    """Before a LoRA layer runs, multiplies its scaling by the weight of each sample.

    Only then are the device and the batch size known, and the scale of the call is part of `layer.scaling`.
    """
    x, layer.plain_scaling = args[0], dict(layer.scaling)
    for name in tensors.keys() & layer.scaling.keys():
        own = to_device(tile_weights(tensors[name], len(x)), x.device)
        layer.scaling[name] = layer.scaling[name] * per_sample_shape(own, x)


def _unscale_samples(layer, args: tuple, output) -> None:
    layer.scaling.update(layer.__dict__.pop("plain_scaling", {}))
