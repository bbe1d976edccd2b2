"""Image-prompt pairs: a folder (or hub data set) in, encoded tensors out.

`read` finds every problem before any model is loaded and lists them at once; `encode` is handed the VAE
and the text encoder and runs each of them once over the whole set. Nothing is ever dropped silently.
"""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv")
# Pictures that Pillow cannot read: told, not passed over.
_UNREADABLE = {".heic", ".heif", ".jxl", ".svg", ".psd", ".raw", ".dng", ".cr2", ".nef", ".arw", ".xcf", ".mp4", ".webm"}


class DataError(ValueError):
    """A data set that cannot be used; `problems` lists every one found, each naming its file."""

    def __init__(self, where, problems: list[str]):
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{where}: {count}\n" + "\n".join(f"  - {p}" for p in problems))


@dataclass(frozen=True)
class Pair:
    """One image and its prompt. `open()` gives the upright RGB picture, alpha laid on white."""

    name: str
    caption: str
    open: Callable[[], Image.Image]


def read(source: str | Path, resolution: int, split: str = "train", log: Callable[[str], None] = print) -> list[Pair]:
    """The image-prompt pairs of a folder or hub data set, sorted by file name.

    A folder holds images with captions in `metadata.jsonl` or `metadata.csv` (columns `file_name`, `text`),
    or beside each image in a .txt or .caption file. Where it has subfolders `train` and `test` (imagefolder
    splits), `split` chooses one. A hub id ("owner/name") needs the `datasets` extra.

    Args:
        resolution: side of the training pictures in pixels; an image whose shorter side is below half of it
            is a problem, one below it is told of.
        split: "train", or "test" for the held-out pairs; an absent "test" gives an empty list.
        log: gets a line for each thing that a user should know and that is no problem.

    Raises:
        DataError: with every problem: missing or empty captions, captions without an image, unreadable,
            truncated or too small images, malformed metadata, no image at all.
    """
    folder = Path(source).expanduser()
    if not folder.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not str(source).startswith("."):
            return _read_hub(str(source), resolution, split, log)
        raise DataError(source, ["there is no such folder; expected a folder with images and captions, or a hub id"])
    if not folder.is_dir():
        raise DataError(source, ["this is a file; expected a folder with images and captions"])
    if (folder / split).is_dir():
        folder = folder / split
    elif split != "train":
        return []
    captions, images, problems = _find(folder)
    pairs, small, cropped = [], [], []
    for name in tqdm(images, desc="checking images", disable=len(images) < 200, leave=False):
        caption = captions.get(name)
        if caption is None:
            problems.append(f"{name}: no caption; add it to {METADATA[0]}, or write {Path(name).with_suffix('.txt')}")
        elif not caption.strip():
            problems.append(f"{name}: its caption is empty")
        size, problem = _check_image(folder / name, resolution)
        if problem:
            problems.append(f"{name}: {problem}")
        elif min(size) < resolution:
            small.append(name)
        if size and size[0] != size[1]:
            cropped.append(name)
        pairs.append(Pair(name, (caption or "").strip(), lambda p=folder / name: open_image(p)))
    for name in sorted(captions.keys() - set(images)):
        problems.append(f"{name}: has a caption, but there is no such image")
    if not images and not problems:
        problems.append("no images; expected files such as picture.png with captions")
    if problems:
        raise DataError(folder, problems)
    _tell(small, cropped, resolution, log)
    return pairs


def _tell(small: list[str], cropped: list[str], resolution: int, log) -> None:
    if small:
        log(f"{len(small)} images are smaller than {resolution} px and will be enlarged: {', '.join(small[:5])}")
    if cropped:
        log(f"{len(cropped)} images are not square; the middle of each is used: {', '.join(cropped[:5])}")


def _find(folder: Path) -> tuple[dict[str, str], list[str], list[str]]:
    """(captions by file name, image names, problems) of a folder."""
    readable = {e for e, f in Image.registered_extensions().items() if f in Image.OPEN}
    problems, images, sidecars = [], [], {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in Path(name).parts) or not path.is_file():
            continue
        suffix = path.suffix.lower()
        if suffix in CAPTION_SUFFIXES:
            sidecars[name] = path
        elif suffix in readable and suffix not in (".pdf", ".mpg", ".mpeg", ".eps", ".ps"):
            images.append(name)
        elif suffix in _UNREADABLE:
            problems.append(f"{name}: {suffix} images cannot be read; convert it to PNG or JPEG")
    tables = [m for m in METADATA if (folder / m).is_file()]
    if len(tables) == 2:
        return {}, images, problems + [f"both {METADATA[0]} and {METADATA[1]} are there; keep one"]
    if tables:
        captions = _read_table(folder / tables[0], problems)
        stems = {str(Path(i).with_suffix("")) for i in images}
        double = [n for n in sidecars if str(Path(n).with_suffix("")) in stems]
        if double:
            problems.append(f"captions stand in {tables[0]} and also in {', '.join(double[:5])}; keep one of the two")
        return captions, images, problems
    captions, by_stem = {}, {}
    for name in images:
        by_stem.setdefault(str(Path(name).with_suffix("")), []).append(name)
    for stem, same in by_stem.items():
        if len(same) > 1 and any(stem + s in sidecars for s in CAPTION_SUFFIXES):
            problems.append(f"{', '.join(same)}: images that share one caption file; rename all but one")
    for name, path in sidecars.items():
        owners = by_stem.get(str(Path(name).with_suffix("")))
        if not owners:
            problems.append(f"{name}: a caption file without an image")
            continue
        try:
            text = path.read_text(encoding="utf-8-sig").strip()
        except (UnicodeDecodeError, OSError) as error:
            problems.append(f"{name}: not readable as UTF-8 text ({error})")
            text = "unreadable"
        if owners[0] in captions:
            problems.append(f"{owners[0]}: has both a .txt and a .caption file; keep one")
        for owner in owners:
            captions[owner] = text
    return captions, images, problems


