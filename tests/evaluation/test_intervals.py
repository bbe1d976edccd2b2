"""Bootstrap intervals that contain the truth as often as they should."""

import pytest
import torch

from sdtune.evaluation import intervals


def test_intervals_contain_the_truth_95_times_in_100_and_paired_differences_are_narrow():
    contained = 0
    for seed in range(400):
        values = torch.randn(80, generator=torch.Generator().manual_seed(seed))
        found = intervals.estimate([intervals.mean(values)], draws=400)
        contained += found.low <= 0 <= found.high
    assert 0.92 <= contained / 400 <= 0.975  # 90 % and 99 % are outside
    hard = 10 * torch.randn(50, generator=torch.Generator().manual_seed(1))  # prompts differ more than methods
    a, b = intervals.mean(hard + 0.1), intervals.mean(hard)
    difference, alone = intervals.estimate([a - b]), intervals.estimate([a])
    assert difference.value == pytest.approx(0.1, abs=1e-4) and difference.low > 0.09 and alone.high - alone.low > 1
    assert intervals.outcome(difference, better=-1) == "wins against"  # a is the worse one, with more error
    assert intervals.outcome(difference, better=1) == "loses to"
    assert intervals.outcome(alone, better=1) == "cannot be told from"
