"""Captions in files next to the images, and in metadata.jsonl or metadata.csv, as `dataset.read_pairs` reads them."""

import csv
import json
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import (
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


def test_captions_in_json_lines(tmp_path):
    for name in ("b.png", "a.jpg", "sub/c.webp"):
        write_image(tmp_path / name)
    write_jsonl(
        tmp_path,
        metadata_row("b.png", " two "),
        "",
        metadata_row("./a.jpg", "one\nline"),
        "  \r",
        metadata_row("sub/c.webp", "three"),
        "",
    )
    assert list(read_captions(tmp_path).items()) == [("a.jpg", "one\nline"), ("b.png", "two"), ("sub/c.webp", "three")]


def test_jsonl_with_bom_crlf_and_line_separators_inside_captions(tmp_path):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png")
    lines = [json.dumps(metadata_row(n, f"x\u2028y\x85{n}"), ensure_ascii=False) for n in ("a.png", "b.png")]
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_captions(tmp_path) == {"a.png": "x\u2028y\x85a.png", "b.png": "x\u2028y\x85b.png"}


def test_csv_with_quotes_newlines_commas_bom_and_blank_lines(tmp_path):
    captions = {"a.png": 'she said "hi",\nand left', "b, c.png": "plain", "d.png": "größer, 東京"}
    for name in captions:
        write_image(tmp_path / name)
    with open(tmp_path / "metadata.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "extra", "file_name"])
        for name, text in captions.items():
            writer.writerow([text, 1, name])
            writer.writerow([])
            writer.writerow(["", "", ""])
    assert read_captions(tmp_path) == captions


@pytest.mark.parametrize("suffix", [".txt", ".caption", ".TXT", ".Caption"])
def test_captions_in_files_next_to_the_images(tmp_path, suffix):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "sub" / "a.png")
    (tmp_path / f"a{suffix}").write_bytes(b"\xef\xbb\xbfone \r\n")
    write_caption(tmp_path / "sub" / f"a{suffix}", "two")
    assert read_captions(tmp_path) == {"a.png": "one", "sub/a.png": "two"}


@pytest.mark.parametrize(
    "name", ["A.JPG", "a b.png", "a.b.png", "a..png", "été 東京 👩‍🎨.png", "#%$&;'.png", "-x.PNG", " .png"]
)
def test_unusual_file_names_keep_their_captions(tmp_path, name):
    write_image(tmp_path / "side" / name)
    write_image(tmp_path / "side" / "a.c.png")  # the stem is a.c, not a
    write_caption(tmp_path / "side" / "a.c.txt", "other")
    write_caption(tmp_path / "side" / (os.path.splitext(name)[0] + ".txt"), "mine")
    assert read_captions(tmp_path / "side") == {name: "mine", "a.c.png": "other"}
    write_image(tmp_path / "table" / name)
    write_jsonl(tmp_path / "table", metadata_row(name, "mine"))
    assert read_captions(tmp_path / "table") == {name: "mine"}


def test_decomposed_file_names_match_composed_captions(tmp_path):
    for folder in ("table", "side"):
        write_image(tmp_path / folder / "か\u3099.png")  # が as macOS writes it
    write_jsonl(tmp_path / "table", metadata_row("が.png"))
    write_caption(tmp_path / "side" / "が.txt")
    assert read_captions(tmp_path / "table") == read_captions(tmp_path / "side") == {"か\u3099.png": "a girl"}


def test_images_of_one_stem_share_a_caption_file_and_a_note_says_so(tmp_path):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "a.jpg", color=(0, 80, 200))
    write_caption(tmp_path / "a.txt")
    assert read_captions(tmp_path) == {"a.jpg": "a girl", "a.png": "a girl"}
    assert read_notes(tmp_path) == ["a.jpg, a.png share the caption in a.txt"]


def test_images_of_one_stem_have_their_own_captions_in_metadata(tmp_path):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "a.jpg")
    write_jsonl(tmp_path, metadata_row("a.png", "one"), metadata_row("a.jpg", "two"))
    assert read_captions(tmp_path) == {"a.jpg": "two", "a.png": "one"}


