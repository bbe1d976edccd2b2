"""Metrics that mean what they say: their values on features and pictures whose answer is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdtune.evaluation import features, intervals, metrics


def vectors(count: int, seed: int = 0, spread: float = 1.0, width: int = 32) -> torch.Tensor:
    """Unit vectors about a common direction, as features are."""
    noise = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(torch.ones(width) + spread * noise, dim=1)


def value(statistic: intervals.Statistic) -> float:
    return statistic.of(torch.ones(1, statistic.size)).item()


def test_kid_is_the_unbiased_kernel_distance_and_grows_with_what_differs():
    x, y = vectors(7, 1), vectors(7, 2)

    def k(a, b):
        return (float(a @ b) + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    expected = sum(k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in pairs) / len(pairs)
    assert value(metrics.kid(x, y)) == pytest.approx(expected, abs=1e-4)
    assert value(metrics.kid(x, x)) == pytest.approx(0, abs=1e-4)
    near, far = (value(metrics.kid(vectors(60, 3), F.normalize(vectors(60, 4) + s, dim=1))) for s in (0.0, 1.0))
    assert abs(near) < 0.1 < far
    assert value(metrics.kid(vectors(20, 5), vectors(60, 6), paired=False)) == pytest.approx(0, abs=0.1)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(2, 12), seed=st.integers(0, 1000), spread=st.floats(0.05, 5.0))
def test_metrics_of_any_features_keep_their_range(n, seed, spread):
    drawn, true, train = (vectors(n, seed + i, spread) for i in range(3))
    nearest, rank = metrics.fidelity(drawn, true)
    assert 0 <= value(nearest) <= 1 and 0 <= value(rank) <= 1
    assert [value(s) for s in metrics.fidelity(true, true)] == [1, 1]
    assert value(metrics.diversity(true, true)) == pytest.approx(1)
    assert value(metrics.novelty(train, true, train)) == pytest.approx(0, abs=1e-3)
    assert value(metrics.novelty(true, true, train)) == pytest.approx(1)
    found = intervals.estimate([intervals.mean(drawn[:, 0]), intervals.mean(true[:, 0])], draws=50)
    assert min(drawn.min(), true.min()) - 1e-6 <= found.low <= found.high


def test_local_similarity_is_one_for_the_same_parts_and_falls_as_they_blur_or_move_away():
    true = torch.randn(6, 12, 16, 16, generator=torch.Generator().manual_seed(0))
    assert value(metrics.local_similarity(true, true)) == pytest.approx(1, abs=1e-5)
    near, far = (value(metrics.local_similarity(true.roll(shift, 3), true)) for shift in (1, 5))
    assert near > 0.9 > 0.6 > far
    smeared = value(metrics.local_similarity(F.avg_pool2d(true, 5, 1, 2), true))
    other_prompts = value(metrics.local_similarity(true.roll(1, 0), true))
    assert other_prompts < 0.6 and smeared < near


def test_the_colour_distance_of_shifted_colours_is_the_shift():
    random = np.random.default_rng(0)
    noise = random.integers(40, 100, (4, 64, 64, 3), dtype=np.uint8)
    dark, same, light = ([Image.fromarray(n + np.uint8(s)) for n in noise] for s in (0, 0, 100))
    profiles = [features.colours(images) for images in (dark, same, light)]
    assert value(metrics.colour_distance(profiles[0], profiles[1])) == 0
    black, white = (features.colours([Image.new("RGB", (8, 8), c)]) for c in ("black", "white"))
    direction = F.normalize(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)), dim=1)[:, 0].abs().mean()
    assert value(metrics.colour_distance(black, white)) == pytest.approx(100 * direction.item(), abs=1)
    assert 5 < value(metrics.colour_distance(profiles[0], profiles[2])) < 100 * direction
