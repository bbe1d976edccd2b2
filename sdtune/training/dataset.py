"""Image-prompt pairs: a folder (or hub data set) in, encoded tensors out.

`read` finds every problem before any model is loaded and lists them at once; `encode` is handed the VAE
and the text encoder and runs each of them once over the whole set. Nothing is ever dropped silently.
"""

import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from .captions import CAPTION_SUFFIXES, METADATA, name_stem, normalize_name, read_sidecars, read_table
from .errors import DataError, printable, shorten_list
from .images import FORMATS, UNREAD_SUFFIXES, explain_image_error, open_file, open_image


@dataclass(frozen=True)
class Pair:
    """One image and its prompt. `open()` gives the upright RGB picture, alpha laid on white."""

    name: str
    caption: str
    open: Callable[[], Image.Image]


# -------------------------------------------------------------------------------------------- reading


def read_splits(source: str | Path, resolution: int, log: Callable[[str], None] = print) -> tuple[list, list]:
    """The training pairs and the held-out ones; as `read`, with the problems of both listed at once."""
    found, problems = [], []
    for split in ("train", "test"):
        try:
            found.append(read(source, resolution, split, log))
        except DataError as error:
            problems += [f"{split}: {p}" if split == "test" else p for p in error.problems]
            if not Path(source).expanduser().is_dir():
                break  # the other split has the same problem
    if problems:
        raise DataError(source, problems)
    return found[0], found[1]


def read(source: str | Path, resolution: int, split: str = "train", log: Callable[[str], None] = print) -> list[Pair]:
    """The image-prompt pairs of a folder or hub data set, sorted by file name.

    A folder holds images, also in subfolders, with captions in `metadata.jsonl` or `metadata.csv` (columns
    `file_name`, `text`), or beside each image in a .txt or .caption file. Where it has subfolders `train` or
    `test` (imagefolder splits), `split` chooses one; with `test` alone, the rest is "train". Hidden files are
    ignored. A hub id ("owner/name") needs the `datasets` extra.

    Args:
        resolution: side of the training pictures in pixels; an image whose shorter side is below half of it
            is a problem, one below it is told of.
        split: "train", or "test" for the held-out pairs; an absent "test" gives an empty list.
        log: gets a line for each thing that a user should know and that is no problem.

    Raises:
        DataError: with every problem: missing or empty captions, captions without an image, unreadable,
            truncated or too small images, malformed metadata, no image at all.
    """
    root = os.path.expanduser(source)
    if not os.path.exists(root):
        if re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)):
            return _read_hub(str(source), resolution, split, log)
        raise DataError(source, ["no such folder; expected a folder with images and captions, or a hub id owner/name"])
    if not os.path.isdir(root):
        raise DataError(source, ["this is a file; expected a folder with images and captions"])
    root, folder, problems, notes = Path(root), Path(root, split), [], []
    if os.path.isdir(folder):
        names = _files(folder, problems)
        if split == "train":
            _beside(root, problems, notes)
    elif split != "train":
        return []
    else:
        folder, names = root, [n for n in _files(root, problems) if not n.startswith("test/")]
    items = _find(folder, names, problems, notes)
    return _check(folder, items, resolution, problems, notes, log)


def _files(folder: Path, problems: list[str]) -> list[str]:
    """The names, relative to the folder, of all that is in it and not hidden, sorted."""
    names = []

    def closed(error: OSError):
        problems.append(f"{error.filename}: this folder cannot be opened ({error.strerror})")

    for here, folders, files in os.walk(folder, onerror=closed):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for path in (os.path.join(here, f) for f in folders):
            if os.path.islink(path):  # may lead in a circle
                problems.append(f"{path}: a link to a folder, not followed; put the folder itself here")
        names += [Path(here, f).relative_to(folder).as_posix() for f in files if not f.startswith(".")]
    return sorted(names)


def _kind(name: str) -> str:
    """table, caption, image or other."""
    suffix = os.path.splitext(name)[1].lower()
    if name.lower() in METADATA:
        return "table"
    if suffix in CAPTION_SUFFIXES:
        return "caption"
    return "image" if suffix in UNREAD_SUFFIXES or Image.registered_extensions().get(suffix) in FORMATS else "other"


def _beside(root: Path, problems: list[str], notes: list[str]) -> None:
    """What lies beside the folder train/: loose files were likely meant to be used, other folders may be splits."""
    outside = [n for n in _files(root, []) if not n.startswith(("train/", "test/")) and _kind(n) != "other"]
    for name in (n for n in outside if "/" not in n):
        problems.append(f"{name}: lies beside the folder train, so it is not used; move it into train, or elsewhere")
    if folders := dict.fromkeys(n.split("/")[0] for n in outside if "/" in n):
        notes.append(f"only the folders train and test are read, not {shorten_list(list(folders))}")


