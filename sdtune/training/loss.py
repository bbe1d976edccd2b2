"""What a training step draws, and the loss that it makes of it: encoded pictures and a UNet in, numbers out.

Every random draw of a step comes from a generator seeded with (seed, step), for the batch of all processes together,
so a run continues exactly where it stopped, and two processes of batch 5 see what one process of batch 10 sees.
"""

import torch
from diffusers.training_utils import compute_snr
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from . import encoding


def training_loss(unet, scheduler, latents, noise, timesteps, states, min_snr_gamma: float = 0.0) -> torch.Tensor:
    """The denoising loss of each picture (B,): mean squared error of the predicted noise (or velocity).

    Args:
        latents, noise: (B, C, h, w); timesteps: (B,); states: caption encodings (B, tokens, width).
        min_snr_gamma: weights each picture by min(SNR, gamma) / SNR (arXiv 2303.09556); 0 is off.
    """
    noisy = scheduler.add_noise(latents, noise, timesteps)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    predicted = unet(noisy.to(states.dtype), timesteps, states, return_dict=False)[0]
    loss = (predicted.float() - target.float()).pow(2).mean((1, 2, 3))
    if min_snr_gamma:
        snr = compute_snr(scheduler, timesteps)
        loss = loss * snr.clamp(max=min_snr_gamma) / (snr + 1 if velocity else snr)
    return loss


@torch.no_grad()
def denoising_errors(unet, scheduler, encoded: encoding.Encoded, noises: int = 1) -> torch.Tensor:
    """The unweighted loss on each picture as it is (n,), on the CPU: the held-out loss of a run.

    The mean over 8 fixed timesteps, each with the same `noises` draws of noise at every call.
    """
    latents, device, total = encoded.mean[:, 0], encoded.mean.device, torch.zeros(len(encoded.names))
    for draw in range(noises):
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(draw)).to(device)
        for t in range(60, 1000, 125):
            for part in torch.arange(len(latents)).split(64):
                at = torch.full((len(part),), t, device=device)
                loss = training_loss(unet, scheduler, latents[part], noise[part], at, encoded.text[part])
                total[part] += loss.cpu() / (8 * noises)
    return total


class AttentionInFp32(TorchFunctionMode):
    """While the loss and its gradient are computed on the CPU in bf16: the attentions alone in fp32.

    PyTorch's kernel (2.13) takes about three times as long for the gradient of attention in bf16 as it does in fp32,
    half of the whole step.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        dtype = (args[0] if args else kwargs["query"]).dtype
        return function(*map(_to_fp32, args), **{k: _to_fp32(v) for k, v in kwargs.items()}).to(dtype)


def _to_fp32(value):
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
