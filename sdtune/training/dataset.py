"""Reads image-caption pairs from a folder or a data set of the Hugging Face hub.

Every problem of a data set is found before any model is loaded, and all of them are listed at once. No image and no
caption is ever left out silently: what is not used is reported as a problem or as a note.
"""

import hashlib
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .. import extras, paths
from .buckets import AspectBuckets, cropped_share, describe_shapes, enlargement
from .captions import (
    CAPTION_SUFFIXES,
    METADATA_NAMES,
    as_captions,
    find_control_character,
    name_stem,
    normalize_name,
    read_caption_files,
    read_metadata,
)
from .errors import DataError, printable, shorten_list
from .images import (
    FORMATS,
    UNREAD_SUFFIXES,
    check_sums,
    explain_image_error,
    explain_profile,
    open_file,
    open_image,
)
from .masks import FOLDER_SUFFIX, MaskError, find_mask_files, open_mask

MOST_REPEATS = 100  # that the name of a folder can ask for


@dataclass(frozen=True)
class Pair:
    """One image and its captions.

    Attributes:
        caption: the first one.
        name: of the file, relative to the data set's folder, or "row N" in a hub data set.
        open: reads the image file and returns it as an upright RGB image, with transparent parts white.
        size: width and height of that image in pixels.
        open_mask: reads its mask, in grey levels and of that size; None if all of the image counts.
        digest: SHA-256 of the image file and its mask file; empty where it was not read from a file.
        thumbnail: the image in 16 x 16 pixels, (768,) in grey levels, by which near-identical images are found.
        other_captions: those after the first.
        repeats: how many times as often as others it is trained on, from 1.
    """

    name: str
    caption: str
    open: Callable[[], Image.Image]
    size: tuple[int, int]
    open_mask: Callable[[], Image.Image] | None = None
    digest: str = ""
    thumbnail: np.ndarray | None = field(default=None, repr=False, compare=False)
    other_captions: tuple[str, ...] = ()
    repeats: int = 1

    @property
    def captions(self) -> list[str]:
        """All captions, in their order."""
        return [self.caption, *self.other_captions]


class ImageFile(NamedTuple):
    """An image that has been found but not opened; `captions` is None if their problem has been reported already."""

    name: str
    captions: list[str] | None
    read_bytes: Callable[[], bytes]
    mask: Path | None = None


def read_splits(
    source: str | Path, buckets: AspectBuckets, log: Callable[[str], None] = print
) -> tuple[list[Pair], list[Pair]]:
    """The training pairs and the held-out pairs. Like `read_pairs`, with the problems of both listed at once."""
    found, problems = [], []
    log_of = {"train": log, "test": lambda line: log(f"test: {line}")}
    for split in ("train", "test"):
        try:
            found.append(read_pairs(source, buckets, split, log_of[split]))
        except DataError as error:
            problems += [f"{split}: {p}" if split == "test" else p for p in error.problems]
            if not os.path.isdir(paths.find(source) or ""):
                break  # the other split has the same problem
    if problems:
        raise DataError(source, problems)
    train, heldout = found
    if same := near_identical(heldout, train):
        names = shorten_list([f"{a} = {b}" for a, b in same])
        log(f"{len(same)} of {len(heldout)} held-out images are copies of training images, or nearly: the held-out "
            f"loss tells little about new ones: {names}")  # fmt: skip
    return train, heldout


def read_pairs(
    source: str | Path, buckets: AspectBuckets, split: str = "train", log: Callable[[str], None] = print
) -> list[Pair]:
    """The image-caption pairs of a folder or a hub data set, sorted by file name.

    A folder holds images, also in subfolders, and their masks (see `masks`). Their captions are in `metadata.jsonl`
    or `metadata.csv` (columns `file_name`, `text`), or next to each image in a .txt or .caption file of the same name.
    An image may have several: lines of that file, or a list in metadata.jsonl. The images of a folder whose name is
    like 10_girls are trained on 10 times as often as others, as kohya's scripts do.
    If the folder has subfolders `train` or `test` (the splits of the imagefolder format), `split` chooses one; if it
    has only `test`, everything else is "train". Hidden files are ignored. A hub id ("owner/name") needs the extra
    `sdtune[hub]`.

    Args:
        buckets: give the shape in which each image is trained. An image that would be enlarged more than twice is a
            problem; one that is enlarged, or cropped, is logged.
        split: "train", or "test" for the held-out pairs; the list is empty if there is no "test".
        log: called with a line for each thing that is no problem but that a user should know.

    Raises:
        DataError: with every problem: missing or empty captions, captions without an image, unreadable,
            truncated or too small images, malformed metadata, no image at all.
    """
    root = paths.find(source)
    if root is None:
        if re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)):
            return _read_hub(str(source), buckets, split, log)
        raise DataError(source, ["no such folder; expected a folder with images and captions, or a hub id owner/name"])
    if not os.path.isdir(root):
        raise DataError(source, ["this is a file; expected a folder with images and captions"])
    root, folder, problems, notes = Path(root), Path(root, split), [], []
    if os.path.isdir(folder):
        names = list_files(folder, problems)
        if split == "train":
            _check_outside_splits(root, problems, notes)
    elif split != "train":
        return []
    else:
        folder, names = root, [n for n in list_files(root, problems) if not n.startswith("test/")]
    images = match_captions(folder, names, problems, notes)
    return _check_images(folder, images, buckets, problems, notes, log)


