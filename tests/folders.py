"""Makes folders of pictures and captions for the tests, reads them with `data.read`, and makes a file to be wary of."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sdtune
from sdtune.adapters import tuner_file
from sdtune.training import dataset
from sdtune.training.errors import DataError

SIDE = 16
RED = (200, 30, 40)
HOSTILE = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"


def put(path, size=(SIDE, SIDE), mode="RGB", color=RED, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


def sidecar(path, text="a girl") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def jsonl(folder, *rows) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def row(name, text="a girl") -> dict:
    return {"file_name": name, "text": text}


def pairs(folder, split="train") -> dict[str, str]:
    return {p.name: p.caption for p in dataset.read(folder, SIDE, split, lambda _: None)}


def notes(folder, split="train") -> list[str]:
    lines = []
    dataset.read(folder, SIDE, split, lines.append)
    return lines


def problems(folder, split="train") -> list[str]:
    with pytest.raises(DataError) as caught:
        dataset.read(folder, SIDE, split, lambda _: None)
    for line in caught.value.problems:
        assert line in str(caught.value) and line.isprintable()
    return caught.value.problems


def only_problem(folder, *parts) -> None:
    (line,) = problems(folder)
    for part in parts:
        assert part in line


def opened(folder, name) -> np.ndarray:
    """The picture of one pair as an (h, w, 3) array."""
    sidecar(folder / (os.path.splitext(name)[0] + ".txt"))
    (pair,) = (p for p in dataset.read(folder, SIDE, log=lambda _: None) if p.name == name)
    image = pair.open()
    assert image.mode == "RGB"
    return np.asarray(image)


def a_misfit(path: Path) -> None:
    """A tuner for a base of another shape, with metadata that wants to be HTML."""
    base = {"name": HOSTILE, "shape": {"cross_attention_dim": 768}}
    tuner_file.save(path, tuner_file.TunerFile(sdtune.TunerConfig(), {"a.b": torch.zeros(2)}, base, HOSTILE))
