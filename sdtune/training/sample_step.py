"""The random draws of a training step: which pictures, which timesteps, which noise."""

from dataclasses import dataclass

import torch

from . import encoding
from .config import TrainConfig


@dataclass
class StepSample:
    """The random draws of one optimizer step, for all processes together; `size` pictures."""

    index: torch.Tensor  # which picture (size,)
    flip: torch.Tensor  # 0 or 1 (size,)
    drop: torch.Tensor  # whether the caption is dropped (size,)
    timestep: torch.Tensor  # (size,)
    noise: torch.Tensor  # (size, C, h, w)
    latent: torch.Tensor  # for sampling the VAE's posterior (size, C, h, w)


def sample_step(config: TrainConfig, step: int, size: int, encoded: encoding.Encoded, timesteps: int) -> StepSample:
    """What step number `step` (from 0) draws. Pictures come in shuffled epochs, each picture once an epoch.

    Timesteps are stratified: one from each of `size` equal parts of the range, in random order.
    """
    count, flips, *shape = encoded.mean.shape
    index = []
    for position in range(step * size, (step + 1) * size):
        epoch, within = divmod(position, count)
        if not index or within == 0:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(mix_seed(config.seed, epoch, 1)))
        index.append(order[within])
    random = torch.Generator().manual_seed(mix_seed(config.seed, step, 2))
    part = (torch.randperm(size, generator=random) + torch.rand(size, generator=random)) / size
    noise = torch.randn(size, *shape, generator=random)
    if config.noise_offset:
        noise += config.noise_offset * torch.randn(size, shape[0], 1, 1, generator=random)
    return StepSample(
        index=torch.stack(index),
        flip=torch.randint(0, flips, (size,), generator=random),
        drop=torch.rand(size, generator=random) < config.caption_dropout,
        timestep=(part * timesteps).long().clamp(max=timesteps - 1),
        noise=noise,
        latent=torch.randn(size, *shape, generator=random),
    )


def mix_seed(seed: int, number: int, stream: int) -> int:
    """One seed for torch from three numbers, without the collisions of a plain sum."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) % 2**63
