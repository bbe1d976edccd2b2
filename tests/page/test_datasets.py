"""Uploaded images and captions are checked before a training."""

import shutil

import pytest
from PIL import Image

from sdtune.page.check_images import look_through
from sdtune.page.datasets import UploadedImages
from sdtune.page.errors import PageError
from sdtune.training import dataset
from sdtune.training.buckets import AspectBuckets
from sdtune.training.config import TrainConfig


def test_missing_captions_and_small_images_are_reported_before_a_training(backend, tmp_path):
    for name, side in (("good", 256), ("small", 160), ("tiny", 20)):
        Image.new("RGB", (side, side), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "good.txt").write_text("a red square")
    uploaded = backend.datasets.receive([tmp_path / n for n in ("good.png", "good.txt", "small.png", "tiny.png")])
    assert uploaded.pairs == [("good.png", "a red square"), ("small.png", ""), ("tiny.png", "")]
    assert not uploaded.problems
    problems, _ = backend.datasets.check(uploaded, ["a red square", "", "a dot"])
    assert len(problems) == 2 and "small.png: has no caption yet" in problems[0] and "tiny.png" in problems[1]

    large_enough = UploadedImages(uploaded.folder, uploaded.pairs[:2], [], [], {})
    problems, notes = backend.datasets.check(large_enough, ["a red square " * 50, "another"])
    assert not problems and any("good.png" in note and "text encoder" in note for note in notes)
    assert any("small.png" in note and "enlarged" in note for note in notes)


def test_a_picture_without_caption_does_not_hide_its_other_problems(backend, tmp_path):
    for name in ("a.png", "a-mask.png", "a.mask.png"):
        Image.new("L", (256, 256), 255).save(tmp_path / name)
    uploaded = backend.datasets.receive(sorted(tmp_path.glob("*.png")))
    assert any(line.startswith("a.png") and "masks" in line for line in uploaded.problems), uploaded.problems


def test_long_captions_are_counted_as_the_training_reads_them(backend, tmp_path):
    Image.new("RGB", (256, 256), "red").save(tmp_path / "a.png")
    uploaded = backend.datasets.receive([tmp_path / "a.png"])

    def is_cut(words: int, **settings) -> bool:
        _, notes = backend.datasets.check(uploaded, ["a " * words], TrainConfig(**settings))
        return any("long captions: a.png" in note for note in notes)

    assert is_cut(100) and not is_cut(100, max_tokens=150) and not is_cut(70)
    assert is_cut(70, trigger_words="a a a a a a a a")


def test_two_files_with_one_name_are_a_problem(backend, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (128, 128)).save(tmp_path / folder / "same.png")
    uploaded = backend.datasets.receive([tmp_path / "a" / "same.png", tmp_path / "b" / "same.png"])
    assert len(uploaded.problems) == 1 and "two files with this name" in uploaded.problems[0]


def test_images_that_were_deleted_and_resolutions_out_of_range_are_said_and_nothing_is_left_half_kept(
    backend, tmp_path, monkeypatch
):
    Image.new("RGB", (128, 128)).save(tmp_path / "x.png")
    uploaded = backend.datasets.receive([tmp_path / "x.png"])
    for resolution in (-5, 7, 10_000_000, 1e400):
        said = look_through(backend, uploaded, '["a cat"]', resolution, False, "")
        assert "must be from 64 to 8192" in said or "infinity" in said
    folder = backend.datasets.folder_for(uploaded, ["a cat"], "cats")

    def fail(*_):
        raise OSError(28, "No space left")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", fail)
        with pytest.raises(OSError, match="No space left"):
            backend.datasets.keep(uploaded, ["a cat"], folder)
    assert not list(folder.parent.glob(".*"))
    shutil.rmtree(uploaded.folder)
    with pytest.raises(PageError, match="dropped more than a day ago"):
        backend.datasets.keep(uploaded, ["a cat"], folder)


def test_the_same_images_and_captions_are_kept_in_one_folder(backend, tmp_path):
    Image.new("RGB", (128, 128)).save(tmp_path / "x.png")
    uploaded = backend.datasets.receive([tmp_path / "x.png"])
    first = backend.datasets.folder_for(uploaded, ["a cat"], "cats")
    backend.datasets.keep(uploaded, ["a cat"], first)
    assert (first / "x.png").is_file() and backend.datasets.folder_for(uploaded, ["a cat"], "cats") == first
    assert backend.datasets.folder_for(uploaded, ["a dog"], "cats") != first


def test_held_out_images_and_their_masks_go_into_a_folder_of_their_own(backend, tmp_path):
    names = [f"{i}.png" for i in range(5)]
    for name in (*names, "1-mask.png", "3-mask.png"):
        Image.new("RGB", (256, 256), "white").save(tmp_path / name)
    uploaded = backend.datasets.receive(sorted(tmp_path.glob("*.png")))
    captions = [f"number {i}" for i in range(5)]
    folder = backend.datasets.folder_for(uploaded, captions, "cats", 2)
    backend.datasets.keep(uploaded, captions, folder, 2)
    assert sorted(p.name for p in (folder / "test").glob("*.png")) == ["1-mask.png", "1.png", "3-mask.png", "3.png"]
    read = [dataset.read_pairs(folder, AspectBuckets(256), split) for split in ("train", "test")]
    assert [[pair.caption for pair in pairs] for pairs in read] == [captions[::2], captions[1::2]]
    assert backend.datasets.folder_for(uploaded, captions, "cats", 2) == folder
    assert backend.datasets.folder_for(uploaded, captions, "cats") != folder  # none is held out
    with pytest.raises(PageError, match="5 images cannot be held out of 5"):
        backend.datasets.folder_for(uploaded, captions, "cats", 5)
