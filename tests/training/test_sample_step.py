"""The random choices of a training step."""

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sdtune
from sdtune.training import encoding, sample_step


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 40), batch=st.integers(1, 12), ranks=st.integers(1, 3), steps=st.integers(1, 12),
    seed=st.integers(0, 2**40),
)  # fmt: skip
def test_every_image_is_trained_on_equally_often_with_any_number_of_processes(count, batch, ranks, steps, seed):
    encoded = encoding.Encoded(["x"] * count, torch.zeros(count, 2, 4, 2, 2), None, None, None)
    config = sdtune.TrainConfig(seed=seed)
    drawn = [sample_step.sample_step(config, s, ranks * batch, encoded, 1000) for s in range(steps)]
    seen = Counter(i for d in drawn for i in d.image.tolist())
    assert max(seen.values()) - min(seen[i] for i in range(count)) <= 1
    again = sample_step.sample_step(config, steps - 1, ranks * batch, encoded, 1000)
    assert torch.equal(again.noise, drawn[-1].noise) and torch.equal(again.timestep, drawn[-1].timestep)
    assert all(((d.timestep >= 0) & (d.timestep < 1000)).all() for d in drawn)


def test_a_noise_offset_moves_each_channel_as_a_whole():
    encoded = encoding.Encoded(["x"] * 3, torch.zeros(3, 1, 4, 8, 8), None, None, None)
    with_it, without = (
        sample_step.sample_step(sdtune.TrainConfig(noise_offset=offset), 0, 3, encoded, 1000).noise
        for offset in (0.5, 0.0)
    )
    moved = (with_it - without).flatten(2)
    assert torch.allclose(moved, moved[:, :, :1].expand_as(moved), atol=1e-5) and moved[..., 0].unique().numel() == 12
