"""Restores which adapters of a model are active, and their weights, after a temporary change."""

from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer

from .hook import ParallelTuners


@contextmanager
def preserve_adapters(*models):
    """A context that at its end restores the active adapters, their weights, and which parameters are trainable."""
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
    """A context in which no adapter of the UNet has an effect."""
    with preserve_adapters(unet) as layers:
        for layer in layers:
            layer._disable_adapters = True
        yield


def adapter_scales(layer: BaseTunerLayer) -> dict[str, float]:
    """The weights of an adapter layer's adapters, which may be changed in place; those of a LoRA include alpha / r."""
    return layer.weights if isinstance(layer, ParallelTuners) else getattr(layer, "scaling", {})
