"""Folders and hub data sets, as `dataset.read_pairs` reads them: splits, links, permissions, damaged files."""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import (
    BUCKETS,
    RED,
    SIDE,
    assert_only_problem,
    assert_pairs_or_problems,
    metadata_row,
    read_captions,
    read_notes,
    read_problems,
    write_caption,
    write_image,
    write_jsonl,
)
from PIL import Image

from sdtune.training import dataset
from sdtune.training.errors import DataError

many_examples = settings(max_examples=50, deadline=None, database=None)


def test_every_problem_is_listed_at_once_by_file_name(tmp_path):
    for name in ("good.png", "none.png", "empty.png", "twice.png"):
        write_image(tmp_path / name)
        write_caption(tmp_path / name.replace(".png", ".txt"), "  \n" if name == "empty.png" else "a girl")
    (tmp_path / "none.txt").unlink()
    write_caption(tmp_path / "twice.caption")
    write_caption(tmp_path / "lonely.txt")
    write_image(tmp_path / "tiny.png", (3, 12))
    write_caption(tmp_path / "tiny.txt")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    (tmp_path / "void.jpg").touch()
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    for stem in ("cut", "void", "phone"):
        write_caption(tmp_path / f"{stem}.txt")
    (tmp_path / "void.txt").write_bytes(b"\xff\xfe")
    found = read_problems(tmp_path)
    wanted = {
        "none.png": "none.txt", "empty.png": "empty one", "twice.caption, twice.txt": "keep one",
        "lonely.txt": "without an image", "tiny.png": "3 x 12", "cut.png": "damaged", "void.jpg": "empty",
        "phone.heic": "PNG", "void.txt": "UTF-8",
    }  # fmt: skip
    assert len(found) == len(wanted)
    for name, part in wanted.items():
        (line,) = (line for line in found if line.startswith(name))
        assert part in line


def test_train_and_test_folders_are_splits(tmp_path):
    for name in ("train/a.png", "test/b.png"):
        write_image(tmp_path / name)
        write_jsonl((tmp_path / name).parent, metadata_row(Path(name).name, name))
    assert read_captions(tmp_path) == {"a.png": "train/a.png"}
    assert read_captions(tmp_path, "test") == {"b.png": "test/b.png"}


def test_without_a_test_split_nothing_is_held_out(tmp_path):
    write_image(tmp_path / "a.png")
    write_caption(tmp_path / "a.txt")
    assert dataset.read_pairs(tmp_path, BUCKETS, "test") == []


def test_images_in_a_test_folder_among_the_others_are_not_trained_on(tmp_path):
    for name in ("a", "test/b"):
        write_image(tmp_path / f"{name}.png")
        write_caption(tmp_path / f"{name}.txt", name)
    assert read_captions(tmp_path) == {"a.png": "a"}
    assert read_captions(tmp_path, "test") == {"b.png": "test/b"}


def test_files_next_to_the_splits_are_reported(tmp_path):
    for name in ("train/a", "validation/b", "regular/deep/c"):
        write_image(tmp_path / f"{name}.png")
        write_caption(tmp_path / f"{name}.txt")
    (tmp_path / "README.md").touch()
    assert read_notes(tmp_path) == ["only the folders train and test are read, not regular, validation"]
    write_image(tmp_path / "loose.png")
    write_jsonl(tmp_path, metadata_row("loose.png"))
    found = read_problems(tmp_path)
    assert [line.split(":")[0] for line in found] == ["loose.png", "metadata.jsonl"]
    assert all("train" in line for line in found)


def test_hidden_files_are_ignored(tmp_path):
    write_image(tmp_path / "a.png")
    write_caption(tmp_path / "a.txt")
    for name in (".DS_Store", "._a.png", "._a.txt", ".git/x.png", "sub/.x.jpg"):
        write_caption(tmp_path / name)
    assert read_captions(tmp_path) == {"a.png": "a girl"}
    assert read_notes(tmp_path) == []


def test_files_that_are_not_used_are_noted(tmp_path):
    write_image(tmp_path / "a.png")
    write_caption(tmp_path / "a.txt")
    for name in ("film.mp4", "manual.pdf", "photo"):
        (tmp_path / name).touch()
    assert read_notes(tmp_path) == ["3 other files are not used: film.mp4, manual.pdf, photo"]


