"""Starts the first projection of a tuner in the directions of its input on which the loss depends most.

The loss falls fastest along the gradient of a frozen layer's weight. LoRA-GA (arXiv 2407.05000) and LoRA-One (arXiv
2502.01235) start a LoRA in the singular vectors of that gradient. Here only its input side is used, so that a tuner is
still zero at the start, and the gradient itself is never stored: with `down` at zero and random `o`, which gives a
result of zero, the gradient of `down` is a random sketch of it.
"""

import torch
from accelerate.utils import broadcast
from tqdm.auto import tqdm

from ..tuners.config import LORAS, RES_ATTN_LAYER, TunerConfig
from .buckets import mix_seed
from .config import TrainConfig
from .errors import TrainError

KINDS = (RES_ATTN_LAYER, *LORAS)  # those that are beside layers, each with two projections
BATCHES = 8  # whose gradients are used; each costs as much as a training step
# singular values below this share of the greatest of all layers are rounding, as where there is one token alone
_NEGLIGIBLE = 1e-6
# the ends of the names of a tuner's two projections: of `ResAttnLayer`, and of a LoRA
_PROJECTIONS = {".down.weight": ".o.weight", ".lora_A.weight": ".lora_B.weight"}


def is_wanted(config: TrainConfig, tuner: TunerConfig) -> bool:
    """Whether a run starts so: where `config.gradient_start` says nothing, with `ResAttnLayer` alone.

    Raises:
        TrainError: if it is wanted and the kind of tuner cannot, or the run starts from a file.
    """
    if not config.gradient_start:
        return config.gradient_start is None and tuner.kind == RES_ATTN_LAYER and not config.init
    if tuner.kind not in KINDS:
        raise TrainError(f"gradient_start is for {', '.join(KINDS)}, and the tuner is {tuner.kind}; leave it out")
    if config.init:
        raise TrainError(f"gradient_start is for a fresh tuner, and this run starts from {config.init}; leave it out")
    return True


def start_from_gradients(trainer) -> bool:
    """Sets the first projections of a fresh tuner by the gradients of the first batches; the second stay zero.

    The rows of a first projection become the first right singular vectors of all sketches together, of length 1, or in
    a LoRA of the mean length of the random rows, to which learning rates are used. Rows beyond the width of the input
    or without a gradient, and all rows if no gradient is finite, stay random.

    Args:
        trainer: a `Trainer` before its first step.

    Returns:
        Whether any gradient was finite.
    """
    weights, named = trainer.weights, trainer.weights.named
    seconds = {
        name: name.removesuffix(end) + other
        for name in named
        for end, other in _PROJECTIONS.items()
        if name.endswith(end) and name.removesuffix(end) + other in named
    }
    random_start = {name: named[name].clone() for name in seconds}
    for name in seconds:
        named[name].zero_()
    sketches = []
    for step in tqdm(range(BATCHES), desc="gradient start", unit="batch", disable=not trainer.is_main):
        generator = torch.Generator().manual_seed(mix_seed(trainer.config.seed, step, 7))
        for second in seconds.values():
            random = torch.randn(named[second].shape, generator=generator)
            named[second].copy_(random * len(random) ** -0.5)
        trainer.add_gradients(trainer.sample_batches(step)[1])
        if torch.isfinite(weights.vector.grad).all():
            sketches.append({name: weights.gradients[name].flatten(1).clone() for name in seconds})
        weights.vector.grad.zero_()
    found, bar = {}, {"desc": "singular vectors", "unit": "layer", "delay": 2, "disable": not trainer.is_main}
    for name in tqdm(seconds if sketches else (), **bar):
        found[name] = torch.linalg.svd(torch.cat([of[name] for of in sketches]), full_matrices=False)[1:]
    least = _NEGLIGIBLE * max((values[0] for values, _ in found.values()), default=0)
    for name, second in seconds.items():
        named[second].zero_()
        named[name].copy_(random_start[name])
        if name in found:
            values, directions = found[name]
            rows = min(len(named[name]), int((values > least).sum()))
            # the sign of a singular vector is arbitrary; this one does not hang on rounding
            directions = directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
            length = 1 if name.endswith(".down.weight") else random_start[name].flatten(1).norm(dim=1).mean()
            named[name][:rows] = length * directions[:rows].view(rows, *named[name].shape[1:])
    if trainer.accelerator.num_processes > 1:  # singular vectors of the same gradients may differ between devices
        weights.vector.data.copy_(broadcast(weights.vector.data))
    return bool(sketches)
