"""Helpers for tests of the page: tuner files that it must handle with care."""

from pathlib import Path

import torch

import sdtune
from sdtune.adapters import tuner_file

HTML_TEXT = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"


def save_tuner_of_another_base(path: Path) -> None:
    """Saves a tuner for a base of another shape, whose metadata contain HTML that must not be executed."""
    base = {"name": HTML_TEXT, "shape": {"cross_attention_dim": 768}}
    tuner_file.save(path, tuner_file.TunerFile(sdtune.TunerConfig(), {"a.b": torch.zeros(2)}, base, HTML_TEXT))
