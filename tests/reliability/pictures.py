"""Bad data sets, through train_anime.py: pictures, caption files and tables of captions.

A data set of three pictures of which one (or the table) is changed. If the run goes through, what it has read is
compared with a reading of Pillow, `json` and `csv` by themselves.
"""

import csv
import io
import json
import os
import pickle
import random
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from . import commands
from .cases import BYTE_MUTATIONS, Case, judge

SIDE = 64
HTML = b"<!doctype html><html><body>404 Not Found</body></html>"


def make_picture(rng: random.Random, suffix: str, mode: str = "RGB") -> bytes:
    """A picture of smooth colours in a format that the suffix names."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    channels = [127 + 100 * np.sin(x / rng.uniform(5, 30) + y / rng.uniform(5, 30)) for _ in range(3)]
    picture = Image.fromarray(np.stack(channels, -1).astype(np.uint8)).convert(mode)
    stream = io.BytesIO()
    picture.save(stream, format=Image.registered_extensions()[suffix])
    return stream.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and which holds hardly any data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def with_profile(profile: bytes) -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB").save(stream, "PNG", icc_profile=profile)
    return stream.getvalue()


def read_independently(content: bytes) -> np.ndarray:
    """A picture as Pillow alone reads it, upright, in RGB."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def write_pairs(folder: Path, rng: random.Random) -> dict[str, str]:
    """Two good pictures with caption files, and their captions by name."""
    folder.mkdir()
    captions = {f"good-{i}.png": f"a picture of waves, number {i}" for i in range(2)}
    for name, caption in captions.items():
        (folder / name).write_bytes(make_picture(rng, ".png"))
        (folder / name).with_suffix(".txt").write_text(caption)
    return captions


def check_pairs(pairs, captions: dict[str, str], pictures: dict[str, bytes]) -> str:
    """What is wrong with the pairs that a run has read; "" if nothing."""
    found = {p.name: "\n".join(p.captions) for p in pairs}
    if found != captions:
        return f"the captions are {found}, and {captions} were given"
    for pair in pairs:
        if pair.name in pictures:
            own, wanted = np.asarray(pair.open()), read_independently(pictures[pair.name])
            if own.shape != wanted.shape or np.abs(own.astype(int) - wanted).max() > 2:
                return f"{pair.name} was read as another picture than Pillow's"
    return ""


def picture_case(title: str, name: str, content: bytes, seed, is_sound: bool | None = None) -> Case:
    """A data set whose third picture has this content.

    Args:
        is_sound: whether the picture must be refused (False), or may be read as Pillow reads it (None).
    """

    def run(folder: Path) -> str:
        data = folder / "data"
        captions = write_pairs(data, random.Random(f"{seed}"))
        (data / name).write_bytes(content)
        (data / name).with_suffix(".txt").write_text("the third")

        def find_fault(pairs) -> str:
            return check_pairs(pairs, captions | {name: "the third"}, {name: content})

        return judge(
            lambda: commands.train_on(data, folder / "out"), data, name, None if is_sound is False else find_fault
        )

    return Case(f"picture: {title}", run)


def special_file_case(title: str, make) -> Case:
    """A data set in which something lies that is no ordinary picture file; `make` puts it there."""

    def run(folder: Path) -> str:
        data = folder / "data"
        captions = write_pairs(data, random.Random(title))
        name = make(data)
        (data / name).with_suffix(".txt").write_text("the third")
        return judge(
            lambda: commands.train_on(data, folder / "out"), data, [name, "third"],
            lambda pairs: "" if {p.name for p in pairs} == {*captions, name} else "a file was left out in silence",
        )  # fmt: skip

    return Case(f"picture: {title}", run)


def make_pipe(data: Path) -> str:
    os.mkfifo(data / "third.png")
    return "third.png"


def make_broken_link(data: Path) -> str:
    (data / "third.png").symlink_to(data / "nowhere.png")
    return "third.png"


def make_link_to_itself(data: Path) -> str:
    (data / "third.png").symlink_to(data / "third.png")
    return "third.png"


