"""The training loss, against its formula, and its gradient in bf16."""

from contextlib import nullcontext

import pytest
import torch
from diffusers import DDPMScheduler

import sdtune
from sdtune.adapters import api
from sdtune.bases import load
from sdtune.training import loss


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_weighted_error_of_noise_or_velocity(prediction):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                              prediction_type=prediction)  # fmt: skip
    x, noise, guess = torch.randn(3, 3, 4, 8, 8)
    t = torch.tensor([5, 400, 900])
    a = scheduler.alphas_cumprod[t].view(3, 1, 1, 1)
    target = noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * x
    snr = (a / (1 - a)).flatten()
    weight = snr.clamp(max=5) / (snr if prediction == "epsilon" else snr + 1)
    plain = (guess - target).pow(2).mean((1, 2, 3))

    def unet(noisy, *_, **__):
        assert torch.allclose(noisy, a.sqrt() * x + (1 - a).sqrt() * noise)
        return (guess,)

    states = torch.zeros(3, 1, 1)
    assert torch.allclose(loss.training_loss(unet, scheduler, x, noise, t, states), plain)
    assert torch.allclose(loss.training_loss(unet, scheduler, x, noise, t, states, 5.0), plain * weight, rtol=1e-4)


def test_attention_in_fp32_changes_a_bf16_gradient_by_rounding_only():
    unet = sdtune.load_base("tiny-sd").unet.requires_grad_(False)
    api.add_tuner(unet, sdtune.TunerConfig(), "tuner")
    parameters = list(api.tuner_parameters(unet, "tuner").values())
    torch.manual_seed(0)
    for p in parameters:
        torch.nn.init.normal_(p, std=0.05)
    unet.to(torch.bfloat16)  # so that the exact gradient is that of the same, rounded weights
    scheduler = DDPMScheduler.from_pretrained(load.TINY_SD / "scheduler")
    side, timesteps = unet.config.sample_size, torch.tensor([100, 700])

    def gradient(batch, attention, dtype=torch.bfloat16) -> torch.Tensor:
        latents, noise, states = batch
        unet.to(dtype)
        with attention():
            loss.training_loss(unet, scheduler, latents, noise, timesteps, states.to(dtype)).mean().backward()
        found = torch.cat([p.grad.flatten().float() for p in parameters])
        for p in parameters:
            p.grad = None
        return found

    exact, plain, fast = [], [], []
    for _ in range(4):  # the rounding of one batch alone is a matter of chance
        latents, noise = torch.randn(2, 2, unet.config.in_channels, side, side)
        batch = latents, noise, torch.randn(2, 77, unet.config.cross_attention_dim, dtype=torch.bfloat16)
        exact.append(gradient(batch, nullcontext, torch.float32))
        plain.append(gradient(batch, nullcontext))
        fast.append(gradient(batch, loss.AttentionInFp32))
    exact, plain, fast = map(torch.cat, (exact, plain, fast))
    assert not torch.equal(plain, fast)
    assert (fast - exact).norm() <= 1.2 * (plain - exact).norm() < 0.3 * exact.norm()