@pytest.mark.parametrize("content", [[], ["README.md"], ["sub/.hidden.png"]])
def test_a_folder_without_images(tmp_path, content):
    for name in content:
        write_caption(tmp_path / name)
    assert_only_problem(tmp_path, "no images")


def test_a_folder_with_captions_only(tmp_path):
    write_jsonl(tmp_path, metadata_row("a.png"))
    assert_only_problem(tmp_path, "a.png", "no such image")


def test_a_source_that_is_no_folder(tmp_path):
    file = write_image(tmp_path / "a.png")
    assert_only_problem(file, "this is a file")
    for source in (tmp_path / "none", "", "a\0b", "~nobody-of-this-name/x", "x" * 5000):
        assert_only_problem(source, "no such folder")


def test_links_to_files_are_followed_and_links_to_folders_are_problems(tmp_path):
    write_image(tmp_path / "far" / "a.png")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").symlink_to(tmp_path / "far" / "a.png")
    write_caption(folder / "a.txt")
    assert read_captions(folder) == {"a.png": "a girl"}
    (folder / "b.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "b.txt").symlink_to(tmp_path / "nowhere.txt")
    (folder / "far").symlink_to(tmp_path / "far")
    (folder / "circle").symlink_to(folder)
    found = read_problems(folder)
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


def test_files_and_folders_without_permission(as_user):
    folder, enter = as_user
    for name in ("data/a", "data/b", "closed/x"):
        write_image(folder / f"{name}.png")
        write_caption(folder / f"{name}.txt")
    (folder / "closed").rename(folder / "data" / "closed")
    for name in ("a.png", "b.txt", "closed"):
        (folder / "data" / name).chmod(0)
    with enter():
        found = read_problems(folder / "data")
    (folder / "data" / "closed").chmod(0o755)
    assert [Path(line.split(":")[0]).name for line in found] == ["closed", "b.txt", "a.png"]
    assert all("Permission denied" in line for line in found)
    (folder / "data").chmod(0)
    with enter():
        assert_only_problem(folder / "data", "Permission denied")
        assert_only_problem(folder / "data" / "closed", "no such folder")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems forbid such names")
def test_unprintable_file_names_are_escaped_in_messages(tmp_path):
    write_image(tmp_path / "a\nb\x1b[31m.png")
    write_caption(tmp_path / "a\nb\x1b[31m.txt")
    assert read_captions(tmp_path) == {"a\nb\x1b[31m.png": "a girl"}
    shutil.copy(tmp_path / "a\nb\x1b[31m.png", os.fsencode(tmp_path) + b"/\xff.png")
    found = read_problems(tmp_path)
    assert len(found) == 2 and all(r"\udcff.png" in line for line in found)


@many_examples
@given(st.binary(max_size=80), st.binary(max_size=8), st.integers(0, 80))
def test_any_image_files_give_pairs_or_problems(content, patch, at):
    png = _png()
    assert_pairs_or_problems({"a.txt": b"x", "b.txt": b"x", "c.png": content, "c.txt": b"x"})
    assert_pairs_or_problems(
        {"a.txt": b"x", "b.txt": b"x", "c.png": png[:at] + patch + png[at + len(patch) :], "c.txt": b"x"}
    )


def _png() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        return write_image(Path(name, "a.png")).read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems forbid many names")
@many_examples
@given(st.lists(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=9)))
def test_any_file_names_give_pairs_or_problems(names):
    names = [n + ".png" for n in names if len(n.encode()) < 200 and not n.startswith(".")]
    table = "\n".join(json.dumps(metadata_row(n)) for n in ["a.png", "b.png", *names])
    assert_pairs_or_problems({**dict.fromkeys(names), "metadata.jsonl": table.encode()})


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

    fake = SimpleNamespace(load_dataset=load_dataset, get_dataset_split_names=lambda n: list(splits), Image=dict,
                           __spec__=True)  # fmt: skip
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return splits


def test_pairs_of_a_hub_data_set(hub, tmp_path):
    path = write_image(tmp_path / "far" / "a.png", (SIDE, SIDE * 2))
    hub["train"] = Rows([
        {"image": {"bytes": path.read_bytes(), "path": "a.png"}, "caption": " one "},
        {"image": {"bytes": None, "path": str(path)}, "caption": "two"},
    ])  # fmt: skip
    lines = []
    found = dataset.read_pairs("owner/name", BUCKETS, log=lines.append)
    assert [(p.name, p.caption) for p in found] == [("row 0", "one"), ("row 1", "two")]
    assert all(p.open().getpixel((0, 0)) == RED for p in found)
    assert lines[:2] == [
        "2 images are cropped by more than 10 %: row 0 (50% of it), row 1 (50% of it)",
        "shapes in px: 2 of 8 x 32; at worst 50.0% of a picture is cropped (row 0)",
    ]
    assert lines[2:] == ["1 images are copies of others, or nearly: row 1 = row 0"]
    assert dataset.read_pairs("owner/name", BUCKETS, "test") == []


