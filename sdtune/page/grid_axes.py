"""The axes of a grid: which setting changes along an axis, and the values it takes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import sdtune

from .errors import PageError
from .png_settings import MAX_WEIGHT, Settings

AXES = ("adapter", "weight", "seed", "prompt", "guidance", "checkpoint")
_LARGEST = {"seed": 2**32 - 1, "weight": MAX_WEIGHT, "guidance": 30}


@dataclass(frozen=True)
class Axis:
    """One axis of a grid: the setting that changes ("" for none) and its values."""

    name: str
    values: list

    @property
    def chooses_adapter(self) -> bool:
        return self.name in ("adapter", "checkpoint")

    def titles(self) -> list[str]:
        """One title for each value."""
        if not self.name:
            return [""]
        if self.chooses_adapter:
            return [value or "base" for value in self.values]
        return [v if self.name == "prompt" else f"{self.name} {v:.10g}" for v in self.values]


def parse_axis(name: str, text: str, labels: Sequence[str]) -> Axis:
    """Makes an axis from the fields of the page.

    Args:
        text: the values of a weight, seed or guidance, separated by commas, or one prompt per line.
        labels: for the axes "adapter" and "checkpoint": labels of adapter files, "base" for the base alone.

    Raises:
        PageError: if there is no value, or one is not a number where a number is needed.
    """
    if not name:
        return Axis("", [None])
    if name not in AXES:
        raise PageError(f"{name[:40]!r} is not an axis. Choose one of {', '.join(AXES)}.")
    if name in ("adapter", "checkpoint"):
        values = ["" if label == "base" else label for label in labels or []]
    elif name == "prompt":
        values = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        values = [_parse_number(name, part) for part in re.split(r"[,;\s]+", text.strip()) if part]
    if not values:
        raise PageError(f"The axis {name} has no values. Enter at least one.")
    return Axis(name, values)


def _parse_number(name: str, text: str) -> float:
    try:
        number = int(text) if name == "seed" else float(text)
        if not (-_LARGEST[name] if name == "weight" else 0) <= number <= _LARGEST[name]:
            raise ValueError
    except ValueError:
        kind = "whole numbers" if name == "seed" else "numbers"
        raise PageError(f"{text[:20]!r} is not a valid {name}. Enter {kind} separated by commas.") from None
    return number


def make_cells(settings: Settings, across: Axis, down: Axis) -> list[sdtune.Cell]:
    """The cells of a grid, row by row; their adapters are named by label.

    The first column of `settings` holds the adapter that all cells are drawn with, unless an axis chooses it: then
    only its weight counts.
    """
    adapters = settings.columns[0] if settings.columns else {}
    cells = []
    for down_value in down.values:
        for across_value in across.values:
            changes = {"adapters": dict(adapters)}
            # the weight comes last, because it belongs to the adapter that the other axis may choose
            pairs = sorted([(across, across_value), (down, down_value)], key=lambda pair: pair[0].name == "weight")
            for axis, value in pairs:
                if axis.chooses_adapter:
                    weight = next(iter(adapters.values()), 1.0)
                    changes["adapters"] = {value: weight} if value else {}
                elif axis.name == "weight":
                    changes["adapters"] = dict.fromkeys(changes["adapters"], value)
                elif axis.name:
                    changes[axis.name] = value
            cells.append(
                sdtune.Cell(
                    **{"prompt": settings.prompt, "seed": settings.seed, "guidance": settings.guidance} | changes,
                    negative_prompt=settings.negative_prompt,
                    width=settings.width,
                    height=settings.height,
                    clip_skip=settings.clip_skip,
                )
            )
    return cells