def list_files(folder: Path, problems: list[str]) -> list[str]:
    """The names, relative to the folder, of all files in it and in its subfolders that are not hidden, sorted.

    Args:
        problems: a line is appended for each folder that cannot be read, each link to a folder, and what is no file.
    """
    names = []

    def add_problem(error: OSError):
        problems.append(f"{error.filename}: this folder cannot be opened ({error.strerror})")

    for here, folders, files in os.walk(folder, onerror=add_problem):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for path in (os.path.join(here, f) for f in folders):
            if os.path.islink(path):  # may contain itself
                problems.append(f"{path}: a link to a folder, not followed; put the folder itself here")
        for name in (Path(here, f) for f in files if not f.startswith(".")):
            if is_special(name):  # reading it could wait for ever, or never end
                problems.append(f"{name}: a pipe, a socket or a device, not a file; remove it")
            else:
                names.append(name.relative_to(folder).as_posix())
    return sorted(names)


def is_special(path: Path) -> bool:
    """Whether a path, or what it links to, is neither a file nor a folder; False if there is nothing."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _file_kind(name: str) -> str:
    """ "table" for a metadata file, "caption" for a caption file, "image" or "other"; decided by the name."""
    suffix = os.path.splitext(name)[1].lower()
    if name.lower() in METADATA_NAMES:
        return "table"
    if suffix in CAPTION_SUFFIXES:
        return "caption"
    return "image" if suffix in UNREAD_SUFFIXES or Image.registered_extensions().get(suffix) in FORMATS else "other"


def _check_outside_splits(root: Path, problems: list[str], notes: list[str]) -> None:
    """Reports loose files next to the folder train/, which were probably meant to be used, and notes other folders."""
    used = ("train/", "test/", f"train{FOLDER_SUFFIX}/", f"test{FOLDER_SUFFIX}/")
    found = [n for n in list_files(root, []) if not n.startswith(used)]
    outside = [n for n in found if _file_kind(n) != "other"]
    for name in (n for n in outside if "/" not in n):
        problems.append(f"{name}: lies beside the folder train, so it is not used; move it into train, or elsewhere")
    if folders := dict.fromkeys(n.split("/")[0] for n in outside if "/" in n):
        notes.append(f"only the folders train and test are read, not {shorten_list(list(folders))}")


def match_captions(folder: Path, names: list[str], problems: list[str], notes: list[str]) -> list[ImageFile]:
    """The images among the files `names` of a folder, each with its caption.

    Args:
        problems: a line is appended for each image without a caption and each caption without an image.
        notes: lines about what is no problem are appended.
    """
    tables, caption_files, images, others = (
        [n for n in names if _file_kind(n) == kind] for kind in ("table", "caption", "image", "other")
    )
    if not tables:
        captions = read_caption_files(folder, caption_files, images, problems, notes)
    elif len(tables) == 1:
        captions = read_metadata(folder / tables[0], problems)
    else:
        captions = None
        problems.append(f"{' and '.join(tables)}: both hold captions; keep one")
    if tables:
        stems = set(map(name_stem, images))
        double = [n for n in caption_files if name_stem(n) in stems]
        if double:
            problems.append(f"{', '.join(double)}: captions stand in {tables[0]} too; keep one of the two")
        others += [n for n in caption_files if n not in double]
    masks = find_mask_files(folder, images, problems)
    used_as_masks = {path: image for image, paths in masks.items() for path in paths}
    found = []
    for name in images:
        if folder / name in used_as_masks:
            if captions and captions.pop(normalize_name(name), None):
                image = used_as_masks[folder / name]
                problems.append(f"{name}: has a caption, but its name makes it the mask of {image}; rename one of them")
            continue
        own = None if captions is None else captions.pop(normalize_name(name), [])
        if own == []:
            where = f"add it to {tables[0]}" if tables else f"write it into {os.path.splitext(name)[0]}.txt"
            problems.append(f"{name}: no caption, or an empty one; {where}")
        found.append(ImageFile(name, own, (folder / name).read_bytes, next(iter(masks.get(name, [])), None)))
    where = f" in {tables[0]}" if tables else ""
    for name in captions or ():
        problems.append(
            f"{name}: has a caption{where}, but there is no such image; add the image or remove the caption"
        )
    if others:
        notes.append(f"{len(others)} other files are not used: {shorten_list(others)}")
    return found


def _check_images(
    source, images: list[ImageFile], buckets: AspectBuckets, problems: list[str], notes: list[str], log
) -> list[Pair]:
    """The pairs, after every image has been read completely. Logs the notes; raises a DataError for any problem."""
    pairs: list[Pair] = []
    image_notes = {
        f"too small for {buckets.resolution} px and will be enlarged": [],
        "cropped by more than 10 %": [],
        "partly masked by a file; what is black there counts as --mask_weight says": [],
        "partly transparent; what is transparent counts as --mask_weight says": [],
        "animated or of several pages; the first picture of each is used": [],
        "in a colour profile that cannot be used, and are read as sRGB": [],
        "described by several captions, of which each step takes one": [],
        f"in a folder whose number is no count of repeats from 1 to {MOST_REPEATS}, and count once": [],
    }
    for name, captions, read_bytes, mask_file in tqdm(
        images, desc="checking images", disable=len(images) < 200, leave=False
    ):
        for what, text in (("file name", name), *(("caption", caption) for caption in captions or ())):
            if re.search("[\ud800-\udfff]", text):
                problems.append(f"{name}: its {what} is not valid Unicode; write it anew")
        if control := find_control_character("".join(captions or ())):
            problems.append(
                f"{name}: its caption holds the control character {control}; save it as plain text in UTF-8"
            )
        try:
            content = read_bytes()
            if not content:
                raise EOFError("the file is empty")
            with open_file(io.BytesIO(content)) as image:
                is_animated = getattr(image, "is_animated", False)
                bad_profile = explain_profile(image)
                opened = open_image(image)
            check_sums(content)
            mask_content = mask_file.read_bytes() if mask_file else None
            mask = open_mask(mask_content, content)
        except MaskError as error:
            problems.append(f"{name}: {error}")
            continue
        except Exception as error:  # decoders raise many kinds of exceptions on damaged files
            problems.append(f"{name}: {explain_image_error(error)}")
            continue
        thumbnail = np.asarray(opened.resize((16, 16), Image.Resampling.BOX), np.uint8).ravel()
        digest = hashlib.sha256(content + (mask_content or b"")).hexdigest()
        read_mask = partial(_open_mask, mask_file, read_bytes) if mask else None
        read_image = partial(_open_bytes, read_bytes)
        first, *others = captions or [""]
        times = count_repeats(name)
        pairs.append(
            Pair(name, first, read_image, opened.size, read_mask, digest, thumbnail, tuple(others), times or 1)
        )
        (width, height), shape = opened.size, buckets.shape_for(opened.size)
        scale, lost = enlargement(opened.size, shape), cropped_share(opened.size, shape)
        if scale > 2:
            least = " x ".join(str((side + 1) // 2) for side in shape)
            problems.append(f"{name}: {width} x {height} is too small; {buckets.resolution} px need {least} or more")
        found = (scale > 1, lost > 0.1, mask_file, mask and not mask_file, is_animated, bad_profile, others,
                 times is None)  # fmt: skip
        texts = (name, f"{name} ({lost:.0%} of it)", name, name, name, f"{name} ({bad_profile})",
                 f"{name} ({len(others) + 1})", name)  # fmt: skip
        for names, applies, text in zip(image_notes.values(), found, texts):
            if applies:
                names.append(text)
    if not images and not problems:
        problems.append("no images; expected files such as picture.png with captions")
    if problems:
        raise DataError(source, problems)
    notes = notes + [
        f"{len(names)} images are {what}: {shorten_list(names)}" for what, names in image_notes.items() if names
    ]
    if repeated := describe_repeats(pairs):
        notes.append(repeated)
    if shapes := describe_shapes([p.name for p in pairs], [p.size for p in pairs], buckets):
        notes.append(shapes)
    if same := near_identical(pairs, pairs):
        names = shorten_list([f"{a} = {b}" for a, b in same])
        notes.append(f"{len(same)} images are copies of others, or nearly: {names}")
    for note in notes:
        log(printable(note))
    return pairs


def count_repeats(name: str) -> int | None:
    """How many times as often an image is trained on, by its innermost folder such as 10_girls; 1 without a number.

    None if the number is too large for a count of repeats; it may be a year.
    """
    numbers = [int(match[1]) for part in name.split("/")[:-1] if (match := re.match(r"(\d{1,9})_", part))]
    if not numbers:
        return 1
    return numbers[-1] if 1 <= numbers[-1] <= MOST_REPEATS else None


def describe_repeats(pairs: list[Pair]) -> str:
    """How often the images of which folders are trained on, as a sentence; empty if all count alike."""
    times = {os.path.dirname(pair.name): pair.repeats for pair in pairs}
    if len(set(times.values())) < 2:
        return ""
    folders = [f"{count} x {folder or 'the folder itself'}" for folder, count in times.items()]
    return f"images are trained on as often as their folders say: {shorten_list(folders)}"


def near_identical(pairs: list[Pair], others: list[Pair]) -> list[tuple[str, str]]:
    """The names of pairs whose image is one of the others, byte for byte or but for its size and compression.

    Args:
        others: may be `pairs`; then each image is compared with those before it.
    """
    is_same_list, found = pairs is others, []
    thumbnails = np.array([p.thumbnail for p in others if p.thumbnail is not None], np.float32)
    if len(thumbnails) < len(others) or any(p.thumbnail is None for p in pairs) or not others:
        return []
    for i, pair in enumerate(pairs):
        before = thumbnails[:i] if is_same_list else thumbnails
        own = pair.thumbnail.astype(np.float32)
        # a picture of one colour is the same as another only if the file is the same
        limit = 1.5 if own.std() > 4 else -1.0
        close = np.square(before - own).mean(1) <= limit if len(before) else np.zeros(0, bool)
        j = next((j for j in range(len(before)) if close[j] or others[j].digest == pair.digest), None)
        if j is not None:
            found.append((pair.name, others[j].name))
    return found


def _open_bytes(read_bytes: Callable[[], bytes]) -> Image.Image:
    return open_image(io.BytesIO(read_bytes()))


def _open_mask(mask_file: Path | None, read_bytes: Callable[[], bytes]) -> Image.Image:
    return open_mask(mask_file.read_bytes() if mask_file else None, read_bytes())


def _read_hub(name: str, buckets: AspectBuckets, split: str, log) -> list[Pair]:
    """The pairs of a data set of the Hugging Face hub, with the columns image and text (or caption, or prompt)."""
    no_folder = "there is no such folder here, and"
    try:
        extras.check("hub")
    except extras.MissingPackages as error:
        raise DataError(name, [f"{no_folder} a hub data set needs a package: {error}"]) from error
    import datasets

    try:
        if split != "train" and split not in datasets.get_dataset_split_names(name):
            return []
        rows = datasets.load_dataset(name, split=split)
        column = next((c for c in ("text", "caption", "prompt") if c in rows.column_names), None)
        if "image" not in rows.column_names or column is None:
            raise DataError(name, [f"expected the columns image and text; found {', '.join(rows.column_names)}"])
        rows = rows.cast_column("image", datasets.Image(decode=False))  # gives the bytes of the files
        captions = list(rows[column])
    except DataError:
        raise
    except Exception as error:  # the hub client raises many kinds of exceptions
        raise DataError(name, [f"{no_folder} the hub does not give it ({error})"]) from error

    def read_bytes(i: int) -> bytes:
        file = rows[i]["image"] or {}
        return file.get("bytes") or (Path(file["path"]).read_bytes() if file.get("path") else b"")

    images, problems = [], []
    for i, value in enumerate(captions):
        own = as_captions(value) or []
        if not own:
            problems.append(f"row {i}: no caption, or an empty one")
        images.append(ImageFile(f"row {i}", own, partial(read_bytes, i)))
    return _check_images(name, images, buckets, problems, [], log)
