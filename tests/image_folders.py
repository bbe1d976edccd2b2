"""Helpers for tests of data sets: write folders of images and captions, and read them with `dataset.read_pairs`."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdtune.training import dataset
from sdtune.training.buckets import AspectBuckets
from sdtune.training.errors import DataError

SIDE = 16
BUCKETS = AspectBuckets(SIDE)
RED = (200, 30, 40)


def write_image(path, size=(SIDE, SIDE), mode="RGB", color=RED, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


def write_caption(path, text="a girl") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_jsonl(folder, *rows) -> None:
    """Writes metadata.jsonl; a row is a dict, or a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def metadata_row(name, text="a girl") -> dict:
    return {"file_name": name, "text": text}


def read_captions(folder, split="train") -> dict[str, str]:
    """Image name -> caption."""
    return {p.name: p.caption for p in dataset.read_pairs(folder, BUCKETS, split, lambda _: None)}


def read_notes(folder, split="train", buckets=BUCKETS) -> list[str]:
    """The lines that are logged about a folder without problems."""
    lines = []
    dataset.read_pairs(folder, buckets, split, lines.append)
    return lines


def read_problems(folder, split="train") -> list[str]:
    """The problems of a folder that cannot be used."""
    with pytest.raises(DataError) as caught:
        dataset.read_pairs(folder, BUCKETS, split, lambda _: None)
    for line in caught.value.problems:
        assert line in str(caught.value) and line.isprintable()
    return caught.value.problems


def assert_only_problem(folder, *parts) -> None:
    """Asserts that a folder has one problem, whose line contains all `parts`."""
    (line,) = read_problems(folder)
    for part in parts:
        assert part in line


def read_image(folder, name) -> np.ndarray:
    """The image of one pair as an (h, w, 3) array; its caption file is written first."""
    write_caption(folder / (os.path.splitext(name)[0] + ".txt"))
    (pair,) = (p for p in dataset.read_pairs(folder, BUCKETS, log=lambda _: None) if p.name == name)
    image = pair.open()
    assert image.mode == "RGB"
    return np.asarray(image)


def assert_pairs_or_problems(files: dict[str, bytes | None]) -> None:
    """Asserts that a folder of a.png, b.png and `files` gives a pair for each image, or a DataError.

    Args:
        files: the content of each file; None for a good image.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in {"a.png": None, "b.png": None, **files}.items():
            if content is None:
                write_image(folder / file)
            else:
                (folder / file).write_bytes(content)
        try:
            found = dataset.read_pairs(folder, BUCKETS, log=lambda line: line.encode())
        except DataError as error:
            assert error.problems
            str(error).encode()
        else:
            assert len(found) == sum(Path(f).suffix == ".png" for f in {"a.png", "b.png", *files})
            assert all(p.caption.encode() and p.open().size == (SIDE, SIDE) for p in found)
