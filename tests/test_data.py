"""What `data.read` and `data.encode` promise, on real files."""

import contextlib
import csv
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdtune import data
from sdtune.data import DataError

SIDE = 16
RED = (200, 30, 40)
wild = settings(max_examples=50, deadline=None, database=None)


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
    return {p.name: p.caption for p in data.read(folder, SIDE, split, lambda _: None)}


def notes(folder, split="train") -> list[str]:
    lines = []
    data.read(folder, SIDE, split, lines.append)
    return lines


def problems(folder, split="train") -> list[str]:
    with pytest.raises(DataError) as caught:
        data.read(folder, SIDE, split, lambda _: None)
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
    (pair,) = (p for p in data.read(folder, SIDE, log=lambda _: None) if p.name == name)
    image = pair.open()
    assert image.mode == "RGB"
    return np.asarray(image)


# ------------------------------------------------------------------------------------------ captions


def test_jsonl_captions(tmp_path):
    for name in ("b.png", "a.jpg", "sub/c.webp"):
        put(tmp_path / name)
    jsonl(tmp_path, row("b.png", " two "), "", row("./a.jpg", "one\nline"), "  \r", row("sub/c.webp", "three"), "")
    assert list(pairs(tmp_path).items()) == [("a.jpg", "one\nline"), ("b.png", "two"), ("sub/c.webp", "three")]


def test_jsonl_with_bom_crlf_and_line_separators_inside_captions(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / "b.png")
    lines = [json.dumps(row(n, f"x\u2028y\x85{n}"), ensure_ascii=False) for n in ("a.png", "b.png")]
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert pairs(tmp_path) == {"a.png": "x\u2028y\x85a.png", "b.png": "x\u2028y\x85b.png"}


