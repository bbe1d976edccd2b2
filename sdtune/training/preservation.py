"""Keeps the base as it is where the trigger words are missing: its own prediction is the target there."""

import torch

from ..adapters import active_adapters
from .encoding import Encoded
from .loss import training_loss


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

    It is the mean over all images, not mirrored, over 8 fixed timesteps, and over the texts that are preserved.
    """
    change, error, texts = 0.0, 0.0, [encoded.empty] + ([] if encoded.plain is None else [encoded.plain])
    for bucket in encoded.buckets:
        latents = bucket.mean[:, 0]
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents.device)
        for t in range(60, 1000, 125):
            timesteps = torch.full((len(latents),), t, device=latents.device)
            for text in texts:
                states = text.expand(len(latents), -1, -1) if text is encoded.empty else text[bucket.images]
                change += preservation_loss(unet, scheduler, latents, noise, timesteps, states).sum().item()
                with active_adapters.adapters_disabled(unet):
                    error += training_loss(unet, scheduler, latents, noise, timesteps, states).sum().item()
    return change / error
