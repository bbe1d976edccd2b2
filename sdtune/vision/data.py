"""Reads a classification data set: folders of classes, VTAB-1K's lists, CIFAR-100's binary, idx files, or the hub.

Every problem is collected and reported at once, before a model is loaded. Pictures are resized to a square when they
are read (both sides, bicubic, as NOAH does for VTAB-1K) and kept as bytes.
"""

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .. import paths
from ..training.errors import DataError, shorten_list
from ..training.images import explain_image_error, open_image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}
CIFAR_100 = ("train.bin", "test.bin", "fine_label_names.txt")
_KEPT = 2 * 2**30  # bytes of pictures of one split that are kept in memory


@dataclass
class Split:
    """Pictures and their classes; `open` gives picture i as an RGB image of any size."""

    name: str
    labels: list[int]
    open: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: list[int], name: str) -> "Split":
        return Split(name, [self.labels[i] for i in indices], lambda i: self.open(indices[i]))

    def __add__(self, other: "Split") -> "Split":
        own = len(self)
        both = lambda i: self.open(i) if i < own else other.open(i - own)  # noqa: E731
        return Split(f"{self.name} and {other.name}", self.labels + other.labels, both)


@dataclass
class Data:
    """A data set: `train` fits the weights, `val` chooses the settings, `test` is looked at once, at the end."""

    name: str
    classes: list[str]
    train: Split
    val: Split
    test: Split


class Pixels:
    """The pictures of a split as bytes (N, 3, side, side), read once if they fit into memory, else in every pass."""

    def __init__(self, split: Split, side: int, device: torch.device | str = "cpu"):
        self.split, self.side, self.device = split, side, device
        self.labels = torch.tensor(split.labels, device=device)
        fits = len(split) * 3 * side * side <= _KEPT
        self._all = self._read(range(len(split))).to(device) if fits else None

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        """indices: (B,) on the CPU -> (B, 3, side, side) bytes on the device."""
        if self._all is not None:
            return self._all[indices.to(self._all.device)]
        return self._read(indices.tolist()).to(self.device)

    def _read(self, indices) -> torch.Tensor:
        def one(i: int) -> torch.Tensor:
            image = self.split.open(i).resize((self.side, self.side), Image.Resampling.BICUBIC)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)

        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(one, indices)))


def read_data(source: str, val_share: float = 0.2, train_size: int | None = None, seed: int = 0) -> Data:
    """Reads a data set of any of the formats.

    - a folder of class folders, or `train` and `test` (and `val`) of such; without `test` a fifth is the test
    - VTAB-1K: `train800.txt`, `val200.txt`, `test.txt` with lines "path label", and the pictures they name; optionally
      `classes.txt` with a name a line
    - CIFAR-100's binary version: train.bin, test.bin, fine_label_names.txt
    - idx files as MNIST has them: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-..., also with .gz
    - owner/name of the hub, with an image and a label column (needs the extra `sdtune[hub]`)

    Args:
        source: the folder, or the hub id.
        val_share: share of the training pictures that becomes `val` where the data set has none, above 0, below 1.
        train_size: number of pictures of `train` and `val` together, drawn at random; default: all.
        seed: of the draws.

    Raises:
        DataError: listing every problem.
    """
    folder = paths.find(source)
    if folder is None or not folder.is_dir():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            name, classes, splits = source, *_read_hub(source)
        else:
            raise DataError(source, ["no such folder; expected a folder of classes, or a hub id owner/name"])
    else:
        name = folder.resolve().name
        if list(folder.glob("*-images-idx3-ubyte*")):
            classes, splits = read_idx(folder)
        elif any((folder / n).is_file() for n in CIFAR_100[:2]):
            classes, splits = _read_cifar(folder)
        elif any((folder / f"{n}.txt").is_file() for n in ("train800", "train800val200", "test")):
            classes, splits = _read_lists(folder)
        else:
            classes, splits = _read_folders(folder)
    problems = _problems(classes, splits)
    if problems:
        raise DataError(source, problems)
    random = np.random.default_rng(seed)
    if "test" not in splits:
        splits["train"], splits["test"] = _divide(splits["train"], 0.2, random, "test")
        if not len(splits["test"]):
            least = min(Counter(splits["train"].labels).values())
            raise DataError(source, [f"a fifth of each class is the test, but a class has {least} pictures; give each "
                                     "class three or more, or give a folder test"])  # fmt: skip
    if train_size is not None:
        parts = [name for name in ("train", "val") if name in splits]
        there = sum(len(splits[name]) for name in parts)
        if not 2 * len(classes) <= train_size <= there:
            reason = f"{len(classes)} classes (two pictures each at least) and {there} pictures"
            raise DataError(source, [f"a training size of {train_size} is not possible with {reason}"])
        for name in parts:
            splits[name], _ = _divide(splits[name], 1 - train_size / there, random, "rest")
    if "val" not in splits:
        splits["train"], splits["val"] = _divide(splits["train"], val_share, random, "val")
    return Data(name, classes, splits["train"], splits["val"], splits["test"])


