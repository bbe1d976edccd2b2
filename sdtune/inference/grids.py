"""Labelled grids of pictures, and how PNG files are written."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..adapters import disk


def make_grid(rows: list[list[Image.Image]], columns: list[str], labels: list[str], cell: int = 192) -> Image.Image:
    """A grid of pictures with a title over each column and a label at the left of each row, both wrapped.

    Args:
        rows: pictures, row by row; every row as long as `columns`. They may have any shapes.
        columns, labels: the titles of columns and the labels of rows.
        cell: width of a column in pixels. A picture fills it, or, if it is higher than twice that, is narrower; a row
            is as high as its highest picture.
    """
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    gap, left = 8, 220
    titles = [_wrap(title, font, cell, 5) for title in columns]
    top = 14 + 20 * max(map(len, titles))
    width = left + len(columns) * (cell + gap) + gap
    small_sizes = [[_fit_size(picture.size, cell) for picture in row] for row in rows]
    heights = [max(size[1] for size in sizes) for sizes in small_sizes]
    height = top + sum(heights) + len(rows) * gap
    out = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(out)
    for i, lines in enumerate(titles):
        middle = (left + i * (cell + gap) + cell // 2, top // 2)
        pen.multiline_text(middle, "\n".join(lines), fill="#222222", font=font, anchor="mm", align="center")
    y = top
    for row, label, sizes, row_height in zip(rows, labels, small_sizes, heights):
        text = "\n".join(_wrap(label, small, left - 2 * gap, max(1, (row_height - 8) // 18)))
        pen.multiline_text((gap, y + 4), text, fill="#444444", font=small, spacing=4)
        for i, (picture, size) in enumerate(zip(row, sizes)):
            small_picture = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
            out.paste(small_picture, (left + i * (cell + gap) + (cell - size[0]) // 2, y))
        y += row_height + gap
    return out


def _fit_size(size: tuple[int, int], cell: int) -> tuple[int, int]:
    """The size of a picture that fills the width of a column, or is twice as high as that."""
    scale = min(cell / size[0], 2 * cell / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def write_png(picture: Image.Image, path: Path) -> None:
    """Writes a PNG file atomically: a reader sees the old file or the whole new one."""
    with disk.new_file(path) as part:
        picture.save(part, format="PNG")


def thumbnail(picture: Image.Image) -> str:
    """A picture of at most 256 x 256 pixels as a JPEG in a data URL, as ModelSpec wants it in a file's metadata."""
    small, content = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((256, 256))
    small.save(content, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def mean_difference(a: Image.Image, b: Image.Image) -> float:
    """The mean absolute difference of two pictures of one size, in grey levels (0 to 255)."""
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean())


def _wrap(text: str, font, width: int, most: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1] + " ..."]
