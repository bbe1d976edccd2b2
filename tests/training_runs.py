"""Helpers for tests of training: the settings of a run of a few seconds, and the weights in its checkpoints."""

from pathlib import Path

import torch
from safetensors.torch import load_file

import sdtune


def short_run(data, folder, **changes) -> sdtune.TrainConfig:
    """Settings for 4 steps that write to `folder`/run."""
    values = {
        "data": str(data), "output": str(folder / "run"), "steps": 4, "batch_size": 2, "preview_steps": 1,
        "preview_every": 0, "preview_prompts": ["a girl with blue hair"], "learning_rate": 1e-3, "resolution": 64,
    }  # fmt: skip
    return sdtune.TrainConfig(**{**values, **changes})


def last_checkpoint(output: Path) -> dict[str, torch.Tensor]:
    """The weights in the last checkpoint of a run."""
    return load_file(sorted(output.glob("checkpoints/step-*"))[-1] / "tuner.safetensors")


def have_equal_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
