"""The random choices of a training step."""

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sdtune
from sdtune.training import encoding, random_choices


def make_encoded(counts: list[int], flips: int, side: int) -> encoding.Encoded:
    """A data set with a bucket of each count of images; bucket i has a latent height of side + i."""
    buckets, first = [], 0
    for i, count in enumerate(counts):
        moments = torch.zeros(count, flips, 4, side + i, side)
        buckets.append(encoding.Bucket(torch.arange(first, first + count), moments, moments))
        first += count
    return encoding.Encoded(["x"] * first, buckets, None, None)


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 40), batch=st.integers(1, 12), ranks=st.integers(1, 3), steps=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_every_image_is_trained_on_equally_often_with_any_number_of_processes(count, batch, ranks, steps, seed):
    encoded = make_encoded([count], 2, 2)
    config = sdtune.TrainConfig(seed=seed)
    drawn = [random_choices.draw_random_choices(config, s, ranks * batch, encoded, 1000) for s in range(steps)]
    seen = Counter(i for d in drawn for i in d.image.tolist())
    assert max(seen.values()) - min(seen[i] for i in range(count)) <= 1
    again = random_choices.draw_random_choices(config, steps - 1, ranks * batch, encoded, 1000)
    assert torch.equal(again.noise, drawn[-1].noise) and torch.equal(again.timestep, drawn[-1].timestep)
    assert all(((d.timestep >= 0) & (d.timestep < 1000)).all() for d in drawn)


def test_a_noise_offset_moves_each_channel_as_a_whole():
    encoded = make_encoded([3], 1, 8)
    with_it, without = (
        random_choices.draw_random_choices(sdtune.TrainConfig(noise_offset=offset), 0, 3, encoded, 1000).noise
        for offset in (0.5, 0.0)
    )
    moved = (with_it - without).flatten(2)
    assert torch.allclose(moved, moved[:, :, :1].expand_as(moved), atol=1e-5) and moved[..., 0].unique().numel() == 12


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(1, 9), min_size=2, max_size=5), batch=st.integers(1, 6), seed=st.integers(0, 2**32 - 1)
)  # fmt: skip
def test_images_of_every_shape_are_trained_on_equally_often_also_the_only_one_of_its_shape(counts, batch, seed):
    encoded, config = make_encoded(counts, 1, 2), sdtune.TrainConfig(seed=seed)
    steps = sum(counts)
    drawn = [random_choices.draw_random_choices(config, s, batch, encoded, 1000) for s in range(2 * steps)]
    for first in (0, steps):
        seen = Counter(i for d in drawn[first : first + steps] for i in d.image.tolist())
        assert seen == dict.fromkeys(range(steps), batch)
    for d in drawn:
        bucket = encoded.buckets[d.bucket]
        assert d.noise.shape[1:] == bucket.mean.shape[2:] and torch.equal(bucket.images[d.place], d.image)
    turns = [d.bucket for d in drawn[:steps]]
    for bucket, count in enumerate(counts):  # its turns are spread over the steps
        assert all(abs(turns[:s].count(bucket) - s * count / steps) < 2 for s in range(steps))
