"""Statistics with bootstrap intervals over prompts and seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Statistic:
    """A number computed from `size` prompts: `of` maps weights on the prompts (draws, size) to its values (draws,)."""

    size: int
    of: Callable[[torch.Tensor], torch.Tensor]

    def __sub__(self, other: "Statistic") -> "Statistic":
        return Statistic(self.size, lambda w: self.of(w) - other.of(w))

    def __truediv__(self, other: "Statistic") -> "Statistic":
        return Statistic(self.size, lambda w: self.of(w) / other.of(w))


def mean(values: torch.Tensor) -> Statistic:
    """The mean of a number per prompt (n,)."""
    values = values.float()
    return Statistic(len(values), lambda w: (w @ values) / w.sum(1))


def mean_of_pairs(matrix: torch.Tensor) -> Statistic:
    """The mean over all pairs of two different prompts of a number per pair (n, n)."""
    matrix = matrix - matrix.diag().diag()
    return Statistic(len(matrix), lambda w: ((w @ matrix) * w).sum(1) / (w.sum(1) ** 2 - w.square().sum(1)))


class Estimate(NamedTuple):
    """A number, and the interval in which 95 % of its bootstrap replicates lie."""

    value: float
    low: float
    high: float


def estimate(statistics: Sequence[Statistic], draws: int = 1000) -> Estimate:
    """The mean of one statistic over training seeds, with its interval over prompts and seeds.

    Prompts are resampled, the same for all seeds, and so are seeds. Three seeds show little of the variation between
    seeds, so the interval is somewhat too narrow there. Every call uses the same resampling, so a difference (`a - b`
    per seed) is a paired one.
    """
    size, seeds, random = statistics[0].size, len(statistics), torch.Generator().manual_seed(0)

    def counts(n: int) -> torch.Tensor:
        drawn = torch.randint(0, n, (draws, n), generator=random)
        return torch.zeros(draws, n).scatter_add_(1, drawn, torch.ones(draws, n))

    prompts, of_seeds = counts(size), counts(seeds)
    value = torch.stack([s.of(torch.ones(1, size)) for s in statistics]).mean().item()
    replicates = (torch.stack([s.of(prompts) for s in statistics], dim=1) * of_seeds).sum(1) / seeds
    low, high = torch.nanquantile(replicates, torch.tensor([0.025, 0.975])).tolist()
    return Estimate(value, low, high)


def outcome(difference: Estimate, better: int) -> str:
    """In words, how a method compares with another, given the other's value minus its own.

    An interval that contains 0, or has no width, is a tie.

    Args:
        better: 1 where more is better, -1 where less is.
    """
    if difference.low <= 0 <= difference.high or not difference.low < difference.high:
        return "cannot be told from"
    return "loses to" if (difference.value > 0) == (better > 0) else "wins against"