def _read_table(path: Path, problems: list[str]) -> dict[str, str]:
    """file_name -> text of a metadata file; what is wrong with it goes into `problems`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        problems.append(f"{path.name}: not readable as UTF-8 text ({error})")
        return {}
    rows: list[tuple[int, object]] = []
    if path.suffix == ".csv":
        reader = csv.DictReader(text.splitlines())
        try:
            rows = [(reader.line_num, row) for row in reader]
        except csv.Error as error:
            problems.append(f"{path.name}, line {reader.line_num}: not valid CSV ({error})")
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    rows.append((number, json.loads(line)))
                except (ValueError, RecursionError) as error:
                    problems.append(f"{path.name}, line {number}: not valid JSON ({error})")
    captions: dict[str, str] = {}
    for number, row in rows:
        where = f"{path.name}, line {number}"
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not isinstance(row.get("text"), str):
            problems.append(f"{where}: expected the fields file_name and text, both strings; found {str(row)[:80]}")
            continue
        name = Path(name).as_posix()
        if Path(name).is_absolute() or ".." in Path(name).parts:
            problems.append(f"{where}: {name} lies outside the folder")
        elif name in captions:
            problems.append(f"{where}: {name} stands there twice")
        else:
            captions[name] = row["text"]
    return captions


def _check_image(path: Path, resolution: int) -> tuple[tuple[int, int] | None, str | None]:
    """(size, problem) of an image file, reading all of it."""
    try:
        with Image.open(path) as image:
            image.load()
            size = image.size
    except Exception as error:  # decoders raise many kinds on damaged files
        return None, f"unreadable or truncated ({type(error).__name__}: {error})"
    if min(size) < resolution / 2:
        return size, f"too small ({size[0]} x {size[1]}); at {resolution} px at least {(resolution + 1) // 2} are needed"
    return size, None


def open_image(path: Path | Image.Image) -> Image.Image:
    """An upright RGB picture: EXIF rotation applied, 16 bits brought to 8, alpha laid on white."""
    image = path if isinstance(path, Image.Image) else Image.open(path)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit and float greys, which convert("RGB") would clip
        grey = np.asarray(image).astype(np.float32)
        top = 65535.0 if image.mode != "F" else max(1.0, float(grey.max()))
        image = Image.fromarray((grey / top * 255).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _read_hub(name: str, resolution: int, split: str, log) -> list[Pair]:
    try:
        from datasets import get_dataset_split_names, load_dataset
    except ImportError as error:
        raise DataError(
            name, ['there is no such folder here, and for a hub data set "datasets" is missing: pip install sdtune[hub]']
        ) from error
    try:
        if split != "train" and split not in get_dataset_split_names(name):
            return []
        rows = load_dataset(name, split=split)
    except Exception as error:  # the hub client raises many kinds
        raise DataError(name, [f"there is no such folder here, and the hub does not give it: {error}"]) from error
    text = next((c for c in ("text", "caption", "prompt") if c in rows.column_names), None)
    if "image" not in rows.column_names or text is None:
        raise DataError(name, [f"expected the columns image and text; found {', '.join(rows.column_names)}"])
    problems, small, cropped, pairs = [], [], [], []
    for i, row in enumerate(tqdm(rows, desc="checking images", leave=False)):
        label, caption = f"row {i}", (row[text] or "").strip()
        if not caption:
            problems.append(f"{label}: its caption is empty")
        size = row["image"].size
        if min(size) < resolution / 2:
            problems.append(f"{label}: too small ({size[0]} x {size[1]})")
        elif min(size) < resolution:
            small.append(label)
        if size[0] != size[1]:
            cropped.append(label)
        pairs.append(Pair(label, caption, lambda i=i: open_image(rows[i]["image"])))
    if problems or not pairs:
        raise DataError(name, problems or ["no rows"])
    _tell(small, cropped, resolution, log)
    return pairs


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
def encode(pairs: list[Pair], vae, tokenizer, text_encoder, resolution: int, flip: bool = False, trigger_words: str = ""):
    """Runs the VAE over every image and the text encoder over every caption, once, in fp32.

    The VAE's moments are kept, not one sample of them; with `flip` both the image and its mirror image.
    `trigger_words` are put before every caption. Returns an `Encoded` on the models' device.

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
    unique = list(dict.fromkeys(texts))
    ids = tokenizer(
        unique, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    states = torch.cat([text_encoder(part.to(text_encoder.device))[0] for part in ids.split(32)])
    return states[[unique.index(t) for t in texts]]


def truncated(pairs: list[Pair], tokenizer, trigger_words: str = "") -> list[str]:
    """The names of the pairs whose caption is longer than the text encoder reads."""
    most = tokenizer.model_max_length
    return [p.name for p in pairs if len(tokenizer(f"{trigger_words} {p.caption}".strip()).input_ids) > most]
