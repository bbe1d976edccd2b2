"""What `data.read` promises about folders, captions and hub data sets, on real files."""

import contextlib
import csv
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from folders import RED, SIDE, jsonl, notes, only_problem, pairs, problems, put, row, sidecar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdtune.training import dataset
from sdtune.training.errors import DataError

wild = settings(max_examples=50, deadline=None, database=None)


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
    assert dataset.read(tmp_path, SIDE, "test") == []


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
            found = dataset.read(folder, SIDE, log=lambda line: line.encode())
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
    found = dataset.read("owner/name", SIDE, log=lines.append)
    assert [(p.name, p.caption) for p in found] == [("row 0", "one"), ("row 1", "two")]
    assert all(p.open().getpixel((0, 0)) == RED for p in found)
    assert len(lines) == 1 and "not square" in lines[0]
    assert dataset.read("owner/name", SIDE, "test") == []


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
