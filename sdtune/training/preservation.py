"""Keeps the base as it is where the trigger words are missing: its own prediction is the target there."""

from itertools import product

import torch
from tqdm.auto import tqdm

from ..adapters import active_adapters
from .encoding import Encoded
from .loss import training_loss

MEASURED_IMAGES = 8  # of all shapes together, at least one of each: seconds on a GPU


def preservation_loss(unet, scheduler, latents, noise, timesteps, states) -> torch.Tensor:
    """How far the tuned prediction is from the base's, (B,): the mean squared difference for each image.

    Args:
        latents, noise, timesteps: as in `training_loss`.
        states: encoded texts for which the base is to stay as it is, (B, tokens, width).
    """
    noisy = scheduler.add_noise(latents, noise, timesteps).to(states.dtype)
    with torch.no_grad(), active_adapters.adapters_disabled(unet):
        target = unet(noisy, timesteps, states, return_dict=False)[0]
    predicted = unet(noisy, timesteps, states, return_dict=False)[0]
    return (predicted.float() - target.float()).pow(2).mean((1, 2, 3))


@torch.no_grad()
def measure_change(unet, scheduler, encoded: Encoded) -> float:
    """How much the tuner changes the prediction where it should not, as a share of the base's own error.

    It is the mean over about `MEASURED_IMAGES`, the first of each bucket, not mirrored, over 4 fixed timesteps, and
    over the texts without trigger words: the empty one and, where there are trigger words, the captions without them.
    """
    change, error, texts = 0.0, 0.0, [encoded.empty] + ([] if encoded.plain is None else [encoded.plain])
    most = max(1, MEASURED_IMAGES // len(encoded.buckets))
    every = list(product(encoded.buckets, range(125, 1000, 250), texts))
    for bucket, t, text in tqdm(every, desc="measuring what is forgotten", leave=False):
        images, latents = bucket.images[:most], bucket.mean[:most, 0]
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents.device)
        timesteps = torch.full((len(latents),), t, device=latents.device)
        states = text.expand(len(latents), -1, -1) if text is encoded.empty else text[images]
        change += preservation_loss(unet, scheduler, latents, noise, timesteps, states).sum().item()
        with active_adapters.adapters_disabled(unet):
            error += training_loss(unet, scheduler, latents, noise, timesteps, states).sum().item()
    return change / error


def describe_change(change: float, weight: float) -> str:
    """A line about the result of `measure_change`, printed with `preserve` and without: runs can be compared."""
    text = f"without the trigger words the prediction differs from the base's by {change:.2%} of its error"
    return f"{text} (--preserve {weight:g}{'' if weight else '; a weight, for example 1, keeps more of the base'})"
