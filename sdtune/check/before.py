"""A set of pictures before a training: what is worth a look at each of them, and what holds for all."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..training import dataset
from ..training.buckets import AspectBuckets, cropped_share, enlargement
from ..training.dataset import Pair
from ..training.images import crop_to_shape
from .pictures import BLURRED, blur, find_alike
from .sheet import THUMBNAIL_SIDE, Card

FEW = 5  # pictures; below it the tuner learns the pictures rather than what they share


@dataclass(frozen=True)
class SetReport:
    """What was found in a set.

    Attributes:
        pairs, heldout: that are trained on, and that are held out.
        lines: sentences about the set.
        cards: a card for each picture, as it is trained, in the order of the files, those of test/ last.
    """

    pairs: list[Pair]
    heldout: list[Pair]
    lines: list[str]
    cards: list[Card]

    @property
    def noted(self) -> list[Card]:
        """The cards of the pictures that are worth a look."""
        return [card for card in self.cards if card.noted]


def check_set(source: str, buckets: AspectBuckets) -> SetReport:
    """Looks at every picture and caption of a folder or hub data set as `dataset.read_splits` reads it.

    Raises:
        DataError: with every problem that prevents a training.
    """
    lines: list[str] = []
    train, test = dataset.read_splits(source, buckets, lines.append)
    lines.insert(0, f"{len(train)} pictures" + (f" and {len(test)} held-out ones" if test else ""))
    if len(train) < FEW:
        lines.append(f"{len(train)} pictures are few: {FEW} to 50 of one subject or style are usual")
    report = SetReport(train, test, lines, check_pairs(train, buckets) + check_pairs(test, buckets, "test", train))
    lines.append(f"{len(report.noted)} pictures are worth a look" if report.noted else "no picture is out of line")
    return report


def check_pairs(pairs: list[Pair], buckets: AspectBuckets, split: str = "", train: Sequence[Pair] = ()) -> list[Card]:
    """A card for each pair.

    Args:
        split: "test" for held-out pairs, whose titles begin with it.
        train: for held-out pairs, those that are trained on.
    """
    alike, copied = find_alike(pairs, pairs), find_alike(pairs, train)
    repeated = _same_captions(pairs)
    cards = []
    for pair in pairs:
        shape = buckets.shape_for(pair.size)
        trained = crop_to_shape(pair.open(), shape)
        remarks = []
        if pair.name in copied:
            other, what = copied[pair.name]
            remarks.append(f"it is {what} {other}, which is trained on: then the held-out loss says little")
        if pair.name in alike:
            other, what = alike[pair.name]
            remarks.append(f"it is {what} {other}")
        scale = enlargement(pair.size, shape)
        if scale > 1.1:
            remarks.append(f"it is small, {pair.size[0]} x {pair.size[1]}, and enlarged {scale:.1f} times")
        if (found := blur(trained)) >= BLURRED:
            remarks.append(f"it is blurred ({found:.2f} from 0 to 1; sharp ones have less than {BLURRED})")
        if remark := _describe_crop(pair.size, shape):
            remarks.append(remark)
        if pair.open_mask and (share := _unmasked_share(pair, shape)) < 0.1:
            remarks.append(f"its mask leaves {share:.0%} of it")
        if pair.name in repeated:
            remarks.append(f"its caption says the same as that of {repeated[pair.name]}")
        text = "; ".join(remarks)
        text = text[:1].upper() + text[1:] + "." if text else "Nothing to remark."
        trained.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
        cards.append(Card(trained, f"{split}/{pair.name}" if split else pair.name, text, bool(remarks)))
    return cards


def _describe_crop(size: tuple[int, int], shape: tuple[int, int]) -> str:
    """What is cut off, if it is 2 % or more."""
    lost = cropped_share(size, shape)
    if lost < 0.02:
        return ""
    sides = "left and right" if size[0] * shape[1] > size[1] * shape[0] else "top and bottom"
    return f"{lost:.0%} of it is cut off, at {sides}"


def _unmasked_share(pair: Pair, shape: tuple[int, int]) -> float:
    """The share of a picture that its mask leaves, from 0 to 1, after cropping."""
    return float(np.asarray(crop_to_shape(pair.open_mask(), shape), np.float32).mean() / 255)


def _same_captions(pairs: Sequence[Pair]) -> dict[str, str]:
    """The names of pairs whose caption has the same words as an earlier one's, in any order, and the name of that."""
    first, found = {}, {}
    for pair in pairs:
        words = " ".join(sorted(set(re.findall(r"\w+", pair.caption.lower()))))
        if words in first:
            found[pair.name] = first[words]
        first.setdefault(words, pair.name)
    return found