def make_link_to_device(data: Path) -> str:
    (data / "third.png").symlink_to("/dev/zero")
    return "third.png"


def make_folder_with_suffix(data: Path) -> str:
    (data / "third.png").mkdir()
    return "third.png"


def make_odd_name(name: str):
    def make(data: Path) -> str:
        (data / name).write_bytes(make_picture(random.Random(repr(name)), ".png"))
        return name

    return make


class Harmful:
    """Pickled, it would write a file when it is read."""

    def __reduce__(self):
        return os.system, ("touch sdtune-was-here",)


def picture_cases(seed: int) -> list[Case]:
    cases, sound = [], {}
    for suffix, mode in ((".png", "RGB"), (".png", "RGBA"), (".png", "P"), (".png", "L"), (".jpg", "RGB"),
    (".jpg", "L"),
                         (".webp", "RGB"), (".gif", "P"), (".bmp", "RGB"), (".tiff", "RGB"),
                         (".avif", "RGB")):  # fmt: skip
        rng = random.Random(f"{seed} {suffix} {mode}")
        sound[suffix, mode] = make_picture(rng, suffix, mode)
        for mutation in BYTE_MUTATIONS:
            if mode != "RGB" and mutation.__name__ not in ("truncate", "flip_bit"):
                continue
            content = mutation(sound[suffix, mode], rng)
            # a PNG holds a checksum of each part, so no damage to it may pass
            refused = suffix == ".png" and mutation.__name__ != "append_noise"
            title = f"{suffix[1:]} {mode}, {mutation.__name__}"
            cases.append(picture_case(title, f"third{suffix}", content, seed, False if refused else None))
    png, jpeg = sound[".png", "RGB"], sound[".jpg", "RGB"]
    for title, name, content in (
        ("an empty file", "third.png", b""),
        ("a web page under a picture's name", "third.jpg", HTML),
        ("a pickle under a picture's name", "third.png", pickle.dumps(Harmful())),
        ("a zip under a picture's name", "third.webp", b"PK\x03\x04" + bytes(100)),
        ("a table under a picture's name", "third.png", b"file_name,text\na.png,b\n"),
        ("a header of 100,000 x 100,000 px", "third.png", png_of_size(100_000, 100_000)),
        ("a header of 0 x 64 px", "third.png", png_of_size(0, 64)),
        ("a header of 64 x 2,000,000 px", "third.png", png_of_size(64, 2_000_000)),
        ("only its signature", "third.png", png[:8]),
        ("zeros", "third.jpg", bytes(len(jpeg))),
        ("a vector drawing", "third.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("a pointer of Git LFS", "third.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    ):
        cases.append(picture_case(title, name, content, seed, False))
    for title, name, content in (
        ("a PNG named .jpg", "third.jpg", png),
        ("a JPEG named .png", "third.png", jpeg),
        ("a suffix in capitals", "third.PNG", png),
        ("a profile that is noise", "third.png", with_profile(random.Random(seed).randbytes(300))),
        ("an empty profile", "third.png", with_profile(b"\0")),
        ("a profile for another mode", "third.png",
         with_profile(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes())),
    ):  # fmt: skip
        cases.append(picture_case(title, name, content, seed))
    for title, make in (
        ("a named pipe", make_pipe), ("a broken link", make_broken_link), ("a link to itself", make_link_to_itself),
        ("a link to an endless device", make_link_to_device),
        ("a folder with a picture's name", make_folder_with_suffix),
        ("a name with a line break", make_odd_name("thi\nrd.png")),
        ("a name of other scripts", make_odd_name("third 猫 é.png")),
        ("a name that begins with a dash", make_odd_name("--third.png")),
        ("a name that is no UTF-8", make_odd_name(os.fsdecode(b"third\xff.png"))),
        ("a name with a terminal code", make_odd_name("third\x1b[31m.png")),
    ):  # fmt: skip
        cases.append(special_file_case(title, make))
    return cases


# ------------------------------------------------------------------------------------------------------- captions


def is_readable(caption: str) -> bool:
    """Whether a caption shows something, and holds no control characters but line breaks and tabs."""
    kinds = [unicodedata.category(c) for c in caption if c not in "\n\t\r\x85"]
    return not {"Cc", "Cs"} & set(kinds) and any(kind[0] not in "CZ" for kind in kinds)


def caption_cases(seed: int) -> list[Case]:
    text = "a girl with ribbons – リボン, été 🎀"
    contents = {
        "UTF-8 with a mark": b"\xef\xbb\xbf" + text.encode(),
        "UTF-16 with a mark": text.encode("utf-16"),
        "UTF-16 without a mark": "a girl with ribbons".encode("utf-16-le"),
        "UTF-32": text.encode("utf-32"),
        "Shift-JIS": "リボンの少女".encode("shift-jis"),
        "Latin-1": "été".encode("latin-1"),
        "empty": b"",
        "blanks": b" \n\t \r\n",
        "only a mark": b"\xef\xbb\xbf",
        "only characters that show nothing": "\u200b\u2060\ufeff".encode(),
        "NUL characters": b"a girl\0with ribbons",
        "terminal codes": b"a girl \x1b[31m with ribbons",
        "line breaks": b"a girl\r\nwith ribbons\r\n",
        "a megabyte": b"a girl, " * 130_000,
        "a pickle": pickle.dumps(Harmful()),
        "JSON": b'{"text": "a girl"}',
        "half a character": "リ".encode()[:2],
    }
    rng = random.Random(f"{seed} captions")
    for mutation in BYTE_MUTATIONS:
        contents[f"{mutation.__name__} of UTF-8"] = mutation(text.encode(), rng)

    def make_case(title: str, content: bytes, suffix: str) -> Case:
        def run(folder: Path) -> str:
            data = folder / "data"
            captions = write_pairs(data, random.Random(title))
            (data / "third.png").write_bytes(make_picture(random.Random(title), ".png"))
            (data / f"third{suffix}").write_bytes(content)

            def find_fault(pairs) -> str:
                wanted = content.decode("utf-8-sig").strip()
                if not is_readable(wanted):
                    return f"a caption with characters that cannot be shown was taken as it is: {wanted[:60]!r}"
                return check_pairs(pairs, captions | {"third.png": "\n".join(map(str.strip, wanted.splitlines()))}, {})

            return judge(lambda: commands.train_on(data, folder / "out"), data, "third", find_fault)

        return Case(f"caption: {title}", run)

    return [make_case(t, c, (".txt", ".caption")[i % 2]) for i, (t, c) in enumerate(contents.items())]


# --------------------------------------------------------------------------------------------------------- tables


def read_table(name: str, content: bytes) -> dict[str, str] | None:
    """The captions of a table by Python's own modules; None where it does not say one caption for each name."""
    try:
        text = content.decode("utf-8-sig")
        if name.endswith(".jsonl"):
            pairs = [json.loads(line, object_pairs_hook=list) for line in text.split("\n") if line.strip()]
            if any(len(dict(p)) != len(p) for p in pairs):
                return None
            rows = [dict(p) for p in pairs]
        else:
            lines = [r for r in csv.reader(io.StringIO(text, newline=""), strict=True) if any(v.strip() for v in r)]
            columns = [v.strip() for v in lines[0]]
            if len(set(columns)) != len(columns) or any(len(r) > len(columns) for r in lines):
                return None
            rows = [dict(zip(columns, r)) for r in lines[1:]]
        found = {row["file_name"]: row["text"].strip() for row in rows}
        return found if len(found) == len(rows) and all(map(is_readable, found.values())) else None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, csv.Error, RecursionError):
        return None


