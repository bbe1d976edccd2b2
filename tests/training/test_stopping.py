"""The stopping rule: when a curve of held-out errors shows memorising."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtune.training import stopping


def curve(means, spread=0.02, pictures=12, noise=0.0, seed=0):
    """step -> errors of pictures of different difficulty, whose mean follows `means`."""
    random = torch.Generator().manual_seed(seed)
    hard = spread * torch.randn(pictures, generator=random)
    return {50 * i: (m + hard + noise * torch.randn(pictures, generator=random)).tolist() for i, m in enumerate(means)}


def test_a_curve_that_falls_and_rises_again_memorises_after_its_lowest_point():
    assert stopping.first_memorising_step(curve([0.15, 0.12, 0.10, 0.11, 0.12])) == 100
    assert stopping.first_memorising_step(curve([0.15, 0.12, 0.10, 0.11])) is None  # not twice yet
    assert stopping.first_memorising_step(curve([0.15, 0.12, 0.10, 0.11]), patience=1) == 100
    assert stopping.first_memorising_step(curve([0.15, 0.12, 0.10, 0.11, 0.10, 0.11])) is None  # it came back
    assert stopping.first_memorising_step(curve([0.1, 0.2, 0.3])) == 0  # it never helped
    assert (
        stopping.first_memorising_step({0: [0.2], 10: [0.1], 20: [0.11], 30: [0.12]}) == 10
    )  # one picture, or only a mean
    assert stopping.first_memorising_step({}) is None


def test_a_curve_that_stays_level_but_for_noise_seldom_raises_a_false_alarm():
    level = [0.1 + 0.15 * 0.6**i for i in range(12)]
    alarms = [
        stopping.first_memorising_step(curve(level, pictures=5, noise=0.01, seed=seed)) is not None
        for seed in range(100)
    ]
    assert sum(alarms) <= 8


@settings(deadline=None, max_examples=50)
@given(drops=st.lists(st.floats(0.0, 0.1), min_size=1, max_size=12), pictures=st.integers(1, 20))
def test_a_curve_that_only_falls_never_memorises(drops, pictures):
    means = np.cumsum([2.0] + [-d for d in drops])
    assert stopping.first_memorising_step(curve(means, pictures=pictures)) is None
