"""The random choices of a training step: images, timesteps, noise, dropped captions.

They come from a generator seeded with (seed, step) and are made for all processes together. So a resumed run continues
exactly where it stopped, and two processes of batch 5 train on what one process of batch 10 trains on.
"""

from dataclasses import dataclass

import torch

from .config import TrainConfig
from .encoding import Encoded


@dataclass
class StepSample:
    """The random choices of one optimizer step, for all processes together; B is the sum of their batch sizes."""

    image: torch.Tensor  # the number of the image, (B,)
    flip: torch.Tensor  # 1 where the mirror image is taken, else 0, (B,)
    drop_caption: torch.Tensor  # whether the caption is replaced by the empty one, (B,)
    timestep: torch.Tensor  # (B,)
    noise: torch.Tensor  # (B, C, h, w)
    posterior_noise: torch.Tensor  # for sampling a latent from the VAE's mean and standard deviation, (B, C, h, w)


def sample_step(config: TrainConfig, step: int, size: int, encoded: Encoded, timesteps: int) -> StepSample:
    """The random choices of a step.

    Images come in shuffled epochs, each image once an epoch. Timesteps are stratified: one from each of `size` equal
    parts of the range, in random order.

    Args:
        step: number of the step, from 0.
        size: images in the step.
        timesteps: of the noise schedule.
    """
    count, flips, *shape = encoded.mean.shape
    images = []
    for position in range(step * size, (step + 1) * size):
        epoch, within = divmod(position, count)
        if not images or within == 0:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(mix_seed(config.seed, epoch, 1)))
        images.append(order[within])
    generator = torch.Generator().manual_seed(mix_seed(config.seed, step, 2))
    fraction = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
    noise = torch.randn(size, *shape, generator=generator)
    if config.noise_offset:
        noise += config.noise_offset * torch.randn(size, shape[0], 1, 1, generator=generator)
    return StepSample(
        image=torch.stack(images),
        flip=torch.randint(0, flips, (size,), generator=generator),
        drop_caption=torch.rand(size, generator=generator) < config.caption_dropout,
        timestep=(fraction * timesteps).long().clamp(max=timesteps - 1),
        noise=noise,
        posterior_noise=torch.randn(size, *shape, generator=generator),
    )


def mix_seed(seed: int, number: int, stream: int) -> int:
    """One seed for torch from three numbers, without the collisions of a plain sum."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) % 2**63
