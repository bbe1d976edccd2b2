"""Tuners and LoRAs with as many trainable parameters as another, for fair comparisons."""

import math

from ..tuners.config import TunerConfig
from .api import expected_shapes


def count_parameters(unet, config: TunerConfig) -> int:
    """How many trainable parameters a tuner of this configuration has on this UNet."""
    return sum(math.prod(shape) for shape in expected_shapes(unet, config).values())


def match_parameters(unet, setting: str, target: TunerConfig | None = None, **others) -> TunerConfig:
    """A configuration with about as many parameters as another, as nearly as a whole number allows.

    Args:
        setting: the field of `TunerConfig` to choose, "rank" or "length", from 1 to 1024.
        target: the configuration to match; by default Res-Attn 4x4 on attn1, attn2 and ff.
        others: the other fields of the configuration.
    """
    wanted = count_parameters(unet, target or TunerConfig())
    # the count grows linearly with the setting
    one, two = (count_parameters(unet, TunerConfig(**others, **{setting: n})) for n in (1, 2))
    return TunerConfig(**others, **{setting: min(1024, max(1, round(1 + (wanted - one) / (two - one))))})