def _divide(split: Split, share: float, random: np.random.Generator, name: str) -> tuple[Split, Split]:
    """A split without a random share of every class, and that share; each class keeps at least one picture."""
    labels, away = np.array(split.labels), []
    for label in np.unique(labels):
        own = random.permutation(np.flatnonzero(labels == label))
        away += own[: min(len(own) - 1, round(len(own) * share))].tolist()
    keep = sorted(set(range(len(labels))) - set(away))
    return split.subset(keep, split.name), split.subset(sorted(away), name)


def _problems(classes: list[str], splits: dict[str, Split]) -> list[str]:
    found = []
    if len(classes) < 2:
        found.append(f"{len(classes)} class found ({shorten_list(classes) or 'none'}); expected two or more")
    for name, split in splits.items():
        if not len(split):
            found.append(f"{name} has no pictures")
        outside = sorted({x for x in split.labels if not 0 <= x < len(classes)})
        if outside:
            found.append(
                f"{name}: labels {shorten_list(list(map(str, outside)))} are outside 0 to {len(classes) - 1}, the "
                f"numbers of the {len(classes)} classes"
            )
    trained = Counter(splits["train"].labels) + Counter(splits["val"].labels if "val" in splits else [])
    few = [c for i, c in enumerate(classes) if trained[i] == 1]
    if few:
        found.append(f"{len(few)} classes have a single training picture: {shorten_list(few)}; give each two or more")
    never = [c for i, c in enumerate(classes) if trained[i] == 0]
    if never and len(classes) > 1:
        found.append(f"{len(never)} classes have no training picture: {shorten_list(never)}")
    return found


def _image_split(name: str, files: list[Path], labels: list[int], root: Path) -> tuple[Split, list[str]]:
    """A split of image files, and a problem for every file that does not open."""

    def problem(path: Path) -> str | None:
        try:
            open_image(path)
        except Exception as error:  # Pillow raises many kinds
            return f"{path.relative_to(root)}: {explain_image_error(error)}"

    with ThreadPoolExecutor() as pool:
        problems = [p for p in pool.map(problem, files) if p]
    return Split(name, labels, lambda i: open_image(files[i])), problems


def _read_folders(folder: Path) -> tuple[list[str], dict[str, Split]]:
    named = {n: folder / n for n in ("train", "val", "test") if (folder / n).is_dir()}
    roots = named if "train" in named else {"train": folder}
    listed = {n: {p.name: _pictures(p) for p in sorted(r.iterdir()) if p.is_dir() and p.name[0] != "."}
              for n, r in roots.items()}  # fmt: skip
    classes, problems, splits = sorted(listed["train"]), [], {}
    loose = [p.name for r in roots.values() for p in r.iterdir() if p.suffix.lower() in SUFFIXES]
    if not classes:
        problems.append("no class folders found; expected a folder per class with its pictures")
    if loose:
        problems.append(f"{len(loose)} pictures are in no class folder: {shorten_list(sorted(loose))}")
    for name, own in listed.items():
        extra, missing = sorted(own.keys() - set(classes)), sorted(set(classes) - own.keys())
        if extra:
            problems.append(f"{name} has classes that train has not: {shorten_list(extra)}")
        if missing:
            problems.append(f"{name} lacks classes that train has: {shorten_list(missing)}")
        pairs = [(f, classes.index(c)) for c, files in own.items() if c in classes for f in files]
        splits[name], bad = _image_split(name, [f for f, _ in pairs], [i for _, i in pairs], folder)
        problems += bad
    problems += [p for p in _problems(classes, splits) if classes and problems]
    if problems:
        raise DataError(folder, problems)
    return classes, splits


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.name[0] != ".")


