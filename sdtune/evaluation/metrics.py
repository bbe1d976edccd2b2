"""The metrics: how similar drawn pictures are to true ones, from their features, colour profiles and errors.

A metric is a `Statistic`: a function of weights on the prompts, so that one bootstrap serves all metrics, and the
difference of two methods is resampled with the same prompts for both. Features are those of `features.features`, one
unit vector per picture, (n, 1280).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .intervals import Statistic, mean, mean_of_pairs

BIN_WIDTH, MAX_COORDINATE = 0.01, 1.2  # of the colour profiles, in OKLab, where lightness is between 0 and 1


def kid(drawn: torch.Tensor, true: torch.Tensor, paired: bool = True) -> Statistic:
    """The kernel inception distance of two sets of features (arXiv 1801.01401): kernel (x.y + 1)^3, unbiased.

    Zero on average for two samples of one distribution, so small values may be below zero. With `paired`, picture i of
    both sets shows prompt i: the two are then never compared with each other, since they should be similar, and are
    resampled together. Otherwise only `drawn` is resampled.
    """

    def k(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T + 1) ** 3

    if paired:
        between = k(drawn, true)
        return mean_of_pairs(k(drawn, drawn) + k(true, true) - between - between.T)
    own, fixed = mean_of_pairs(k(drawn, drawn)), mean_of_pairs(k(true, true)).of(torch.ones(1, len(true)))
    between = mean(k(drawn, true).mean(1))
    return Statistic(len(drawn), lambda w: own.of(w) + fixed - 2 * between.of(w))


def local_similarity(drawn: torch.Tensor, true: torch.Tensor) -> Statistic:
    """How alike the drawn and the true picture of a prompt are, place by place; 1 is alike, 0 is unrelated.

    For each place of the true picture the cosine of its features with those of the drawn picture there or in one of
    the eight places around, whichever is nearest, since parts may sit a little elsewhere. Each channel is standardised
    over the true pictures first: otherwise what all pictures share makes any two alike.

    Args:
        drawn, true: `features.local_features` (n, channels, rows, columns), picture i of both for prompt i.
    """
    drawn, true = drawn.float(), true.float()
    mean_, deviation = true.mean((0, 2, 3), keepdim=True), true.std((0, 2, 3), keepdim=True).clamp(min=1e-6)
    drawn, true = (F.normalize((x - mean_) / deviation, dim=1) for x in (drawn, true))
    rows, columns = true.shape[2:]
    around = F.pad(drawn, (1, 1, 1, 1))
    shifted = [around[:, :, y : y + rows, x : x + columns] for y in range(3) for x in range(3)]
    return mean(torch.stack([(true * other).sum(1) for other in shifted]).amax(0).mean((1, 2)))


def colour_distance(drawn: torch.Tensor, true: torch.Tensor) -> Statistic:
    """The sliced Wasserstein distance of the colours of two sets, in hundredths of OKLab (2 is just visible).

    It compares the pixels of all pictures together, from `features.colours` of both sets, picture i of both for prompt
    i. Being a distance it is above zero, by chance alone, for small sets.
    """
    gap = (drawn - true).flatten(1)
    return Statistic(len(gap), lambda w: 100 * BIN_WIDTH / 16 * (w @ gap / w.sum(1, keepdim=True)).abs().sum(1))


def fidelity(drawn: torch.Tensor, true: torch.Tensor) -> tuple[Statistic, Statistic]:
    """How well pictures show their prompts, by comparison with the true pictures of all prompts: two shares.

    Returns:
        How many drawn pictures have no true picture nearer than their own prompt's (by chance: 1 / n), and the mean
        share of the other true pictures that are farther (by chance: 0.5).
    """
    alike = drawn @ true.T
    own = alike.diag()[:, None]
    farther = (alike < own).float().sum(1) / max(1, len(true) - 1)
    return mean((alike > own).sum(1) == 0), mean(farther)


def diversity(drawn: torch.Tensor, true: torch.Tensor) -> Statistic:
    """The mean distance between the pictures of two prompts, over that of the true ones; below 1 is more alike."""
    return mean_of_pairs(1 - drawn @ drawn.T) / mean_of_pairs(1 - true @ true.T)


def novelty(drawn: torch.Tensor, true: torch.Tensor, train: torch.Tensor) -> Statistic:
    """The mean distance to the nearest training picture, over that of the true pictures of the same prompts.

    Unseen pictures of the style have 1; a tuner that copies training pictures tends to 0.
    """

    def distance(x: torch.Tensor) -> Statistic:
        return mean(1 - (x @ train.T).amax(1))

    return distance(drawn) / distance(true)


@dataclass(frozen=True)
class Column:
    """A metric in the tables; `better` is 1 where more is better, -1 where less is, 0 where neither."""

    key: str
    title: str
    better: int
    form: str
    meaning: str


COLUMNS = (
    Column("error", "held-out error", -1, "{:.4f}", "mean squared error of the predicted noise on the held-out "
           "pictures, at 8 timesteps and fixed noise"),
    Column("similarity", "local similarity", 1, "{:.4f}", "cosine of the local features of the drawn and the true "
           "picture of a prompt, place by place, within one place of 16; 1 is alike"),
    Column("kid", "KID", -1, "{:.4f}", "kernel distance of the features of drawn and of true pictures; 0 is alike"),
    Column("colour", "colours", -1, "{:.2f}", "distance of the drawn from the true colours, in hundredths of OKLab"),
    Column("nearest", "prompt nearest", 1, "{:.1%}", "drawn pictures to which, of the true pictures of all held-out "
           "prompts, their own prompt's is the nearest"),
    Column("rank", "prompt rank", 1, "{:.1%}", "of the true pictures of other prompts, those farther away than the own "
           "prompt's; by chance 50 %"),
    Column("diversity", "diversity", 0, "{:.3f}", "mean distance between drawn pictures of two prompts, over that of "
           "the true ones"),
    Column("novelty", "novelty", 0, "{:.3f}", "memorisation: mean distance to the nearest training picture, over that "
           "of the true pictures; well below 1 is copying"),
    Column("forgetting", "forgetting", -1, "{:.3f}", "denoising error on the base's own pictures of prompts outside "
           "the style, over the base's; 1 is nothing forgotten"),
    Column("drift", "drift", -1, "{:.3f}", "feature distance from the base's picture of the same prompt and noise, for "
           "prompts outside the style"),
)  # fmt: skip


def all_metrics(drawn: Mapping[str, torch.Tensor], true: Mapping[str, torch.Tensor]) -> dict[str, Statistic]:
    """Every metric of one set of drawn pictures, by the keys of `COLUMNS`.

    Args:
        drawn: of the held-out prompts `features`, `local` and `colours`, and, where a model drew them, its denoising
            `errors` on the true pictures; for prompts outside the style `outside` (features) and `outside_errors`.
        true: of the true pictures `features`, `local` and `colours`, and `train`, the features of the training
            pictures, all of the VAE's reconstructions: a model's pictures are decoded by the VAE, whose blur would
            otherwise outweigh all other differences; of the base's pictures `outside` and `outside_errors`.
    """
    nearest, rank = fidelity(drawn["features"], true["features"])
    found = {
        "similarity": local_similarity(drawn["local"], true["local"]),
        "kid": kid(drawn["features"], true["features"]),
        "colour": colour_distance(drawn["colours"], true["colours"]),
        "nearest": nearest,
        "rank": rank,
        "diversity": diversity(drawn["features"], true["features"]),
        "novelty": novelty(drawn["features"], true["features"], true["train"]),
    }
    if "errors" in drawn:
        found["error"] = mean(drawn["errors"])
        found["forgetting"] = mean(drawn["outside_errors"]) / mean(true["outside_errors"])
        found["drift"] = mean((1 - (drawn["outside"] * true["outside"]).sum(1)).clamp(min=0))
    return found