def test_missing_and_superfluous_captions_in_metadata(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        write_image(tmp_path / name)
    write_jsonl(tmp_path, metadata_row("a.png"), metadata_row("b.png", " "), metadata_row("d.png"))
    assert [line.split(":")[0] for line in read_problems(tmp_path)] == ["b.png", "c.png", "d.png"]
    assert all("metadata.jsonl" in line for line in read_problems(tmp_path)[:2])


def test_a_name_that_is_longer_than_any_file_name_is_shortened_in_the_message(tmp_path):
    write_image(tmp_path / "a.png")
    write_jsonl(tmp_path, metadata_row("a.png"), metadata_row("x" * 5000))
    (problem,) = read_problems(tmp_path)
    assert "x" * 40 + "..." + "x" * 40 in problem and len(problem) < 500


def test_metadata_and_caption_files_together_are_one_problem(tmp_path):
    for stem in "abcdefgh":
        write_image(tmp_path / f"{stem}.png")
        write_caption(tmp_path / f"{stem}.txt")
    write_caption(tmp_path / "README.txt")
    write_jsonl(tmp_path, *(metadata_row(f"{stem}.png") for stem in "abcdefgh"))
    assert_only_problem(tmp_path, "metadata.jsonl", *(f"{stem}.txt" for stem in "abcdefgh"))


def test_a_text_file_without_an_image_next_to_metadata_is_noted(tmp_path):
    write_image(tmp_path / "a.png")
    write_caption(tmp_path / "README.txt")
    write_jsonl(tmp_path, metadata_row("a.png"))
    assert read_notes(tmp_path) == ["1 other files are not used: README.txt"]


def test_two_metadata_files_are_one_problem(tmp_path):
    write_image(tmp_path / "a.png")
    write_jsonl(tmp_path, metadata_row("a.png"))
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a girl\n")
    assert_only_problem(tmp_path, "metadata.csv", "metadata.jsonl", "keep one")


@pytest.mark.parametrize("line, part", [
    ("{", "not valid JSON"), ("[" * 5000, "not valid JSON"), ("1" * 5000, "not valid JSON"),
    ("[1]", "file_name and text"), ("[" * 500 + "]" * 500, "file_name and text"), ("null", "file_name and text"),
    ('{"text": "x"}', "file_name"),
    ('{"file_name": 3, "text": "x"}', "file_name"), ('{"file_name": "", "text": "x"}', "file_name"),
    ('{"file_name": "b.png"}', "b.png needs a text"), ('{"file_name": "b.png", "text": [1]}', "b.png needs a text"),
    ('{"file_name": "b.png", "text": null}', "b.png needs a text"), ('{"file_name": "a.png", "text": "x"}', "already"),
    ('{"file_name": "./a.png", "text": "x"}', "already"), ('{"file_name": "../b.png", "text": "x"}', "outside"),
    ('{"file_name": "/etc/b.png", "text": "x"}', "outside"),
])  # fmt: skip
def test_a_malformed_json_line_is_named(tmp_path, line, part):
    write_image(tmp_path / "a.png")
    write_jsonl(tmp_path, metadata_row("a.png"), "", line)
    found = read_problems(tmp_path)
    assert found[0].startswith("metadata.jsonl, line 3: ") and part in found[0] and len(found[0]) < 300


@pytest.mark.parametrize("text, line, part", [
    ("file_name;text\na.png;x\n", 1, "columns file_name,text"), ("a.png,x\n", 1, "columns file_name,text"),
    ("file_name,text\na.png,a girl, smiling\n", 2, '""'), ('file_name,text\n\na.png,"x\nb.png,y\n', 3, "not valid CSV"),
    ('file_name,text\na.png,"x" y\n', 2, "not valid CSV"), ("file_name,text\na.png\n", 2, "a.png needs a text"),
    ('file_name,text\na.png,"x\ny"\na.png,z\n', 4, "already"), ("file_name,text\n,x\n", 2, "file_name"),
    (f"file_name,text\na.png,{'x' * 200_000}\n", 2, "not valid CSV"),
])  # fmt: skip
def test_a_malformed_csv_row_is_named(tmp_path, text, line, part):
    write_image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(text)
    found = read_problems(tmp_path)
    assert found[0].startswith(f"metadata.csv, line {line}: ") and part in found[0] and len(found[0]) < 300


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_that_is_not_utf8_is_one_problem(tmp_path, name):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png")
    (tmp_path / name).write_bytes("file_name,text\na.png,größer".encode("utf-16"))
    assert_only_problem(tmp_path, name, "UTF-8")


def test_invalid_unicode_in_a_caption_is_a_problem(tmp_path):
    write_image(tmp_path / "a.png")
    write_jsonl(tmp_path, metadata_row("a.png", "x\ud800"))
    assert_only_problem(tmp_path, "a.png", "caption is not valid Unicode")


many_examples = settings(max_examples=50, deadline=None, database=None)


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=9) | st.sampled_from(["a.png", "../a.png", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["file_name", "text", "x"]), inner),
    max_leaves=5,
)


@pytest.mark.parametrize(
    "content, problem",
    [
        ("a girl with ribbons".encode("utf-16-le"), "the control character U\\+0000"),
        (b"a girl \x1b[31m in red", "the control character U\\+001B"),
        ("\u200b\u2060\ufeff".encode(), "no caption, or an empty one"),
    ],
)
def test_captions_that_hold_control_characters_or_show_nothing_are_refused(tmp_path, content, problem):
    write_image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    (line,) = read_problems(tmp_path)
    assert line.startswith("a.png: ") and re.search(problem, line)


def test_a_key_or_a_column_that_stands_twice_is_refused(tmp_path):
    write_image(tmp_path / "a.png")
    write_jsonl(tmp_path, '{"file_name": "a.png", "text": "one", "text": "two"}')
    assert any("a key stands in it twice" in line for line in read_problems(tmp_path))
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text,text\na.png,one,two\n")
    assert any("a column stands in it twice" in line for line in read_problems(tmp_path))


FIELDS = st.dictionaries(st.sampled_from(["file_name", "text"]), VALUES)


LINES = st.lists((FIELDS | VALUES).map(json.dumps) | st.text(max_size=20), max_size=5).map("\n".join)


CELLS = st.sampled_from(["a.png", "file_name", "text", ",", '"', "\n", "\r", ";", " ", "x", "\0"])


TABLES = st.lists(CELLS, max_size=12).map(lambda cells: "file_name,text\n" + "".join(cells))


@many_examples
@given(LINES.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=50))
def test_any_json_lines_give_pairs_or_problems(content):
    assert_pairs_or_problems({"metadata.jsonl": content})


@many_examples
@given(TABLES.map(str.encode) | st.binary(max_size=50))
def test_any_csv_gives_pairs_or_problems(content):
    assert_pairs_or_problems({"metadata.csv": content})


@many_examples
@given(st.binary(max_size=30), st.text(max_size=30).map(str.encode))
def test_any_caption_files_give_pairs_or_problems(one, two):
    assert_pairs_or_problems({"a.txt": one, "b.caption": two})
