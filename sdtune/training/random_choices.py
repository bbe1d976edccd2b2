"""The random choices of a training step: images, timesteps, noise, dropped captions.

They come from a generator seeded with (seed, step) and are made for all processes together. So a resumed run continues
exactly where it stopped, and two processes of batch 5 train on what one process of batch 10 trains on.
"""

import math
from dataclasses import dataclass

import torch

from .buckets import choose_turn, mix_seed
from .config import TrainConfig
from .encoding import Encoded


@dataclass
class StepSample:
    """The random choices of one optimizer step, for all processes together; B is the sum of their batch sizes."""

    bucket: int  # in which all images are
    image: torch.Tensor  # the number of the image in the data set, (B,)
    place: torch.Tensor  # of the image in its bucket, (B,)
    flip: torch.Tensor  # 1 where the mirror image is taken, else 0, (B,)
    drop_caption: torch.Tensor  # whether the caption is replaced by the empty one, (B,)
    text: torch.Tensor  # the number of the image's text in the encoded ones, (B,)
    preserve_empty: torch.Tensor  # whether `preserve` takes the empty caption, else the one without triggers, (B,)
    timestep: torch.Tensor  # (B,)
    noise: torch.Tensor  # (B, C, h, w)
    posterior_noise: torch.Tensor  # for sampling a latent from the VAE's mean and standard deviation, (B, C, h, w)


def draw_random_choices(config: TrainConfig, step: int, size: int, encoded: Encoded, timesteps: int) -> StepSample:
    """The random choices of a step.

    The images of a step are of one bucket, whose turn it is (`choose_turn`); the images of a bucket come in shuffled
    epochs, each image as often as its repeats say. Of several texts of an image one is taken by chance.
    Timesteps are stratified: one from each of `size` equal parts of the range, in random order.

    Args:
        step: number of the step, from 0.
        size: images in the step.
        timesteps: of the noise schedule.
    """
    repeats = encoded.repeats // math.gcd(*encoded.repeats.tolist())
    bucket, turn = choose_turn([int(repeats[b.images].sum()) for b in encoded.buckets], config.seed, step)
    _, flips, *shape = encoded.buckets[bucket].mean.shape
    own = encoded.buckets[bucket].images
    epoch_places = torch.repeat_interleave(torch.arange(len(own)), repeats[own])
    count = len(epoch_places)
    places, stream = [], 1 if bucket == 0 else 1000 + bucket
    for position in range(turn * size, (turn + 1) * size):
        epoch, within = divmod(position, count)
        if not places or within == 0:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(mix_seed(config.seed, epoch, stream)))
        places.append(epoch_places[order[within]])
    generator = torch.Generator().manual_seed(mix_seed(config.seed, step, 2))
    fraction = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
    noise = torch.randn(size, *shape, generator=generator)
    if config.noise_offset:
        noise += config.noise_offset * torch.randn(size, shape[0], 1, 1, generator=generator)
    image = own[torch.stack(places)]
    text_generator = torch.Generator().manual_seed(mix_seed(config.seed, step, 5))
    fractions = torch.rand(size, generator=text_generator)
    return StepSample(
        bucket=bucket,
        image=image,
        place=torch.stack(places),
        text=encoded.first_texts[image] + (fractions * encoded.text_counts[image]).long(),
        flip=torch.randint(0, flips, (size,), generator=generator),
        drop_caption=torch.rand(size, generator=generator) < config.caption_dropout,
        preserve_empty=torch.rand(size, generator=text_generator) < (1.0 if encoded.plain is None else 0.5),
        timestep=(fraction * timesteps).long().clamp(max=timesteps - 1),
        noise=noise,
        posterior_noise=torch.randn(size, *shape, generator=generator),
    )
