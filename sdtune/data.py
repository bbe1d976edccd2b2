"""Image-prompt pairs: a folder (or hub data set) in, encoded tensors out.

`read` finds every problem before any model is loaded and lists them at once; `encode` is handed the VAE
and the text encoder and runs each of them once over the whole set. Nothing is ever dropped silently.
"""

import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_SUFFIXES = (".txt", ".caption")
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "PPM", "TGA", "ICO")
# Files that users take for pictures and that are not read: told as problems, where other files are only mentioned.
_FOREIGN = set(".heic .heif .jxl .svg .psd .xcf .eps .raw .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf".split())


class DataError(ValueError):
    """A data set that cannot be used; `problems` lists every one found, each on one line and naming its file."""

    def __init__(self, where, problems: list[str]):
        self.problems = [_plain(p) for p in problems]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{_plain(str(where))}: {count}\n" + "\n".join(f"  - {p}" for p in self.problems))


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
    return "image" if suffix in _FOREIGN or Image.registered_extensions().get(suffix) in _FORMATS else "other"


def _beside(root: Path, problems: list[str], notes: list[str]) -> None:
    """What lies beside the folder train/: loose files were likely meant to be used, other folders may be splits."""
    outside = [n for n in _files(root, []) if not n.startswith(("train/", "test/")) and _kind(n) != "other"]
    for name in (n for n in outside if "/" not in n):
        problems.append(f"{name}: lies beside the folder train, so it is not used; move it into train, or elsewhere")
    if folders := dict.fromkeys(n.split("/")[0] for n in outside if "/" in n):
        notes.append(f"only the folders train and test are read, not {_some(list(folders))}")


def _find(folder: Path, names: list[str], problems: list[str], notes: list[str]) -> list[tuple]:
    """(name, caption, function that gives the file's bytes) of each image; a caption is None if its lack is told."""
    tables, sidecars, images, others = (
        [n for n in names if _kind(n) == k] for k in ("table", "caption", "image", "other")
    )
    by_stem = {}
    for name in images:
        by_stem.setdefault(_stem(name), []).append(name)
    if not tables:
        captions = _read_sidecars(folder, sidecars, by_stem, problems, notes)
    elif len(tables) == 1:
        captions = _read_table(folder / tables[0], problems)
    else:
        captions = None
        problems.append(f"{' and '.join(tables)}: both hold captions; keep one")
    if tables:
        double = [n for n in sidecars if _stem(n) in by_stem]
        if double:
            problems.append(f"{', '.join(double)}: captions stand in {tables[0]} too; keep one of the two")
        others += [n for n in sidecars if n not in double]
    items = []
    for name in images:
        caption = None if captions is None else captions.pop(_key(name), "")
        if caption == "":
            where = f"add it to {tables[0]}" if tables else f"write it into {os.path.splitext(name)[0]}.txt"
            problems.append(f"{name}: no caption, or an empty one; {where}")
        items.append((name, caption, (folder / name).read_bytes))
    for name in captions or ():
        problems.append(f"{name}: has a caption, but there is no such image; add the image or remove the caption")
    if others:
        notes.append(f"{len(others)} other files are not used: {_some(others)}")
    return items


def _key(name: str) -> str:
    # macOS writes accents and Japanese voicing marks of file names decomposed, metadata has them composed.
    return unicodedata.normalize("NFC", Path(name).as_posix())


def _stem(name: str) -> str:
    return os.path.splitext(_key(name))[0]


