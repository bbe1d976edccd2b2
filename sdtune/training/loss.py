"""The training loss, and the loss by which held-out images are judged."""

from typing import NamedTuple

import torch
from diffusers.training_utils import compute_snr
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .encoding import Encoded


def training_loss(
    unet, scheduler, latents, noise, timesteps, states, min_snr_gamma: float = 0.0, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """The denoising loss of each image, (B,): the mean squared error of the predicted noise, or velocity.

    Args:
        latents, noise: (B, C, h, w).
        timesteps: (B,).
        states: encoded captions, (B, tokens, width).
        min_snr_gamma: each image is weighted by min(SNR, gamma) / SNR, or where velocity is predicted by
            min(SNR, gamma) / (SNR + 1) (arXiv 2303.09556); 0 means no weights.
        weight: how much each place counts, on average 1 for each image, (B, 1, h, w); None is 1 everywhere.
    """
    noisy = scheduler.add_noise(latents, noise, timesteps)
    predicts_velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if predicts_velocity else noise
    predicted = unet(noisy.to(states.dtype), timesteps, states, return_dict=False)[0]
    error = (predicted.float() - target.float()).pow(2)
    loss = (error if weight is None else error * weight).mean((1, 2, 3))
    if min_snr_gamma:
        snr = compute_snr(scheduler, timesteps)
        loss = loss * snr.clamp(max=min_snr_gamma) / (snr + 1 if predicts_velocity else snr)
    return loss


@torch.no_grad()
def denoising_errors(unet, scheduler, encoded: Encoded, noises: int = 1) -> torch.Tensor:
    """The loss of each image without min-SNR weights, not mirrored, (n,), on the CPU: the held-out loss of a run.

    It is the mean over 8 fixed timesteps and `noises` fixed draws of noise, so that two calls can be compared.
    """
    total = torch.zeros(len(encoded.names))
    for bucket in encoded.buckets:
        latents, device = bucket.mean[:, 0], bucket.mean.device
        for seed in range(noises):
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(device)
            for t in range(60, 1000, 125):
                for part in torch.arange(len(latents)).split(64):
                    images, timesteps = bucket.images[part], torch.full((len(part),), t, device=device)
                    weight = None if bucket.weight is None else bucket.weight[part, 0]
                    given = latents[part], noise[part], timesteps, encoded.text[encoded.first_texts[images]]
                    loss = training_loss(unet, scheduler, *given, weight=weight)
                    total[images] += loss.cpu() / (8 * noises)
    return total


class PendingLosses(NamedTuple):
    """The losses of a step whose copy from the GPU may still be under way."""

    step: int  # from 0
    images: torch.Tensor  # the number of each image of the step, (batch of all processes,)
    learning_rate: float
    losses: torch.Tensor  # (batch of all processes,), on the CPU
    copied: torch.cuda.Event | None  # recorded after the copy; None on a CPU


class AttentionInFp32(TorchFunctionMode):
    """In a `with`, computes attention in fp32 whatever the precision of its inputs; for training on a CPU in bf16.

    PyTorch (2.13) takes about three times as long for the gradient of attention in bf16 as in fp32, which was half of
    the time of a training step.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        dtype = (args[0] if args else kwargs["query"]).dtype
        return function(*map(_to_fp32, args), **{k: _to_fp32(v) for k, v in kwargs.items()}).to(dtype)


def _to_fp32(value):
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