def test_csv_with_quotes_newlines_commas_bom_and_blank_lines(tmp_path):
    captions = {"a.png": 'she said "hi",\nand left', "b, c.png": "plain", "d.png": "größer, 東京"}
    for name in captions:
        put(tmp_path / name)
    with open(tmp_path / "metadata.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "extra", "file_name"])
        for name, text in captions.items():
            writer.writerow([text, 1, name])
            writer.writerow([])
            writer.writerow(["", "", ""])
    assert pairs(tmp_path) == captions


@pytest.mark.parametrize("suffix", [".txt", ".caption", ".TXT", ".Caption"])
def test_sidecar_captions(tmp_path, suffix):
    put(tmp_path / "a.png")
    put(tmp_path / "sub" / "a.png")
    (tmp_path / f"a{suffix}").write_bytes(b"\xef\xbb\xbfone \r\n")
    sidecar(tmp_path / "sub" / f"a{suffix}", "two")
    assert pairs(tmp_path) == {"a.png": "one", "sub/a.png": "two"}


@pytest.mark.parametrize(
    "name", ["A.JPG", "a b.png", "a.b.png", "a..png", "été 東京 👩‍🎨.png", "#%$&;'.png", "-x.PNG", " .png"]
)
def test_odd_file_names(tmp_path, name):
    put(tmp_path / "side" / name)
    put(tmp_path / "side" / "a.c.png")  # the stem is a.c, not a
    sidecar(tmp_path / "side" / "a.c.txt", "other")
    sidecar(tmp_path / "side" / (os.path.splitext(name)[0] + ".txt"), "mine")
    assert pairs(tmp_path / "side") == {name: "mine", "a.c.png": "other"}
    put(tmp_path / "table" / name)
    jsonl(tmp_path / "table", row(name, "mine"))
    assert pairs(tmp_path / "table") == {name: "mine"}


def test_decomposed_file_names_match_composed_captions(tmp_path):
    for folder in ("table", "side"):
        put(tmp_path / folder / "か\u3099.png")  # が as macOS writes it
    jsonl(tmp_path / "table", row("が.png"))
    sidecar(tmp_path / "side" / "が.txt")
    assert pairs(tmp_path / "table") == pairs(tmp_path / "side") == {"か\u3099.png": "a girl"}


def test_images_of_one_stem_share_a_caption_file_and_it_is_told(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / "a.jpg")
    sidecar(tmp_path / "a.txt")
    assert pairs(tmp_path) == {"a.jpg": "a girl", "a.png": "a girl"}
    assert notes(tmp_path) == ["a.jpg, a.png share the caption in a.txt"]


def test_images_of_one_stem_have_their_own_captions_in_metadata(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / "a.jpg")
    jsonl(tmp_path, row("a.png", "one"), row("a.jpg", "two"))
    assert pairs(tmp_path) == {"a.jpg": "two", "a.png": "one"}


# ------------------------------------------------------------------------------------ wrong captions


def test_every_problem_is_listed_at_once_by_file_name(tmp_path):
    for name in ("good.png", "none.png", "empty.png", "twice.png"):
        put(tmp_path / name)
        sidecar(tmp_path / name.replace(".png", ".txt"), "  \n" if name == "empty.png" else "a girl")
    (tmp_path / "none.txt").unlink()
    sidecar(tmp_path / "twice.caption")
    sidecar(tmp_path / "lonely.txt")
    put(tmp_path / "tiny.png", (7, 30))
    sidecar(tmp_path / "tiny.txt")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    (tmp_path / "void.jpg").touch()
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    for stem in ("cut", "void", "phone"):
        sidecar(tmp_path / f"{stem}.txt")
    (tmp_path / "void.txt").write_bytes(b"\xff\xfe")
    found = problems(tmp_path)
    wanted = {
        "none.png": "none.txt", "empty.png": "empty one", "twice.caption, twice.txt": "keep one",
        "lonely.txt": "without an image", "tiny.png": "7 x 30", "cut.png": "damaged", "void.jpg": "empty",
        "phone.heic": "PNG", "void.txt": "UTF-8",
    }  # fmt: skip
    assert len(found) == len(wanted)
    for name, part in wanted.items():
        (line,) = (line for line in found if line.startswith(name))
        assert part in line


def test_missing_and_superfluous_captions_in_metadata(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        put(tmp_path / name)
    jsonl(tmp_path, row("a.png"), row("b.png", " "), row("d.png"))
    assert [line.split(":")[0] for line in problems(tmp_path)] == ["b.png", "c.png", "d.png"]
    assert all("metadata.jsonl" in line for line in problems(tmp_path)[:2])


def test_metadata_and_sidecars_together(tmp_path):
    for stem in "abcdefgh":
        put(tmp_path / f"{stem}.png")
        sidecar(tmp_path / f"{stem}.txt")
    sidecar(tmp_path / "README.txt")
    jsonl(tmp_path, *(row(f"{stem}.png") for stem in "abcdefgh"))
    only_problem(tmp_path, "metadata.jsonl", *(f"{stem}.txt" for stem in "abcdefgh"))


def test_a_text_file_of_no_image_beside_metadata_is_told(tmp_path):
    put(tmp_path / "a.png")
    sidecar(tmp_path / "README.txt")
    jsonl(tmp_path, row("a.png"))
    assert notes(tmp_path) == ["1 other files are not used: README.txt"]


def test_both_metadata_files(tmp_path):
    put(tmp_path / "a.png")
    jsonl(tmp_path, row("a.png"))
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a girl\n")
    only_problem(tmp_path, "metadata.csv", "metadata.jsonl", "keep one")


@pytest.mark.parametrize("line, part", [
    ("{", "not valid JSON"), ("[" * 5000, "not valid JSON"), ("1" * 5000, "not valid JSON"),
    ("[1]", "file_name and text"), ("[" * 500 + "]" * 500, "file_name and text"), ("null", "file_name and text"),
    ('{"text": "x"}', "file_name"),
    ('{"file_name": 3, "text": "x"}', "file_name"), ('{"file_name": "", "text": "x"}', "file_name"),
    ('{"file_name": "b.png"}', "b.png needs a text"), ('{"file_name": "b.png", "text": ["x"]}', "b.png needs a text"),
    ('{"file_name": "b.png", "text": null}', "b.png needs a text"), ('{"file_name": "a.png", "text": "x"}', "already"),
    ('{"file_name": "./a.png", "text": "x"}', "already"), ('{"file_name": "../b.png", "text": "x"}', "outside"),
    ('{"file_name": "/etc/b.png", "text": "x"}', "outside"),
])  # fmt: skip
def test_malformed_json_lines(tmp_path, line, part):
    put(tmp_path / "a.png")
    jsonl(tmp_path, row("a.png"), "", line)
    found = problems(tmp_path)
    assert found[0].startswith("metadata.jsonl, line 3: ") and part in found[0] and len(found[0]) < 300


@pytest.mark.parametrize("text, line, part", [
    ("file_name;text\na.png;x\n", 1, "columns file_name,text"), ("a.png,x\n", 1, "columns file_name,text"),
    ("file_name,text\na.png,a girl, smiling\n", 2, '""'), ('file_name,text\n\na.png,"x\nb.png,y\n', 3, "not valid CSV"),
    ('file_name,text\na.png,"x" y\n', 2, "not valid CSV"), ("file_name,text\na.png\n", 2, "a.png needs a text"),
    ('file_name,text\na.png,"x\ny"\na.png,z\n', 4, "already"), ("file_name,text\n,x\n", 2, "file_name"),
    (f"file_name,text\na.png,{'x' * 200_000}\n", 2, "not valid CSV"),
])  # fmt: skip
def test_malformed_csv(tmp_path, text, line, part):
    put(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(text)
    found = problems(tmp_path)
    assert found[0].startswith(f"metadata.csv, line {line}: ") and part in found[0] and len(found[0]) < 300


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_that_is_not_utf8_is_one_problem(tmp_path, name):
    put(tmp_path / "a.png")
    put(tmp_path / "b.png")
    (tmp_path / name).write_bytes("file_name,text\na.png,größer".encode("utf-16"))
    only_problem(tmp_path, name, "UTF-8")


def test_broken_unicode_in_captions(tmp_path):
    put(tmp_path / "a.png")
    jsonl(tmp_path, row("a.png", "x\ud800"))
    only_problem(tmp_path, "a.png", "caption is not valid Unicode")


# ------------------------------------------------------------------------------------------- folders


def test_splits(tmp_path):
    for name in ("train/a.png", "test/b.png"):
        put(tmp_path / name)
        jsonl((tmp_path / name).parent, row(Path(name).name, name))
    assert pairs(tmp_path) == {"a.png": "train/a.png"}
    assert pairs(tmp_path, "test") == {"b.png": "test/b.png"}


def test_without_a_test_split_nothing_is_held_out(tmp_path):
    put(tmp_path / "a.png")
    sidecar(tmp_path / "a.txt")
    assert data.read(tmp_path, SIDE, "test") == []


def test_held_out_images_beside_the_others_are_not_trained_on(tmp_path):
    for name in ("a", "test/b"):
        put(tmp_path / f"{name}.png")
        sidecar(tmp_path / f"{name}.txt", name)
    assert pairs(tmp_path) == {"a.png": "a"}
    assert pairs(tmp_path, "test") == {"b.png": "test/b"}


def test_what_lies_beside_the_splits_is_not_dropped_silently(tmp_path):
    for name in ("train/a", "validation/b", "regular/deep/c"):
        put(tmp_path / f"{name}.png")
        sidecar(tmp_path / f"{name}.txt")
    (tmp_path / "README.md").touch()
    assert notes(tmp_path) == ["only the folders train and test are read, not regular, validation"]
    put(tmp_path / "loose.png")
    jsonl(tmp_path, row("loose.png"))
    found = problems(tmp_path)
    assert [line.split(":")[0] for line in found] == ["loose.png", "metadata.jsonl"]
    assert all("train" in line for line in found)


def test_hidden_files_are_ignored(tmp_path):
    put(tmp_path / "a.png")
    sidecar(tmp_path / "a.txt")
    for name in (".DS_Store", "._a.png", "._a.txt", ".git/x.png", "sub/.x.jpg"):
        sidecar(tmp_path / name)
    assert pairs(tmp_path) == {"a.png": "a girl"}
    assert notes(tmp_path) == []


def test_other_files_are_told(tmp_path):
    put(tmp_path / "a.png")
    sidecar(tmp_path / "a.txt")
    for name in ("film.mp4", "manual.pdf", "photo"):
        (tmp_path / name).touch()
    assert notes(tmp_path) == ["3 other files are not used: film.mp4, manual.pdf, photo"]


@pytest.mark.parametrize("content", [[], ["README.md"], ["sub/.hidden.png"]])
def test_a_folder_without_images(tmp_path, content):
    for name in content:
        sidecar(tmp_path / name)
    only_problem(tmp_path, "no images")


def test_a_folder_with_captions_only(tmp_path):
    jsonl(tmp_path, row("a.png"))
    only_problem(tmp_path, "a.png", "no such image")


def test_no_folder(tmp_path):
    file = put(tmp_path / "a.png")
    only_problem(file, "this is a file")
    for source in (tmp_path / "none", "", "a\0b", "~nobody-of-this-name/x", "x" * 5000):
        only_problem(source, "no such folder")


def test_links(tmp_path):
    put(tmp_path / "far" / "a.png")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").symlink_to(tmp_path / "far" / "a.png")
    sidecar(folder / "a.txt")
    assert pairs(folder) == {"a.png": "a girl"}
    (folder / "b.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "b.txt").symlink_to(tmp_path / "nowhere.txt")
    (folder / "far").symlink_to(tmp_path / "far")
    (folder / "circle").symlink_to(folder)
    found = problems(folder)
    for name, part in {"circle": "not followed", "far": "not followed", "b.txt": "No such", "b.png": "No such"}.items():
        (line,) = (line for line in found if line.split(":")[0].endswith(name))
        assert part in line
    assert len(found) == 4


@pytest.fixture
def as_user():
    """A folder, and a context without root's rights to open everything."""
    if not hasattr(os, "geteuid"):
        pytest.skip("POSIX permissions only")
    user, root = os.geteuid() or 65534, os.geteuid()
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folder is closed to other users
    folder.chmod(0o755)
    Image.init()  # loads Pillow's plugins, which may be installed where only root can read

    @contextlib.contextmanager
    def enter():
        os.seteuid(user)
        try:
            yield
        finally:
            os.seteuid(root)

    yield folder, enter
    for path in (folder, folder / "closed", folder / "data"):
        if path.exists():
            path.chmod(0o755)
    shutil.rmtree(folder)


def test_without_permission(as_user):
    folder, enter = as_user
    for name in ("data/a", "data/b", "closed/x"):
        put(folder / f"{name}.png")
        sidecar(folder / f"{name}.txt")
    (folder / "closed").rename(folder / "data" / "closed")
    for name in ("a.png", "b.txt", "closed"):
        (folder / "data" / name).chmod(0)
    with enter():
        found = problems(folder / "data")
    (folder / "data" / "closed").chmod(0o755)
    assert [Path(line.split(":")[0]).name for line in found] == ["closed", "b.txt", "a.png"]
    assert all("Permission denied" in line for line in found)
    (folder / "data").chmod(0)
    with enter():
        only_problem(folder / "data", "Permission denied")
        only_problem(folder / "data" / "closed", "no such folder")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems forbid such names")
def test_unprintable_file_names(tmp_path):
    put(tmp_path / "a\nb\x1b[31m.png")
    sidecar(tmp_path / "a\nb\x1b[31m.txt")
    assert pairs(tmp_path) == {"a\nb\x1b[31m.png": "a girl"}
    shutil.copy(tmp_path / "a\nb\x1b[31m.png", os.fsencode(tmp_path) + b"/\xff.png")
    found = problems(tmp_path)
    assert len(found) == 2 and all(r"\udcff.png" in line for line in found)


# -------------------------------------------------------------------------------------------- images


def test_all_exif_orientations_give_the_same_upright_picture(tmp_path):
    upright = np.zeros((24, 16, 3), np.uint8)
    upright[:12, :8], upright[:12, 8:], upright[12:, :8] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    image = Image.fromarray(upright)
    turn = Image.Transpose  # what turns the upright picture into the stored one
    stored = [None, turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE,
              turn.ROTATE_90, turn.TRANSVERSE, turn.ROTATE_270]  # fmt: skip
    for orientation, how in enumerate(stored, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for suffix in (".png", ".jpg", ".webp", ".tiff"):
            name = f"{orientation}{suffix}"
            (image if how is None else image.transpose(how)).save(tmp_path / name, exif=exif, quality=100)
        sidecar(tmp_path / f"{orientation}.txt")
    found = data.read(tmp_path, SIDE, log=lambda _: None)
    assert len(found) == 32
    for pair in found:
        picture = np.asarray(pair.open()).astype(int)
        assert picture.shape == upright.shape
        for y, x in ((6, 4), (6, 12), (18, 4), (18, 12)):
            assert np.abs(picture[y, x] - upright[y, x]).max() < 30, pair.name


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_16_bit_grey_stays_grey(tmp_path, name):
    grey = np.linspace(0, 65535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
    Image.fromarray(grey).save(tmp_path / name)
    picture = opened(tmp_path, name).astype(float)
    assert np.abs(picture - grey[..., None] / 257).max() <= 1


def test_16_bit_grey_with_a_transparent_shade(tmp_path):
    grey = np.full((SIDE, SIDE), 0x8000, np.uint16)
    grey[0] = 0x0100
    Image.fromarray(grey).save(tmp_path / "a.png", transparency=0x0100)
    picture = opened(tmp_path, "a.png")
    assert (picture[0] == 255).all() and (picture[1:] == 128).all()


@pytest.mark.parametrize("most", [1.0, 255.0, 65535.0, 1e6])
def test_float_grey(tmp_path, most):
    grey = np.full((SIDE, SIDE), most / 2, np.float32)
    grey[0], grey[1], grey[2] = most, np.nan, -most
    Image.fromarray(grey).save(tmp_path / "a.tiff")
    picture = opened(tmp_path, "a.tiff").astype(int)
    assert (picture[0] == 255).all() and (picture[1:3] == 0).all() and np.abs(picture[3:] - 128).max() <= 1


@pytest.mark.parametrize("mode, name, color, wanted", [
    ("RGB", "a.png", RED, RED), ("RGB", "a.jpg", RED, RED), ("RGB", "a.webp", RED, RED), ("RGB", "a.bmp", RED, RED),
    ("RGB", "a.tiff", RED, RED), ("RGB", "a.avif", RED, RED), ("RGB", "a.jp2", RED, RED), ("RGB", "a.tga", RED, RED),
    ("RGB", "a.PNG", RED, RED), ("RGB", "a.JPEG", RED, RED), ("RGB", "a.jfif", RED, RED), ("RGB", "a.ppm", RED, RED),
    ("RGB", "a.gif", RED, RED), ("RGB", "a.ico", RED, RED),
    ("L", "a.png", 100, (100,) * 3), ("L", "a.jpg", 100, (100,) * 3), ("1", "a.png", 1, (255,) * 3),
    ("CMYK", "a.jpg", (0, 255, 255, 0), (255, 0, 0)), ("CMYK", "a.tiff", (0, 255, 255, 0), (255, 0, 0)),
    ("YCbCr", "a.jpg", (128, 128, 128), (128,) * 3), ("LAB", "a.tiff", (255, 128, 128), (255,) * 3),
    ("RGBA", "a.png", (0, 0, 0, 0), (255,) * 3), ("RGBA", "a.png", (0, 0, 0, 255), (0,) * 3),
    ("RGBA", "a.png", (255, 0, 0, 128), (255, 127, 127)), ("RGBA", "a.webp", (0, 0, 0, 0), (255,) * 3),
    ("RGBA", "a.tiff", (0, 0, 0, 0), (255,) * 3), ("LA", "a.png", (0, 0), (255,) * 3),
    ("LA", "a.png", (100, 255), (100,) * 3), ("P", "a.png", 0, (0,) * 3),
])  # fmt: skip
def test_modes_and_formats(tmp_path, mode, name, color, wanted):
    Image.init()
    if Image.registered_extensions()[Path(name).suffix.lower()] not in Image.SAVE:
        pytest.skip("this Pillow cannot write it")
    put(tmp_path / name, (SIDE * 2, SIDE * 2), mode, color)
    picture = opened(tmp_path, name).astype(int)
    assert np.abs(picture - np.array(wanted)).max() <= 6


@pytest.mark.parametrize("suffix", [".png", ".gif"])
@pytest.mark.parametrize("alpha", [0, b"\0\xff"])
def test_transparent_palettes_become_white(tmp_path, suffix, alpha):
    image = Image.new("P", (SIDE, SIDE))
    image.putpalette([10, 20, 30, *RED] + [0] * 762)
    image.paste(1, (0, 0, 8, SIDE))
    image.save(tmp_path / f"a{suffix}", transparency=0 if suffix == ".gif" else alpha)
    picture = opened(tmp_path, f"a{suffix}")
    assert (picture[:, :8] == RED).all() and (picture[:, 8:] == 255).all()


@pytest.mark.parametrize("mode, color", [("L", 7), ("RGB", (7, 8, 9))])
def test_a_transparent_colour_becomes_white(tmp_path, mode, color):
    put(tmp_path / "a.png", mode=mode, color=color, transparency=color)
    assert (opened(tmp_path, "a.png") == 255).all()


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tiff", ".jpg"])
def test_the_first_frame_of_an_animation_is_used_and_told(tmp_path, suffix):
    frames = [Image.new("RGB", (SIDE, SIDE), c) for c in (RED, (0, 0, 255))]
    how = {"format": "MPO"} if suffix == ".jpg" else {}  # as cameras write pictures with depth
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], **how)
    assert np.abs(opened(tmp_path, f"a{suffix}").astype(int) - RED).max() <= 6
    assert notes(tmp_path) == [
        f"1 images are animated or of several pages; the first picture of each is used: a{suffix}"
    ]


def test_small_and_oblong_images_are_told(tmp_path):
    for i in range(7):
        put(tmp_path / f"{i}.png", (SIDE // 2, SIDE // 2 + 1))
        sidecar(tmp_path / f"{i}.txt")
    small, oblong = notes(tmp_path)
    assert "7 images are smaller than 16 px" in small and "4.png and 2 more" in small
    assert "not square" in oblong
    put(tmp_path / "0.png", (SIDE // 2 - 1, 100))
    only_problem(tmp_path, "0.png", "7 x 100 is too small", "8 x 8")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tiff", ".avif", ".jp2", ".tga"])
@pytest.mark.parametrize("part", [0, 0.02, 0.5, 0.9])
def test_cut_files(tmp_path, suffix, part):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    sidecar(tmp_path / "a.txt")
    only_problem(tmp_path, f"a{suffix}: ", "empty" if part == 0 else "amaged")


@pytest.mark.parametrize("suffix", ".heic .HEIF .jxl .svg .psd .eps .dng .cr2".split())
def test_formats_that_are_not_read(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    sidecar(tmp_path / "a.txt")
    only_problem(tmp_path, f"a{suffix}: ", "save it as PNG or JPEG")


def test_a_wrong_suffix_does_not_matter(tmp_path):
    put(tmp_path / "a.png").rename(tmp_path / "a.heic")
    assert (opened(tmp_path, "a.heic") == RED).all()


def test_decompression_bombs(tmp_path, monkeypatch):
    put(tmp_path / "a.png", (40, 40))
    sidecar(tmp_path / "a.txt")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    only_problem(tmp_path, "a.png: ", "more than 1,000")


def test_nothing_but_the_checks_is_kept_in_memory(tmp_path):
    path = put(tmp_path / "a.png")
    sidecar(tmp_path / "a.txt")
    (pair,) = data.read(tmp_path, SIDE)
    put(path, color=(1, 2, 3))
    assert pair.open().getpixel((0, 0)) == pair.open().getpixel((1, 1)) == (1, 2, 3)


def test_open_image_takes_paths_and_images(tmp_path):
    path = put(tmp_path / "a.png")
    assert data.open_image(path).getpixel((0, 0)) == data.open_image(Image.open(path)).getpixel((0, 0)) == RED


def test_to_square_takes_the_middle():
    image = Image.new("RGB", (48, 16))
    image.paste(RED, (16, 0, 32, 16))
    assert (np.asarray(data.to_square(image, 16)) == RED).all()
    assert data.to_square(image, 5).size == (5, 5)


# ------------------------------------------------------------------------------------ wild metadata

VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=9) | st.sampled_from(["a.png", "../a.png", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["file_name", "text", "x"]), inner),
    max_leaves=5,
)
FIELDS = st.dictionaries(st.sampled_from(["file_name", "text"]), VALUES)
LINES = st.lists((FIELDS | VALUES).map(json.dumps) | st.text(max_size=20), max_size=5).map("\n".join)
CELLS = st.sampled_from(["a.png", "file_name", "text", ",", '"', "\n", "\r", ";", " ", "x", "\0"])
TABLES = st.lists(CELLS, max_size=12).map(lambda cells: "file_name,text\n" + "".join(cells))


def pairs_or_problems(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in {"a.png": None, "b.png": None, **files}.items():
            if content is None:
                put(folder / file)
            else:
                (folder / file).write_bytes(content)
        try:
            found = data.read(folder, SIDE, log=lambda line: line.encode())
        except DataError as error:
            assert error.problems
            str(error).encode()
        else:
            assert len(found) == sum(Path(f).suffix == ".png" for f in {"a.png", "b.png", *files})
            assert all(p.caption.encode() and p.open().size == (SIDE, SIDE) for p in found)


@wild
@given(LINES.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=50))
def test_wild_json_lines(content):
    pairs_or_problems({"metadata.jsonl": content})


@wild
@given(TABLES.map(str.encode) | st.binary(max_size=50))
def test_wild_csv(content):
    pairs_or_problems({"metadata.csv": content})


@wild
@given(st.binary(max_size=30), st.text(max_size=30).map(str.encode))
def test_wild_sidecars(one, two):
    pairs_or_problems({"a.txt": one, "b.caption": two})


@wild
@given(st.binary(max_size=80), st.binary(max_size=8), st.integers(0, 80))
def test_wild_images(content, patch, at):
    png = _png()
    pairs_or_problems({"a.txt": b"x", "b.txt": b"x", "c.png": content, "c.txt": b"x"})
    pairs_or_problems({"a.txt": b"x", "b.txt": b"x", "c.png": png[:at] + patch + png[at + len(patch) :], "c.txt": b"x"})


def _png() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        return put(Path(name, "a.png")).read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems forbid many names")
@wild
@given(st.lists(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=9)))
def test_wild_file_names(names):
    names = [n + ".png" for n in names if len(n.encode()) < 200 and not n.startswith(".")]
    table = "\n".join(json.dumps(row(n)) for n in ["a.png", "b.png", *names])
    pairs_or_problems({**dict.fromkeys(names), "metadata.jsonl": table.encode()})


# ---------------------------------------------------------------------------------------------- hub


class Rows(list):
    """As much of datasets.Dataset as `read` uses: rows of {"image": {"bytes", "path"}, column: text}."""

    @property
    def column_names(self):
        return list(list.__getitem__(self, 0)) if self else ["image", "text"]

    def __getitem__(self, key):
        return [r[key] for r in self] if isinstance(key, str) else super().__getitem__(key)

    def cast_column(self, name, feature):
        assert (name, feature) == ("image", {"decode": False})
        return self


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    splits = {}

    def load_dataset(name, split):
        if not splits:
            raise ConnectionError("offline")
        return splits[split]

    fake = SimpleNamespace(load_dataset=load_dataset, get_dataset_split_names=lambda n: list(splits), Image=dict)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return splits


def test_hub_pairs(hub, tmp_path):
    path = put(tmp_path / "far" / "a.png", (SIDE, SIDE * 2))
    hub["train"] = Rows([
        {"image": {"bytes": path.read_bytes(), "path": "a.png"}, "caption": " one "},
        {"image": {"bytes": None, "path": str(path)}, "caption": "two"},
    ])  # fmt: skip
    lines = []
    found = data.read("owner/name", SIDE, log=lines.append)
    assert [(p.name, p.caption) for p in found] == [("row 0", "one"), ("row 1", "two")]
    assert all(p.open().getpixel((0, 0)) == RED for p in found)
    assert len(lines) == 1 and "not square" in lines[0]
    assert data.read("owner/name", SIDE, "test") == []


def test_hub_problems_are_listed_at_once(hub, tmp_path):
    tiny = put(tmp_path / "far" / "a.png", (4, 4)).read_bytes()
    hub["train"] = Rows([
        {"image": {"bytes": tiny, "path": None}, "text": "x"}, {"image": None, "text": "x"},
        {"image": {"bytes": b"zzz", "path": None}, "text": ["x"]}, {"image": {"bytes": tiny[:50]}, "text": None},
    ])  # fmt: skip
    found = problems("owner/name")
    assert sorted(line.split(":")[0] for line in found) == ["row 0", "row 1", "row 2", "row 2", "row 3", "row 3"]
    hub["train"] = Rows([{"picture": 1, "text": "x"}])
    only_problem("owner/name", "image and text", "picture")
    hub["train"] = Rows()
    only_problem("owner/name", "no images")
    hub.clear()
    only_problem("owner/name", "no such folder", "offline")


def test_hub_without_datasets(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    only_problem("owner/name", "no such folder", "pip install")


# ----------------------------------------------------------------------------------------- encoding


class Tokenizer:
    """One token for each character, padded to 12."""

    model_max_length = 12

    def __call__(self, texts, padding=None, max_length=None, truncation=False, return_tensors=None):
        if isinstance(texts, str):
            return SimpleNamespace(input_ids=[ord(c) % 100 for c in texts])
        assert padding == "max_length" and truncation and return_tensors == "pt"
        ids = [([ord(c) % 100 for c in t] + [0] * max_length)[:max_length] for t in texts]
        return SimpleNamespace(input_ids=torch.tensor(ids))


@pytest.fixture(scope="module")
def models():
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4, norm_num_groups=4, scaling_factor=0.5,
    )  # fmt: skip
    config = CLIPTextConfig(
        vocab_size=100, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return vae.eval(), Tokenizer(), CLIPTextModel(config).eval()


def noise_pairs(captions) -> list[data.Pair]:
    images = np.random.default_rng(0).integers(0, 255, (len(captions), SIDE, SIDE, 3), np.uint8)
    return [data.Pair(f"{i}.png", c, lambda x=x: Image.fromarray(x)) for i, (c, x) in enumerate(zip(captions, images))]


def test_encode_gives_scaled_moments_of_the_image_and_its_mirror_image(models):
    vae, tokenizer, encoder = models
    found = noise_pairs(["a", "b", "c"])
    encoded = data.encode(found, vae, tokenizer, encoder, SIDE, flip=True)
    assert encoded.names == ["0.png", "1.png", "2.png"]
    assert encoded.mean.shape == encoded.std.shape == (3, 2, 4, 8, 8)
    assert encoded.text.shape == (3, 12, 8) and encoded.empty.shape == (1, 12, 8)
    assert not any(x.requires_grad for x in (encoded.mean, encoded.std, encoded.text, encoded.empty))
    for i, pair in enumerate(found):
        x = torch.from_numpy(np.array(pair.open())).permute(2, 0, 1)[None] / 127.5 - 1
        for j, one in enumerate((x, x.flip(-1))):
            with torch.no_grad():
                wanted = vae.encode(one).latent_dist
            torch.testing.assert_close(encoded.mean[i, j], wanted.mean[0] * 0.5)
            torch.testing.assert_close(encoded.std[i, j], wanted.std[0] * 0.5)
    once = data.encode(found, vae, tokenizer, encoder, SIDE)
    torch.testing.assert_close(once.mean, encoded.mean[:, :1])
    assert torch.equal(once.mean, data.encode(found, vae, tokenizer, encoder, SIDE).mean)


def test_encode_puts_trigger_words_before_each_caption_and_encodes_each_once(models):
    vae, tokenizer, encoder = models
    seen = []

    def watch(module, inputs):
        seen.extend(map(tuple, inputs[0].tolist()))

    hook = encoder.register_forward_pre_hook(watch)
    try:
        encoded = data.encode(noise_pairs(["cat", "dog", "cat"]), vae, tokenizer, encoder, SIDE, trigger_words="sks")
    finally:
        hook.remove()
    ids = tokenizer(["sks cat", "sks dog", ""], "max_length", 12, True, "pt").input_ids
    assert seen == list(map(tuple, ids.tolist()))
    with torch.no_grad():
        wanted = encoder(ids).last_hidden_state
    torch.testing.assert_close(encoded.text, wanted[[0, 1, 0]])
    torch.testing.assert_close(encoded.empty, wanted[2:])


def test_encode_text_of_many_captions(models):
    _, tokenizer, encoder = models
    texts = [f"caption {i % 40}" for i in range(80)]
    states = data.encode_text(texts, tokenizer, encoder)
    assert torch.equal(states[:40], states[40:])
    torch.testing.assert_close(states[37:38], data.encode_text(["caption 37"], tokenizer, encoder))


def test_encodings_that_are_not_finite_are_named(models):
    _, tokenizer, encoder = models

    class Vae:
        device, dtype, config = torch.device("cpu"), torch.float32, SimpleNamespace(scaling_factor=1.0)

        def encode(self, x):
            dark = torch.where(x.mean((1, 2, 3), keepdim=True) < -0.9, torch.nan, 0.0)
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=x + dark, std=x.abs()))

    found = noise_pairs(["a", "b", "c"])
    found[1] = data.Pair("black.png", "b", lambda: Image.new("RGB", (SIDE, SIDE)))
    with pytest.raises(DataError, match="black.png") as caught:
        data.encode(found, Vae(), tokenizer, encoder, SIDE, flip=True)
    assert len(caught.value.problems) == 1


def test_encoded_moves_the_text_to_a_dtype_and_keeps_the_moments_in_fp32(models):
    encoded = data.encode(noise_pairs(["a"]), *models, SIDE).to("cpu", torch.bfloat16)
    assert encoded.text.dtype == encoded.empty.dtype == torch.bfloat16
    assert encoded.mean.dtype == encoded.std.dtype == torch.float32


def test_truncated_names_captions_that_are_too_long():
    found = noise_pairs(["x" * 12, "x" * 13, "x"])
    assert data.truncated(found, Tokenizer()) == ["1.png"]
    assert data.truncated(found, Tokenizer(), "sks") == ["0.png", "1.png"]