def table_cases(seed: int) -> list[Case]:
    rows = [{"file_name": f"good-{i}.png", "text": f"waves, “{i}”, with é"} for i in range(3)]
    jsonl = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["file_name", "text"])
    writer.writeheader()
    writer.writerows(rows)
    table = stream.getvalue()
    contents = {
        ("metadata.jsonl", "with a mark"): b"\xef\xbb\xbf" + jsonl.encode(),
        ("metadata.jsonl", "UTF-16"): jsonl.encode("utf-16"),
        ("metadata.jsonl", "a list in place of lines"): json.dumps(rows).encode(),
        ("metadata.jsonl", "a key twice"): jsonl.replace('"text":', '"text": "other", "text":', 1).encode(),
        ("metadata.jsonl", "nested 100,000 deep"): (jsonl + "[" * 100_000 + "\n").encode(),
        ("metadata.jsonl", "a name twice"): (jsonl + jsonl.split("\n")[0]).encode(),
        ("metadata.jsonl", "a name outside"): jsonl.replace("good-0", "../good-0").encode(),
        ("metadata.jsonl", "an absolute name"): jsonl.replace("good-0", "/etc/good-0").encode(),
        ("metadata.jsonl", "a number as text"): jsonl.replace('"waves, “0”, with é"', "5").encode(),
        ("metadata.jsonl", "null as text"): jsonl.replace('"waves, “0”, with é"', "null").encode(),
        ("metadata.jsonl", "half a surrogate pair"): jsonl.replace("waves", "\\ud83d", 1).encode(),
        ("metadata.jsonl", "a NUL in a name"): jsonl.replace("good-0.png", "good-0.png\\u0000", 1).encode(),
        ("metadata.jsonl", "a NUL in a text"): jsonl.replace("waves", "wa\\u0000ves", 1).encode(),
        ("metadata.jsonl", "a row that lacks"): jsonl.split("\n", 1)[1].encode(),
        ("metadata.jsonl", "a row too many"): (jsonl + '{"file_name": "more.png", "text": "x"}').encode(),
        ("metadata.jsonl", "a very long name"): jsonl.replace("good-0", "x" * 5000, 1).encode(),
        ("metadata.jsonl", "empty"): b"",
        ("metadata.csv", "with a mark"): b"\xef\xbb\xbf" + table.encode(),
        ("metadata.csv", "semicolons"): table.replace(",", ";").encode(),
        ("metadata.csv", "tabs"): table.replace(",", "\t").encode(),
        ("metadata.csv", "a column twice"): table.replace("file_name,text", "file_name,text,text").encode(),
        ("metadata.csv", "no header"): table.split("\n", 1)[1].encode(),
        ("metadata.csv", "an open quotation mark"): (table + '"').encode(),
        ("metadata.csv", "NUL bytes"): table.replace("waves", "wa\0ves").encode(),
        ("metadata.csv", "commas without quotation marks"): table.replace('"', "").encode(),
        ("metadata.csv", "a field of a megabyte"): table.replace("waves", "waves " * 200_000, 1).encode(),
        ("metadata.csv", "Mac line ends"): table.replace("\r\n", "\r").encode(),
        ("metadata.csv", "empty"): b"",
    }  # fmt: skip
    for name, content in (("metadata.jsonl", jsonl.encode()), ("metadata.csv", table.encode())):
        rng = random.Random(f"{seed} {name}")
        for i in range(2):
            for mutation in BYTE_MUTATIONS:
                contents[name, f"{mutation.__name__} {i + 1}"] = mutation(content, rng)

    def make_case(name: str, title: str, content: bytes) -> Case:
        def run(folder: Path) -> str:
            data = folder / "data"
            data.mkdir()
            for i in range(3):
                (data / f"good-{i}.png").write_bytes(make_picture(random.Random(i), ".png"))
            (data / name).write_bytes(content)
            wanted = read_table(name, content)
            if wanted is None or set(wanted) != {r["file_name"] for r in rows}:
                find_fault = None
            else:
                find_fault = lambda pairs: check_pairs(pairs, wanted, {})  # noqa: E731
            return judge(lambda: commands.train_on(data, folder / "out"), data, [name, "good-"], find_fault)

        return Case(f"table: {name}, {title}", run)

    return [make_case(name, title, content) for (name, title), content in contents.items()]
