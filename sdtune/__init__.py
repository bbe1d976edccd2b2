"""sdtune: few-shot fine-tuning of Stable Diffusion with Res-Attn tuners (arXiv 2312.16916).

The public names are listed here and imported when first used, so that `import sdtune` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .adapters.peft_registration import register_with_peft

_MODULES = {
    "ResAttn": "tuners",
    "TunerConfig": "tuners",
    "load_tuner": "adapters.api",
    "add_tuner": "adapters.api",
    "save_tuner": "adapters.api",
    "unload_tuner": "adapters.api",
    "ResAttnConfig": "adapters.peft_config",
    "push_to_hub": "adapters.hub",
    "TunerFileError": "adapters.tuner_file",
    "load_base": "bases.load",
    "BaseError": "bases.errors",
    "encode_prompt": "inference.prompts",
    "Cell": "inference.compare",
    "compare": "inference.compare",
    "draw_cells": "inference.compare",
    "TrainConfig": "training.config",
    "DataError": "training.errors",
    "fit": "training.fit",
}
__all__ = list(_MODULES)
__version__ = "0.1.0"

if TYPE_CHECKING:
    from .adapters.api import add_tuner, load_tuner, save_tuner, unload_tuner
    from .adapters.hub import push_to_hub
    from .adapters.peft_config import ResAttnConfig
    from .adapters.tuner_file import TunerFileError
    from .bases.errors import BaseError
    from .bases.load import load_base
    from .inference.compare import Cell, compare, draw_cells
    from .inference.prompts import encode_prompt
    from .training.config import TrainConfig
    from .training.errors import DataError
    from .training.fit import fit
    from .tuners import ResAttn, TunerConfig


register_with_peft()


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'sdtune' has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