def _read_lists(folder: Path) -> tuple[list[str], dict[str, Split]]:
    """VTAB-1K as NOAH writes it: a text file per split with lines "images/test/000000.jpg 3"."""
    problems, rows = [], {}
    files = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
    if not (folder / "train800.txt").is_file():
        files = {"train": "train800val200.txt", "test": "test.txt"}
    for name, file in files.items():
        path = folder / file
        if not path.is_file():
            problems.append(f"{file} is missing; expected {', '.join(files.values())}")
            continue
        rows[name] = []
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            picture, _, label = line.strip().rpartition(" ")
            if not line.strip():
                continue
            if not picture or not label.isdecimal():
                problems.append(f"{file}, line {number}: {line.strip()[:60]!r} is not a path and a label")
            elif not (folder / picture).is_file():
                problems.append(f"{file}, line {number}: there is no {picture}")
            else:
                rows[name].append((folder / picture, int(label)))
    names = folder / "classes.txt"
    if names.is_file():
        classes = names.read_text().split("\n")
        classes = [c for c in classes if c.strip()]
    else:  # a label that only the test has is out of range
        classes = [str(i) for i in range(1 + max((x for n in rows if n != "test" for _, x in rows[n]), default=-1))]
    splits = {}
    for name, own in rows.items():
        splits[name], bad = _image_split(name, [f for f, _ in own], [i for _, i in own], folder)
        problems += bad
    if problems:
        raise DataError(folder, problems[:50] + ([f"and {len(problems) - 50} more"] if len(problems) > 50 else []))
    return classes, splits


def _array_split(name: str, pixels: np.ndarray, labels: np.ndarray) -> Split:
    return Split(name, labels.astype(int).tolist(), lambda i: Image.fromarray(pixels[i]).convert("RGB"))


def _read_cifar(folder: Path) -> tuple[list[str], dict[str, Split]]:
    """A row has the coarse label, the fine label, and 3 x 32 x 32 bytes (https://www.cs.toronto.edu/~kriz/cifar.html)."""
    missing = [n for n in CIFAR_100 if not (folder / n).is_file()]
    if missing:
        raise DataError(
            folder, [f"{n} is missing; CIFAR-100's binary version has {', '.join(CIFAR_100)}" for n in missing]
        )
    splits, problems = {}, []
    for name in ("train", "test"):
        content = np.fromfile(folder / f"{name}.bin", np.uint8)
        if len(content) % 3074 or not len(content):
            problems.append(f"{name}.bin has {len(content):,} bytes, no multiple of 3,074; it may be truncated")
            continue
        rows = content.reshape(-1, 3074)
        splits[name] = _array_split(name, rows[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 1])
    if problems:
        raise DataError(folder, problems)
    return (folder / CIFAR_100[2]).read_text().split(), splits


def read_idx(folder: Path) -> tuple[list[str], dict[str, Split]]:
    splits, problems = {}, []
    for name, prefix in (("train", "train"), ("test", "t10k")):
        arrays = []
        for kind, magic in (("images-idx3", 2051), ("labels-idx1", 2049)):
            file = next(iter(sorted(folder.glob(f"{prefix}-{kind}-ubyte*"))), None)
            if file is None:
                problems.append(f"{prefix}-{kind}-ubyte is missing (with or without .gz)")
                continue
            try:
                arrays.append(_read_idx_file(file, magic))
            except (OSError, ValueError, EOFError, zlib.error) as error:
                problems.append(f"{file.name}: {error}")
        if len(arrays) == 2 and len(arrays[0]) != len(arrays[1]):
            problems.append(f"{prefix}: {len(arrays[0])} pictures, but {len(arrays[1])} labels")
        elif len(arrays) == 2:
            splits[name] = _array_split(name, *arrays)
    if problems:
        raise DataError(folder, problems)
    return [str(i) for i in range(1 + max(splits["train"].labels, default=-1))], splits


def _read_idx_file(file: Path, magic: int) -> np.ndarray:
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    size = 4 * (1 + magic % 256)
    header = np.frombuffer(content[:size], ">i4")
    if len(content) < size or header[0] != magic or len(content) - size != int(np.prod(header[1:])):
        raise ValueError(f"no whole idx file: expected the number {magic} at its start and the length it states")
    return np.frombuffer(content, np.uint8, offset=size).reshape(header[1:])


def _read_hub(name: str) -> tuple[list[str], dict[str, Split]]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            name, ['no such folder; for a hub data set "datasets" is missing: pip install sdtune[hub]']
        ) from None
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # the library raises many kinds
        raise DataError(name, [f"cannot be had from the hub: {str(error).strip().splitlines()[0]}"]) from error
    columns = found["train"].features if "train" in found else {}
    image = next((c for c, f in columns.items() if isinstance(f, datasets.Image)), None)
    label = next((c for c, f in columns.items() if isinstance(f, datasets.ClassLabel)), None)
    if image is None or label is None:
        raise DataError(name, [f"expected a split train with an image and a class label column; found {list(columns)}"])
    names = {"train": "train", "validation": "val", "val": "val", "test": "test"}
    splits = {}
    for theirs, rows in found.items():
        if theirs in names:
            opener = lambda i, rows=rows: open_image(rows[i][image])  # noqa: E731
            splits[names[theirs]] = Split(names[theirs], list(rows[label]), opener)
    return list(columns[label].names), splits
