"""Keeps and restores which adapters of a model are active, with their weights."""

from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer

from .hook import ParallelTuners


@contextmanager
def preserve_adapters(*models):
    """Restores, at the end of a `with`, which adapters are active, their weights, and what is trainable."""
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    before = [
        (m, list(m.active_adapters), m._disable_adapters, adapter_scales(m), dict(adapter_scales(m))) for m in layers
    ]
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
def adapters_disabled(unet):
    """The UNet without the effect of any of its adapters, for the length of a `with`."""
    with preserve_adapters(unet) as layers:
        for layer in layers:
            layer._disable_adapters = True
        yield


def adapter_scales(layer: BaseTunerLayer) -> dict[str, float]:
    """The weights of an adapter layer's adapters, to be changed in place: a LoRA's include its alpha / r."""
    return layer.weights if isinstance(layer, ParallelTuners) else getattr(layer, "scaling", {})
