"""sdtune: few-shot fine-tuning of Stable Diffusion with Res-Attn tuners (arXiv 2312.16916).

The public names are listed here and imported when first used, so that `import sdtune` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {
    "ResAttn": "tuners",
    "TunerConfig": "tuners",
    "load_tuner": "pipeline",
    "add_tuner": "pipeline",
    "save_tuner": "pipeline",
    "unload_tuner": "pipeline",
    "Cell": "drawing",
    "compare": "drawing",
    "draw_cells": "drawing",
    "load_base": "bases",
    "BaseError": "bases",
    "DataError": "data",
    "TunerFileError": "store",
    "TrainConfig": "config",
    "fit": "train",
}
__all__ = list(_HOME)
__version__ = "0.1.0"

if TYPE_CHECKING:
    from .bases import BaseError, load_base
    from .config import TrainConfig
    from .data import DataError
    from .drawing import Cell, compare, draw_cells
    from .pipeline import add_tuner, load_tuner, save_tuner, unload_tuner
    from .store import TunerFileError
    from .train import fit
    from .tuners import ResAttn, TunerConfig


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'sdtune' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
