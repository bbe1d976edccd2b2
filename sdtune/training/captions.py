"""Reads captions from files next to the images (.txt, .caption), or from metadata.jsonl or metadata.csv."""

import csv
import io
import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
CAPTION_SUFFIXES = (".txt", ".caption")


def normalize_name(name: str) -> str:
    """A file name in the one form in which names are compared.

    macOS stores accents and Japanese voicing marks in file names as separate characters; metadata files do not.
    """
    return unicodedata.normalize("NFC", Path(name).as_posix())


def name_stem(name: str) -> str:
    """The normalized name without its suffix, by which caption files belong to images."""
    return os.path.splitext(normalize_name(name))[0]


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: it is empty, or of blanks, marks and other characters that are invisible."""
    return all(unicodedata.category(c)[0] in "ZC" for c in text)


def find_control_character(text: str) -> str | None:
    """The first control character of a text but line breaks and tabs, such as "U+0000"; None if there is none."""
    found = (c for c in text if unicodedata.category(c) == "Cc" and c not in "\n\r\t\x85")
    return next((f"U+{ord(c):04X}" for c in found), None)


def read_caption_files(
    folder: Path, names: list[str], images: list[str], problems: list[str], notes: list[str]
) -> dict[str, list[str] | None]:
    """The captions in the files `names`, one a line, by the normalized name of their image.

    Args:
        images: names of all images in the folder.
        problems: a line is appended for each problem; the caption is None if its file could not be read.
        notes: a line is appended for each caption file that belongs to several images.
    """
    images_by_stem = {}
    for image in images:
        images_by_stem.setdefault(name_stem(image), []).append(image)
    captions, first_files = {}, {}
    for name in names:
        text, own_images = _read_text(folder / name, name, problems), images_by_stem.get(name_stem(name))
        if not own_images:
            problems.append(f"{name}: a caption file without an image; add the image or remove the file")
            continue
        first = first_files.setdefault(name_stem(name), name)
        if first != name:
            problems.append(f"{first}, {name}: two caption files for {own_images[0]}; keep one")
        elif len(own_images) > 1:
            notes.append(f"{', '.join(own_images)} share the caption in {name}")
        lines = None if text is None else [line.strip() for line in text.split("\n") if not is_blank(line)]
        captions |= dict.fromkeys(map(normalize_name, own_images), lines)
    return captions


def read_metadata(path: Path, problems: list[str]) -> dict[str, list[str] | None] | None:
    """The captions in a metadata file, by the normalized name of their image; its text may be a list of captions.

    Args:
        problems: a line is appended for each problem. A caption is None if its line has a problem, and the result is
            None if the whole file could not be read.
    """
    text = _read_text(path, path.name, problems)
    if text is None:
        return None
    captions: dict[str, list[str] | None] = {}
    rows = _read_csv_rows(text) if path.suffix.lower() == ".csv" else _read_json_rows(text)
    for number, line, row in rows:
        where = f"{path.name}, line {number}"
        name, caption = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
        if isinstance(row, ValueError):
            problems.append(f"{where}: {row}; found {line[:80]}")
        elif not isinstance(name, str) or not name.strip():
            problems.append(f"{where}: expected file_name and text, both strings; found {line[:80]}")
        elif Path(name).is_absolute() or ".." in Path(name).parts:
            problems.append(f"{where}: {name} lies outside the folder; give names relative to it")
        elif normalize_name(name) in captions:
            problems.append(f"{where}: {name} has a caption already; keep one line for each image")
        elif (texts := as_captions(caption)) is None:
            captions[normalize_name(name)] = None
            problems.append(f"{where}: {name} needs a text, a string or a list of strings; found {line[:80]}")
        else:
            captions[normalize_name(name)] = texts
    return captions


def as_captions(value) -> list[str] | None:
    """The captions that a value of a table holds, without empty ones; None if it is no string or list of strings."""
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        return None
    return [text.strip() for text in texts if not is_blank(text)]


def _read_json_rows(text: str) -> Iterator[tuple[int, str, object]]:
    """(line number, line, its value or a ValueError) for each line of JSON Lines."""
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also split at U+2028 inside a caption
        if line.strip():
            try:
                yield number, line, json.loads(line, object_pairs_hook=_make_object)
            except (ValueError, RecursionError) as error:
                yield number, line, ValueError(f"not valid JSON ({error})")


def _make_object(pairs: list[tuple[str, object]]) -> dict:
    """The dict of a JSON object; raises a ValueError if a key stands in it twice, of which `json` takes the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands in it twice")
    return found


def _read_csv_rows(text: str) -> Iterator[tuple[int, str, object]]:
    """The same for each row of CSV; the first row names the columns."""
    # strict: otherwise an unclosed quote would make the rows after it part of one value
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
                if len(set(columns)) < len(columns):
                    yield number, line, ValueError("a column stands in it twice; keep one")
                    return
            elif len(values) > len(columns):
                yield number, line, ValueError('more values than columns; put "" around a text with commas')
            else:
                yield number, line, dict(zip(columns, values))
    except csv.Error as error:
        yield end + 1, text.split("\n")[end], ValueError(f"not valid CSV ({error}), so the rest is not read")


def _read_text(path: Path, name: str, problems: list[str]) -> str | None:
    """The text of a file, or None after a line has been appended to the problems."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        problems.append(f"{name}: is not UTF-8 text (byte {error.start}); save it as UTF-8")
    except OSError as error:
        problems.append(f"{name}: cannot be opened ({error.strerror})")
    return None
