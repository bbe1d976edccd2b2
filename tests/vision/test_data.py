"""The formats of data sets, and what is wrong with one."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from sdtune.training.errors import DataError
from sdtune.vision.data import Pixels, read_data


def random_pixels(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_lists(folder, classes=3, extra=()):
    for split, count in (("train800", 8), ("val200", 4), ("test", 6)):
        lines = []
        for i, pixels in enumerate(random_pixels(count, 10, 12, 3)):
            path = folder / "images" / split / f"{i:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            lines.append(f"{path.relative_to(folder)} {i % classes}")
        (folder / f"{split}.txt").write_text("\n".join([*lines, *extra]) + "\n")


def test_vtab_lists_keep_their_splits_and_order(tmp_path):
    write_lists(tmp_path)
    data = read_data(str(tmp_path))
    assert (len(data.train), len(data.val), len(data.test)) == (8, 4, 6)
    assert data.classes == ["0", "1", "2"] and data.test.labels == [0, 1, 2, 0, 1, 2]
    assert np.array_equal(np.asarray(data.test.open(4)), random_pixels(6, 10, 12, 3)[4])
    (tmp_path / "classes.txt").write_text("a cat\na dog\na cow\n")
    assert read_data(str(tmp_path)).classes == ["a cat", "a dog", "a cow"]


def test_every_wrong_line_of_the_lists_is_named(tmp_path):
    write_lists(tmp_path, extra=["images/none.png 1", "what is this"])
    with pytest.raises(DataError) as error:
        read_data(str(tmp_path))
    assert "test.txt, line 7: there is no images/none.png" in str(error.value)
    assert "val200.txt, line 6: 'what is this' is not a path and a label" in str(error.value)
    assert len(error.value.problems) == 6


def test_a_label_out_of_range_is_refused(tmp_path):
    write_lists(tmp_path)
    with open(tmp_path / "test.txt", "a") as file:
        file.write("images/test/000000.png 17\n")
    with pytest.raises(DataError, match="test: labels 17 are outside 0 to 2, the numbers of the 3 classes"):
        read_data(str(tmp_path))


def test_cifar_100_binary_is_read_by_the_fine_label(tmp_path):
    for name, count in (("train", 300), ("test", 50)):
        rows = random_pixels(count, 3074)
        rows[:, 1] = np.arange(count) % 100
        rows.tofile(tmp_path / f"{name}.bin")
    (tmp_path / "fine_label_names.txt").write_text("\n".join(f"name_{i}" for i in range(100)) + "\n")
    data = read_data(str(tmp_path))
    assert len(data.classes) == 100 and len(data.test) == 50 and data.test.labels[:3] == [0, 1, 2]
    pixels = random_pixels(50, 3074)[7, 2:].reshape(3, 32, 32)
    assert np.array_equal(np.asarray(data.test.open(7)), pixels.transpose(1, 2, 0))
    (tmp_path / "test.bin").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="test.bin has 100 bytes, no multiple of 3,074; it may be truncated"):
        read_data(str(tmp_path))


def write_idx(folder, prefix, count, seed=0):
    pixels, labels = random_pixels(count, 28, 28, seed=seed), np.arange(count, dtype=np.uint8) % 10
    content = struct.pack(">iiii", 2051, count, 28, 28) + pixels.tobytes()
    (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, count) + labels.tobytes())
    return pixels


def test_idx_files_are_read_grey_as_rgb_and_a_training_size_is_drawn_evenly(tmp_path):
    write_idx(tmp_path, "train", 200)
    pixels = write_idx(tmp_path, "t10k", 40, seed=1)
    data = read_data(str(tmp_path), train_size=50)
    assert (len(data.train), len(data.val), len(data.test)) == (40, 10, 40)
    assert sorted(set(data.train.labels)) == list(range(10)) and data.train.labels.count(3) == 4
    assert np.array_equal(np.asarray(data.test.open(5)), np.stack([pixels[5]] * 3, -1))
    train, val = ({s.open(i).tobytes() for i in range(len(s))} for s in (data.train, data.val))
    assert not train & val
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x09abc")
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte: no whole idx file"):
        read_data(str(tmp_path))


def test_a_training_size_counts_where_there_are_validation_pictures_and_too_few_pictures_are_said(tmp_path):
    write_lists(tmp_path / "lists")
    data = read_data(str(tmp_path / "lists"), train_size=6)
    assert len(data.train) + len(data.val) == 6 and len(data.val) > 0
    with pytest.raises(DataError, match="a training size of 100 is not possible with 3 classes .* and 12 pictures"):
        read_data(str(tmp_path / "lists"), train_size=100)
    for name in ("a/0", "a/1", "b/0", "b/1"):
        path = tmp_path / f"small/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(DataError, match="a class has 2 pictures; give each class three or more, or give a folder test"):
        read_data(str(tmp_path / "small"))


def test_a_damaged_gz_file_is_a_problem_of_the_data(tmp_path):
    write_idx(tmp_path, "train", 200)
    write_idx(tmp_path, "t10k", 40, seed=1)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[10:14] = b"\xff\xff\xff\xff"  # not a block of deflate
    path.write_bytes(content)
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz: "):
        read_data(str(tmp_path))


def test_grey_16_bit_and_transparent_pictures_become_rgb(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("L", (5, 9), 128).save(tmp_path / name / f"{i}.png")
    Image.fromarray(np.full((9, 5), 65535, np.uint16)).save(tmp_path / "a" / "deep.png")
    Image.new("RGBA", (9, 5), (0, 0, 0, 0)).save(tmp_path / "b" / "clear.png")
    data = read_data(str(tmp_path))
    pixels = Pixels(data.train + data.val + data.test, 8)
    assert pixels._all.shape == (10, 3, 8, 8)
    assert sorted(pixels._all.float().mean((1, 2, 3)).tolist()) == [128.0] * 8 + [255.0] * 2


def test_pictures_that_do_not_fit_into_memory_are_read_in_every_pass(tmp_path, monkeypatch):
    write_lists(tmp_path)
    data = read_data(str(tmp_path))
    whole = Pixels(data.test, 8)
    monkeypatch.setattr("sdtune.vision.data._KEPT", 100)
    indices = torch.tensor([4, 0])
    again = Pixels(data.test, 8)
    assert again._all is None and torch.equal(again[indices], whole[indices])
