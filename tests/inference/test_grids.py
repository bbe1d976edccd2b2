"""Labelled grids of pictures of any shape."""

import numpy as np
from PIL import Image

from sdtune.inference import grids

RED, BLUE = (200, 0, 0), (0, 0, 200)


def box_of(grid: Image.Image, color) -> tuple[int, int, int, int]:
    """Left, top, width and height of the area of a colour."""
    rows, columns = np.nonzero((np.asarray(grid) == color).all(-1))
    return columns.min(), rows.min(), columns.max() - columns.min() + 1, rows.max() - rows.min() + 1


def test_a_portrait_is_whole_and_as_wide_as_its_column():
    rows = [[Image.new("RGB", (400, 600), RED)], [Image.new("RGB", (300, 200), BLUE)]]
    grid = grids.make_grid(rows, ["a title"], ["one", "two"], cell=120)
    left, top, *size = box_of(grid, RED)
    assert size == [120, 180]
    second_left, second_top, *second_size = box_of(grid, BLUE)
    assert second_size == [120, 80] and second_left == left and second_top == top + 180 + 8
    assert grid.height == second_top + 80 + 8


def test_pictures_of_several_shapes_stand_in_one_row():
    row = [Image.new("RGB", (64, 64), RED), Image.new("RGB", (10, 100), BLUE)]
    grid = grids.make_grid([row], ["a", "b"], ["one"], cell=100)
    left, top, *size = box_of(grid, RED)
    assert size == [100, 100]
    narrow_left, narrow_top, *narrow_size = box_of(grid, BLUE)
    assert narrow_size == [20, 200] and narrow_top == top  # at most twice as high as a column is wide, in its middle
    assert narrow_left == left + 100 + 8 + 40
