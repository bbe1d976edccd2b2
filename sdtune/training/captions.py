"""Reads captions from text files beside the pictures, or from metadata.jsonl or metadata.csv."""

import csv
import io
import json
import os
import unicodedata
from pathlib import Path

METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_SUFFIXES = (".txt", ".caption")


def normalize_name(name: str) -> str:
    # macOS writes accents and Japanese voicing marks of file names decomposed, metadata has them composed.
    return unicodedata.normalize("NFC", Path(name).as_posix())


def name_stem(name: str) -> str:
    return os.path.splitext(normalize_name(name))[0]


def read_sidecars(folder: Path, files, by_stem: dict[str, list[str]], problems, notes) -> dict[str, str | None]:
    """Image -> caption from the caption files; None where a problem is told already."""
    captions, used = {}, {}
    for name in files:
        text, images = _read_text(folder / name, name, problems), by_stem.get(name_stem(name))
        if not images:
            problems.append(f"{name}: a caption file without an image; add the image or remove the file")
            continue
        first = used.setdefault(name_stem(name), name)
        if first != name:
            problems.append(f"{first}, {name}: two caption files for {images[0]}; keep one")
        elif len(images) > 1:
            notes.append(f"{', '.join(images)} share the caption in {name}")
        captions |= dict.fromkeys(map(normalize_name, images), text and text.strip())
    return captions


def read_table(path: Path, problems: list[str]) -> dict[str, str | None] | None:
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
        elif normalize_name(name) in captions:
            problems.append(f"{where}: {name} has a caption already; keep one line for each image")
        elif not isinstance(caption, str):
            captions[normalize_name(name)] = None
            problems.append(f"{where}: {name} needs a text, a string; found {line[:80]}")
        else:
            captions[normalize_name(name)] = caption.strip()
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


def _read_text(path: Path, name: str, problems: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        problems.append(f"{name}: is not UTF-8 text (byte {error.start}); save it as UTF-8")
    except OSError as error:
        problems.append(f"{name}: cannot be opened ({error.strerror})")
    return None