def _read_text(path: Path, name: str, problems: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        problems.append(f"{name}: is not UTF-8 text (byte {error.start}); save it as UTF-8")
    except OSError as error:
        problems.append(f"{name}: cannot be opened ({error.strerror})")
    return None


def _read_sidecars(folder: Path, files, by_stem: dict[str, list[str]], problems, notes) -> dict[str, str | None]:
    """Image -> caption from the caption files; None where a problem is told already."""
    captions, used = {}, {}
    for name in files:
        text, images = _read_text(folder / name, name, problems), by_stem.get(_stem(name))
        if not images:
            problems.append(f"{name}: a caption file without an image; add the image or remove the file")
            continue
        first = used.setdefault(_stem(name), name)
        if first != name:
            problems.append(f"{first}, {name}: two caption files for {images[0]}; keep one")
        elif len(images) > 1:
            notes.append(f"{', '.join(images)} share the caption in {name}")
        captions |= dict.fromkeys(map(_key, images), text and text.strip())
    return captions


def _read_table(path: Path, problems: list[str]) -> dict[str, str | None] | None:
    """Image -> caption from a metadata file, None where a problem is told already, or for the whole file."""
    text = _read_text(path, path.name, problems)
    if text is None:
        return None
    captions: dict[str, str | None] = {}
    for number, line, row in (_csv_rows if path.suffix.lower() == ".csv" else _json_rows)(text):
        where = f"{path.name}, line {number}"
        name, caption = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
        if isinstance(row, ValueError):
            problems.append(f"{where}: {row}; found {line[:80]}")
        elif not isinstance(name, str) or not name.strip():
            problems.append(f"{where}: expected file_name and text, both strings; found {line[:80]}")
        elif Path(name).is_absolute() or ".." in Path(name).parts:
            problems.append(f"{where}: {name} lies outside the folder; give names relative to it")
        elif _key(name) in captions:
            problems.append(f"{where}: {name} has a caption already; keep one line for each image")
        elif not isinstance(caption, str):
            captions[_key(name)] = None
            problems.append(f"{where}: {name} needs a text, a string; found {line[:80]}")
        else:
            captions[_key(name)] = caption.strip()
    return captions


def _json_rows(text: str):
    """(line number, line, its value or a ValueError) of JSON lines."""
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also split at U+2028 inside a caption
        if line.strip():
            try:
                yield number, line, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, line, ValueError(f"not valid JSON ({error})")


def _csv_rows(text: str):
    """The same of CSV, whose first row names the columns."""
    # strict: an unclosed quote would otherwise swallow the rows after it.
    reader, columns, end = csv.reader(io.StringIO(text), strict=True), None, 0
    try:
        for values in reader:
            number, end, line = end + 1, reader.line_num, ",".join(values)
            if not line.strip(", \t"):
                continue
            if columns is None:
                columns = [v.strip() for v in values]
                if not {"file_name", "text"} <= set(columns):
                    yield number, line, ValueError("expected the columns file_name,text")
                    return
            elif len(values) > len(columns):
                yield number, line, ValueError('more values than columns; put "" around a text with commas')
            else:
                yield number, line, dict(zip(columns, values))
    except csv.Error as error:
        yield end + 1, text.split("\n")[end], ValueError(f"not valid CSV ({error}), so the rest is not read")


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
            with _open(io.BytesIO(data)) as image:
                animated = getattr(image, "is_animated", False)
                width, height = open_image(image).size
        except Exception as error:  # decoders raise many kinds on damaged files
            problems.append(f"{name}: {_sentence(error)}")
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
    for note in notes + [f"{len(names)} images are {what}: {_some(names)}" for what, names in remarks.items() if names]:
        log(_plain(note))
    return pairs


def _sentence(error: Exception) -> str:
    """What is wrong with a picture that does not open, and what to do."""
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels, more than {2 * Image.MAX_IMAGE_PIXELS:,}; make it smaller"
    if isinstance(error, UnidentifiedImageError):
        return "damaged, or of a format that is not read; save it as PNG or JPEG"
    if isinstance(error, OSError) and error.filename:
        return f"cannot be opened ({error.strerror}); check the link or the permissions"
    return f"damaged or truncated ({error}); copy or save it again"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _plain(text: str) -> str:
    # File names and metadata may hold newlines, terminal codes and bytes that no terminal can print.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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


def _open(file: str | Path | BinaryIO) -> Image.Image:
    Image.init()
    return Image.open(file, formats=[f for f in _FORMATS if f in Image.OPEN])


def open_image(source: str | Path | BinaryIO | Image.Image) -> Image.Image:
    """An upright RGB picture: EXIF rotation applied, 16 bits brought to 8, alpha laid on white.

    Raises:
        OSError, ValueError, or another exception of Pillow's: if the file is damaged or of a format not read.
    """
    image = source if isinstance(source, Image.Image) else _open(source)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit and float greys, which convert("RGB") would clip
        grey = np.nan_to_num(np.asarray(image).astype(np.float32))
        most = float(grey.max())
        top = next((t for t in ((1, 255, 65535) if image.mode == "F" else (65535,)) if most <= t), most)
        grey[grey == image.info.get("transparency")] = top
        return Image.fromarray((grey / top * 255).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ------------------------------------------------------------------------------------------- encoding


@dataclass
class Encoded:
    """A whole data set, ready for training, on one device.

    Attributes:
        names: of the images, for messages.
        mean, std: the VAE's moments, scaled, (n, flips, channels, h, w); flips is 2 when flipping, else 1.
        text: caption encodings (n, tokens, width).
        empty: the encoding of the empty caption (1, tokens, width).
    """

    names: list[str]
    mean: torch.Tensor
    std: torch.Tensor
    text: torch.Tensor
    empty: torch.Tensor

    def to(self, device, dtype) -> "Encoded":
        """The same on a device; the text in `dtype`, the moments in fp32."""
        return Encoded(
            self.names, self.mean.to(device), self.std.to(device),
            self.text.to(device, dtype), self.empty.to(device, dtype),
        )  # fmt: skip


def to_square(image: Image.Image, side: int) -> Image.Image:
    """The middle square of an image at side x side pixels."""
    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)


@torch.no_grad()
def encode(
    pairs: list[Pair], vae, tokenizer, text_encoder, resolution: int, flip: bool = False, trigger_words: str = ""
) -> Encoded:
    """Runs the VAE over every image and the text encoder over every caption, once, in the models' dtype.

    The VAE's moments are kept, not one sample of them; with `flip` both the image and its mirror image.
    `trigger_words` are put before every caption. The result is on the models' device.

    Raises:
        DataError: naming every image whose encoding is not finite.
    """
    device, moments = vae.device, []
    for pair in tqdm(pairs, desc="encoding images", leave=False, disable=len(pairs) < 20):
        x = torch.from_numpy(np.asarray(to_square(pair.open(), resolution), dtype=np.float32).copy())
        x = x.permute(2, 0, 1).div(127.5).sub(1).to(device)
        batch = torch.stack([x, x.flip(-1)] if flip else [x])
        posterior = vae.encode(batch.to(vae.dtype)).latent_dist
        moments.append((posterior.mean.float(), posterior.std.float()))
    bad = [p.name for p, (m, s) in zip(pairs, moments) if not (torch.isfinite(m).all() and torch.isfinite(s).all())]
    if bad:
        raise DataError("encoding", [f"{name}: the VAE's encoding of it is not finite" for name in bad])
    scale = vae.config.scaling_factor
    texts = [f"{trigger_words} {p.caption}".strip() for p in pairs]
    return Encoded(
        [p.name for p in pairs],
        torch.stack([m for m, _ in moments]) * scale,
        torch.stack([s for _, s in moments]) * scale,
        encode_text(texts, tokenizer, text_encoder),
        encode_text([""], tokenizer, text_encoder),
    )


@torch.no_grad()
def encode_text(texts: list[str], tokenizer, text_encoder) -> torch.Tensor:
    """The text encoder's last hidden states (n, tokens, width) of some captions, each caption once."""
    unique = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    ids = tokenizer(
        list(unique), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    states = torch.cat([text_encoder(part.to(text_encoder.device))[0] for part in ids.split(32)])
    return states[[unique[t] for t in texts]]


def truncated(pairs: list[Pair], tokenizer, trigger_words: str = "") -> list[str]:
    """The names of the pairs whose caption is longer than the text encoder reads."""
    most = tokenizer.model_max_length
    return [p.name for p in pairs if len(tokenizer(f"{trigger_words} {p.caption}".strip()).input_ids) > most]