def test_hub_problems_are_listed_at_once(hub, tmp_path):
    tiny = write_image(tmp_path / "far" / "a.png", (4, 4)).read_bytes()
    hub["train"] = Rows([
        {"image": {"bytes": tiny, "path": None}, "text": "x"}, {"image": None, "text": "x"},
        {"image": {"bytes": b"zzz", "path": None}, "text": [3]}, {"image": {"bytes": tiny[:50]}, "text": None},
    ])  # fmt: skip
    found = read_problems("owner/name")
    assert sorted(line.split(":")[0] for line in found) == ["row 0", "row 1", "row 2", "row 2", "row 3", "row 3"]
    hub["train"] = Rows([{"picture": 1, "text": "x"}])
    assert_only_problem("owner/name", "image and text", "picture")
    hub["train"] = Rows()
    assert_only_problem("owner/name", "no images")
    hub.clear()
    assert_only_problem("owner/name", "no such folder", "offline")


def test_a_hub_data_set_without_the_datasets_package(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert_only_problem("owner/name", "no such folder", "datasets not installed", "pip install 'sdtune[hub]'")


def test_copies_of_images_are_told_within_and_between_train_and_test(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    for name, side, suffix in (("train/a", SIDE, "png"), ("train/b", SIDE, "bmp"), ("test/c", SIDE * 2, "png")):
        path = tmp_path / f"{name}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise).resize((side, side), Image.Resampling.NEAREST).save(path)
        write_caption(path.with_suffix(".txt"))
    write_image(tmp_path / "train/d.png", color=(1, 2, 3))
    write_caption(tmp_path / "train/d.txt")
    lines = []
    dataset.read_splits(tmp_path, BUCKETS, lines.append)
    assert "1 images are copies of others, or nearly: b.bmp = a.png" in lines
    assert any(line.startswith("1 of 1 held-out images are copies") and "c.png = a.png" in line for line in lines)


def test_the_number_in_the_name_of_kohyas_folders_is_how_often_an_image_is_trained_on(tmp_path):
    for name in ("10_girl/a.png", "1_girl/b.png", "plain/c.png", "2023_trip/d.png", "0_off/e.png"):
        write_image(tmp_path / name)
        write_caption((tmp_path / name).with_suffix(".txt"))
    found = {p.name: p.repeats for p in dataset.read_pairs(tmp_path, BUCKETS, log=lambda _: None)}
    assert found == {"0_off/e.png": 1, "10_girl/a.png": 10, "1_girl/b.png": 1, "2023_trip/d.png": 1, "plain/c.png": 1}
    notes = read_notes(tmp_path)
    assert any("as often as their folders say" in note and "10 x 10_girl" in note for note in notes)
    assert any("no count of repeats from 1 to 100" in note and "2023_trip/d.png" in note for note in notes)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_pipes_and_devices_are_named_and_never_read(tmp_path):
    write_image(tmp_path / "a.png")
    write_caption(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "b.png")
    os.mkfifo(tmp_path / "a.caption")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    problems = read_problems(tmp_path)
    assert [line.split(": ")[1] for line in problems] == ["a pipe, a socket or a device, not a file; remove it"] * 3


def test_a_png_whose_content_differs_from_its_checksums_is_refused(tmp_path):
    path = write_image(tmp_path / "a.png", (64, 64))
    write_caption(tmp_path / "a.txt")
    content = bytearray(path.read_bytes())
    content[-14] ^= 1  # the last byte of the checksum of the pixels
    path.write_bytes(content)
    assert_only_problem(tmp_path, "a.png", "damaged")


@pytest.mark.parametrize("source", ["", "~nobody-there/x", "x" * 5000, "a\nb"])
def test_a_text_that_can_be_no_folder_is_refused_in_words(source):
    with pytest.raises(DataError, match="no such folder") as error:
        dataset.read_splits(source, BUCKETS)
    assert len(str(error.value)) < 500
