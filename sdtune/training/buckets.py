"""Aspect buckets: the shapes in which pictures are trained, and the order in which the shapes take their turns.

Each picture keeps its shape but for a sliver: it is scaled to about the area of the resolution's square and cropped to
the nearest of a few shapes. A batch holds pictures of one shape.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

# The VAE makes a picture 8 times smaller and the UNet of Stable Diffusion 1.x and 2.x again 8 times, so that every
# level has a whole size where sides are multiples of 64. At small resolutions that would leave too few shapes: then a
# side has at least 8 steps, and the UNet rounds the size of its lower levels up, as in drawing. All are multiples of 8.
LARGEST_STEP, LEAST_STEPS = 64, 8
SMALLEST_AREA, LARGEST_AREA = 0.8, 1.25  # of a shape, relative to the square of the resolution
MOST_OBLONG = 4.0  # the longest side of a shape, relative to its shortest


@dataclass(frozen=True)
class AspectBuckets:
    """The shapes, (width, height) in pixels, in which pictures are trained.

    Args:
        resolution: side of the square in pixels; about its area is the area of every shape.
        square: whether every picture is cropped to the square in its middle.
    """

    resolution: int
    square: bool = False

    def shape_for(self, size: tuple[int, int]) -> tuple[int, int]:
        """The shape for a picture of this size: least is cropped, and among equals the area is nearest to the square's.

        The square of the resolution is always one of the shapes. Between 1:3 and 3:1 at most 6.3 % is cropped; longer
        pictures than 4:1 lose what is beyond 4:1.
        """
        if self.square:
            return self.resolution, self.resolution
        area = self.resolution**2
        return min(
            _shapes(self.resolution),
            key=lambda s: (cropped_share(size, s) + 0.1 * abs(math.log(s[0] * s[1] / area)), s),
        )


@lru_cache(maxsize=16)
def _shapes(resolution: int) -> list[tuple[int, int]]:
    step = next(s for s in (LARGEST_STEP, 32, 16, 8) if s == 8 or s * LEAST_STEPS <= resolution)
    sides, area = range(step, 2 * resolution + 4 * step, step), resolution**2
    oblong = [
        (w, h)
        for w in sides
        for h in sides
        if SMALLEST_AREA <= w * h / area <= LARGEST_AREA and max(w, h) <= MOST_OBLONG * min(w, h)
    ]
    return [(resolution, resolution), *oblong]


def cropped_share(size: tuple[int, int], shape: tuple[int, int]) -> float:
    """The share of a picture's area, from 0 to 1, that is cut off when it fills a shape of another aspect ratio."""
    a, b = size[0] * shape[1], size[1] * shape[0]
    return 1 - min(a, b) / max(a, b)


def enlargement(size: tuple[int, int], shape: tuple[int, int]) -> float:
    """By how much a picture is scaled to fill a shape; above 1 it is enlarged."""
    return max(shape[0] / size[0], shape[1] / size[1])


def describe_shapes(names: Sequence[str], sizes: Sequence[tuple[int, int]], buckets: AspectBuckets) -> str:
    """How many pictures are trained in which shape, and how much of one is cropped at worst, as a sentence.

    It is empty if all are square.
    """
    shapes = [buckets.shape_for(size) for size in sizes]
    counts = Counter(shapes).most_common()
    lost = [cropped_share(size, shape) for size, shape in zip(sizes, shapes)]
    square = (buckets.resolution, buckets.resolution)
    if not counts or (set(shapes) == {square} and not any(lost)):
        return ""
    worst = max(range(len(lost)), key=lost.__getitem__)
    text = ", ".join(f"{count} of {w} x {h}" for (w, h), count in counts)
    cut = (
        f"at worst {lost[worst]:.1%} of a picture is cropped ({names[worst]})" if lost[worst] else "nothing is cropped"
    )
    return f"shapes in px: {text}; {cut}"


def choose_turn(sizes: Sequence[int], seed: int, step: int) -> tuple[int, int]:
    """Which bucket a step trains on, and how many turns that bucket has had before.

    In as many steps as there are pictures, each bucket has as many turns as it has pictures, spread evenly and in
    random order. A batch is always full, a bucket of one picture fills it with that picture at several timesteps; so
    each picture is trained on equally often, whatever its shape.

    Args:
        sizes: the number of pictures in each bucket.
        step: number of the step, from 0.
    """
    if len(sizes) == 1:
        return 0, step
    cycle, within = divmod(step, sum(sizes))
    order = _order_of_turns(tuple(sizes), seed, cycle)
    bucket = order[within]
    return bucket, cycle * sizes[bucket] + order[:within].count(bucket)


@lru_cache(maxsize=4)
def _order_of_turns(sizes: tuple[int, ...], seed: int, cycle: int) -> list[int]:
    generator = torch.Generator().manual_seed(mix_seed(seed, cycle, 3))
    times = torch.cat([(torch.arange(n) + torch.rand(n, generator=generator)) / n for n in sizes])
    owners = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return owners[times.argsort(stable=True)].tolist()


def mix_seed(seed: int, number: int, stream: int) -> int:
    """One seed for torch from three numbers, without the collisions of a plain sum."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) % 2**63