def _find(folder: Path, names: list[str], problems: list[str], notes: list[str]) -> list[tuple]:
    """(name, caption, function that gives the file's bytes) of each image; a caption is None if its lack is told."""
    tables, sidecars, images, others = (
        [n for n in names if _kind(n) == k] for k in ("table", "caption", "image", "other")
    )
    by_stem = {}
    for name in images:
        by_stem.setdefault(name_stem(name), []).append(name)
    if not tables:
        captions = read_sidecars(folder, sidecars, by_stem, problems, notes)
    elif len(tables) == 1:
        captions = read_table(folder / tables[0], problems)
    else:
        captions = None
        problems.append(f"{' and '.join(tables)}: both hold captions; keep one")
    if tables:
        double = [n for n in sidecars if name_stem(n) in by_stem]
        if double:
            problems.append(f"{', '.join(double)}: captions stand in {tables[0]} too; keep one of the two")
        others += [n for n in sidecars if n not in double]
    items = []
    for name in images:
        caption = None if captions is None else captions.pop(normalize_name(name), "")
        if caption == "":
            where = f"add it to {tables[0]}" if tables else f"write it into {os.path.splitext(name)[0]}.txt"
            problems.append(f"{name}: no caption, or an empty one; {where}")
        items.append((name, caption, (folder / name).read_bytes))
    for name in captions or ():
        problems.append(f"{name}: has a caption, but there is no such image; add the image or remove the caption")
    if others:
        notes.append(f"{len(others)} other files are not used: {shorten_list(others)}")
    return items


def _check(where, items, resolution: int, problems: list[str], notes: list[str], log) -> list[Pair]:
    """The pairs, each picture read once in full; raises if there is any problem, else logs the notes."""
    pairs, least = [], (resolution + 1) // 2
    remarks = {
        f"smaller than {resolution} px and will be enlarged": [],
        "not square; the middle of each is used": [],
        "animated or of several pages; the first picture of each is used": [],
    }
    for name, caption, content in tqdm(items, desc="checking images", disable=len(items) < 200, leave=False):
        for what, text in (("file name", name), ("caption", caption or "")):
            if re.search("[\ud800-\udfff]", text):
                problems.append(f"{name}: its {what} is not valid Unicode; write it anew")
        pairs.append(Pair(name, caption or "", lambda content=content: open_image(io.BytesIO(content()))))
        try:
            data = content()
            if not data:
                raise EOFError("the file is empty")
            with open_file(io.BytesIO(data)) as image:
                animated = getattr(image, "is_animated", False)
                width, height = open_image(image).size
        except Exception as error:  # decoders raise many kinds on damaged files
            problems.append(f"{name}: {explain_image_error(error)}")
            continue
        if min(width, height) < least:
            problems.append(f"{name}: {width} x {height} is too small; {resolution} px need {least} x {least} or more")
        for names, so in zip(remarks.values(), (min(width, height) < resolution, width != height, animated)):
            if so:
                names.append(name)
    if not items and not problems:
        problems.append("no images; expected files such as picture.png with captions")
    if problems:
        raise DataError(where, problems)
    for note in notes + [
        f"{len(names)} images are {what}: {shorten_list(names)}" for what, names in remarks.items() if names
    ]:
        log(printable(note))
    return pairs


def _read_hub(name: str, resolution: int, split: str, log) -> list[Pair]:
    nothing = "there is no such folder here, and"
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            name, [f'{nothing} for a hub data set "datasets" is missing: pip install sdtune[hub]']
        ) from error
    try:
        if split != "train" and split not in datasets.get_dataset_split_names(name):
            return []
        rows = datasets.load_dataset(name, split=split)
        column = next((c for c in ("text", "caption", "prompt") if c in rows.column_names), None)
        if "image" not in rows.column_names or column is None:
            raise DataError(name, [f"expected the columns image and text; found {', '.join(rows.column_names)}"])
        rows = rows.cast_column("image", datasets.Image(decode=False))  # the files' bytes, checked as a folder's are
        captions = list(rows[column])
    except DataError:
        raise
    except Exception as error:  # the hub client raises many kinds
        raise DataError(name, [f"{nothing} the hub does not give it ({error})"]) from error

    def content(i: int) -> bytes:
        file = rows[i]["image"] or {}
        return file.get("bytes") or (Path(file["path"]).read_bytes() if file.get("path") else b"")

    items, problems = [], []
    for i, caption in enumerate(captions):
        caption = caption.strip() if isinstance(caption, str) else ""
        if not caption:
            problems.append(f"row {i}: no caption, or an empty one")
        items.append((f"row {i}", caption, partial(content, i)))
    return _check(name, items, resolution, problems, [], log)
