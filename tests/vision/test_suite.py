"""The offline suite's own parts: pictures made by formula, and tasks in the format that the command reads."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from sdtune.vision.data import read_data


@pytest.fixture(scope="module")
def suite():
    path = Path(__file__).parents[2] / "assets/vision_suite.py"
    spec = importlib.util.spec_from_file_location("vision_suite", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def centre(picture):
    """Of the white pixels: (x, y)."""
    pixels = np.asarray(picture, float)
    rows, columns = np.mgrid[0:64, 0:64] + 0.5
    return (pixels * columns).sum() / pixels.sum(), (pixels * rows).sum() / pixels.sum()


@pytest.mark.parametrize("shape", range(3))
def test_a_sprite_moves_turns_and_grows_as_told_and_stays_in_the_picture(suite, shape):
    left, right = (suite.sprite(shape, 1, 0.3, x, 0.5) for x in (0, 1))
    assert centre(right)[0] - centre(left)[0] == pytest.approx(36, abs=0.1)
    up, down = (suite.sprite(shape, 1, 0.3, 0.5, y) for y in (0, 1))
    assert centre(down)[1] - centre(up)[1] == pytest.approx(36, abs=0.1)
    small, large = (np.asarray(suite.sprite(shape, size, 0, 0.5, 0.5), float).sum() for size in (0.5, 1))
    assert large / small == pytest.approx(4, rel=0.1)
    assert suite.sprite(shape, 1, 0.4, 0.5, 0.5) != suite.sprite(shape, 1, 0.8, 0.5, 0.5)
    for x in (0, 1):
        pixels = np.asarray(suite.sprite(shape, 1, 0.5, x, x))
        assert not (pixels[0].any() or pixels[-1].any() or pixels[:, 0].any() or pixels[:, -1].any())


def test_a_written_task_is_read_with_its_splits_and_names(suite, tmp_path):
    rows = [(suite.sprite(i % 3, 1, i, 0.5, 0.5), i % 3) for i in range(30)]
    suite.write_task(tmp_path / "task", ["square", "ellipse", "heart"], suite.divide(rows[:15], rows[15:], (9, 6, 12)))
    data = read_data(str(tmp_path / "task"))
    assert (len(data.train), len(data.val), len(data.test)) == (9, 6, 12)
    assert data.classes == ["square", "ellipse", "heart"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["task"]
