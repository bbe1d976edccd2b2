"""Renders the corpus's drawings at 256 px: one picture of a row, for `train.py` and `check.py`.

Emoji have three pictures (`variant`): 0, as drawn, on white; 1, hues turned, on white; 2, as drawn, on a
coloured ground. People stand before a plain ground (0) or a flat scene (1, 2). Portraits and shapes are
drawn by number. Needs numpy, Pillow and resvg_py.
"""

import io
import json
import lzma
import math
import random
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 256
INNER = 240  # the drawing's box inside the picture; the rest is margin
UNIT = SIZE // 128  # the scenes' coordinates are those of a 256 px canvas, which is 128 px after halving
GROUPS = ("emoji", "avatars")
HEADS = ("adventurer", "big-smile", "lorelei")  # avatars drawn without shoulders: they stand higher in the picture

# --------------------------------------------------------------------------- colours as words

COLOURS = {
    "red": (215, 45, 50), "orange": (245, 140, 40), "yellow": (252, 210, 70), "green": (80, 170, 75),
    "teal": (50, 165, 160), "blue": (60, 130, 220), "purple": (140, 85, 190), "pink": (245, 140, 180),
    "brown": (140, 90, 60), "black": (35, 35, 40), "gray": (150, 155, 160), "white": (250, 250, 250),
}  # fmt: skip
BACKGROUNDS = {
    "light blue": (176, 214, 245), "pink": (250, 200, 215), "green": (150, 205, 140), "yellow": (252, 232, 150),
    "purple": (200, 180, 230), "gray": (200, 204, 208), "orange": (250, 200, 140), "dark blue": (35, 45, 85),
    "black": (24, 24, 28), "teal": (150, 215, 210), "red": (225, 90, 85), "brown": (185, 150, 120),
}  # fmt: skip


def colour_words(image: Image.Image, most: int = 2) -> list[str]:
    """The names of the (up to `most`) colours that cover most of the drawing, largest first."""
    rgba = np.asarray(image.resize((32, 32)), dtype=np.float32).reshape(-1, 4)
    rgb = rgba[rgba[:, 3] > 128, :3]
    if not len(rgb):
        return []
    table = np.array(list(COLOURS.values()), dtype=np.float32)
    weights = np.array([0.30, 0.59, 0.11]) ** 0.5
    nearest = (((rgb[:, None] - table[None]) * weights) ** 2).sum(-1).argmin(1)
    share = np.bincount(nearest, minlength=len(COLOURS)) / len(rgb)
    return [list(COLOURS)[i] for i in share.argsort()[::-1][:most] if share[i] > 0.15]


def rotate_hue(image: Image.Image, turn: float) -> Image.Image:
    """The drawing with every hue turned by `turn` (0 to 1 of the colour circle); greys stay."""
    hsv = np.asarray(image.convert("RGB").convert("HSV")).copy()
    hsv[..., 0] = (hsv[..., 0].astype(int) + round(turn * 255)) % 256
    out = Image.fromarray(hsv, "HSV").convert("RGB").convert("RGBA")
    out.putalpha(image.getchannel("A"))
    return out


def on_background(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The drawing laid on a plain colour, as RGB."""
    base = Image.new("RGBA", image.size, (*colour, 255))
    return Image.alpha_composite(base, image).convert("RGB")


def draw(svg: str, side: int) -> Image.Image:
    """The SVG as RGBA, its longer side `side` px. The drawings have no text, so no fonts are loaded."""
    import resvg_py

    data = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, dpi=96.0, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(data))).convert("RGBA")


def boxed(image: Image.Image, scale: float | None = None) -> Image.Image:
    """The picture, centred in a transparent SIZE x SIZE box with the common margin."""
    scale = min(INNER / max(image.size), scale or 9.0)
    size = [max(1, round(n * scale)) for n in image.size]
    image = image.resize(size, Image.Resampling.LANCZOS)
    box = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
    box.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return box


def drawing(row: dict) -> Image.Image:
    """An emoji in its box."""
    image = draw(row["svg"], 2 * INNER) if "svg" in row else Image.open(row["file"]).convert("RGBA")
    bounds = image.getbbox()
    if bounds is None:
        raise ValueError("blank")
    if row["style"] in ("noto", "noto-v1"):
        # Cropped, and never larger than drawn.
        return boxed(image.crop(bounds), SIZE / (2 * INNER))
    return boxed(image)


# --------------------------------------------------------------------------- scenes


class Pen:
    """An ImageDraw whose coordinates and widths are in units of UNIT px, so that scenes look the same at any SIZE."""

    def __init__(self, image: Image.Image):
        self.pen = ImageDraw.Draw(image)

    @staticmethod
    def scaled(points, end: int = 0):
        if isinstance(points[0], tuple):
            return [(x * UNIT, y * UNIT) for x, y in points]
        x0, y0, x1, y1 = (n * UNIT for n in points)
        return (x0, y0, x1 + end, y1 + end)  # a box's last row and column of units are drawn whole

    def ellipse(self, box, **how):
        self.pen.ellipse(self.scaled(box, UNIT - 1), **how)

    def rectangle(self, box, width: int = 1, **how):
        self.pen.rectangle(self.scaled(box, UNIT - 1), width=width * UNIT, **how)

    def line(self, points, width: int = 1, **how):
        self.pen.line(self.scaled(points), width=width * UNIT, **how)

    def polygon(self, points, **how):
        self.pen.polygon(self.scaled(points), **how)


def _ramp(top: tuple, bottom: tuple) -> Image.Image:
    part = np.linspace(0, 1, 256 * UNIT)[:, None, None]
    colours = np.array(top) * (1 - part) + np.array(bottom) * part
    return Image.fromarray(np.broadcast_to(colours, (256 * UNIT, 256 * UNIT, 3)).astype(np.uint8))


def _dots(pen, rng, count: int, sizes: tuple, colour, below: int = 256) -> None:
    for _ in range(count):
        x, y, r = rng.randrange(256), rng.randrange(below), rng.uniform(*sizes)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _hills(pen, rng, height: int, colour) -> None:
    for x in range(-40, 256 + 40, 60):
        r = rng.randint(50, 90)
        pen.ellipse((x - r, 256 - height - rng.randint(0, 20), x + r, 256 + 120), fill=colour)


def _houses(pen, rng, wall, light, tallest: int = 150) -> None:
    x = -rng.randint(0, 20)
    while x < 256:
        width, height = rng.randint(24, 48), rng.randint(50, tallest)
        pen.rectangle((x, 256 - height, x + width, 256), fill=wall)
        for wx in range(x + 6, x + width - 6, 12):
            for wy in range(256 - height + 8, 256, 16):
                if rng.random() < 0.6:
                    pen.rectangle((wx, wy, wx + 5, wy + 8), fill=light)
        x += width + rng.choice((0, 0, 6))


def night(rng):
    image = _ramp((18, 20, 60), (60, 50, 110))
    pen = Pen(image)
    _dots(pen, rng, 40, (0.8, 2.2), (255, 250, 220))
    x, y, r = rng.randint(30, 226), rng.randint(25, 80), rng.randint(18, 34)
    pen.ellipse((x - r, y - r, x + r, y + r), fill=(250, 240, 180))
    return image


def beach(rng):
    image = _ramp((110, 190, 245), (190, 230, 250))
    pen = Pen(image)
    for _ in range(3):
        x, y = rng.randrange(256), rng.randint(20, 90)
        for dx in (-22, 0, 20):
            pen.ellipse((x + dx - 20, y - 12, x + dx + 20, y + 14), fill="white")
    sea = rng.randint(120, 150)
    pen.rectangle((0, sea, 256, 256), fill=(50, 140, 200))
    pen.ellipse((-120, sea + 50, 376, 420), fill=(240, 215, 160))
    return image


def forest(rng):
    image = _ramp((190, 230, 170), (120, 190, 110))
    pen = Pen(image)
    for x in range(rng.randint(-10, 20), 256, rng.randint(34, 50)):
        pen.rectangle((x, 0, x + rng.randint(10, 18), 230), fill=rng.choice(((120, 85, 60), (105, 75, 55))))
    _dots(pen, rng, 30, (14, 30), (80, 150, 80), below=60)
    _hills(pen, rng, 20, (95, 165, 85))
    return image


def sunset(rng):
    image = _ramp((90, 60, 140), (250, 150, 110))
    pen = Pen(image)
    x, r = rng.randint(40, 216), rng.randint(24, 40)
    pen.ellipse((x - r, 150 - r, x + r, 150 + r), fill=(255, 215, 130))
    _houses(pen, rng, (75, 50, 100), (255, 215, 120))
    return image


def snow(rng):
    image = _ramp((150, 185, 225), (225, 236, 248))
    pen = Pen(image)
    for x in range(-20, 256, 46):
        h = rng.randint(50, 100)
        pen.polygon([(x, 226), (x + 34, 226 - h), (x + 68, 226)], fill=(120, 150, 180))
    _hills(pen, rng, 30, (245, 248, 252))
    _dots(pen, rng, 50, (2, 5), "white")
    return image


def rain(rng):
    image = _ramp((50, 60, 95), (95, 105, 140))
    pen = Pen(image)
    _houses(pen, rng, (45, 50, 80), (235, 205, 130), 190)
    for _ in range(50):
        x, y, length = rng.randrange(270), rng.randrange(256), rng.randint(8, 22)
        pen.line((x, y, x - length // 4, y + length), fill=(190, 205, 235), width=1)
    return image


def blossoms(rng):
    image = _ramp((190, 220, 250), (250, 235, 240))
    pen = Pen(image)
    x = rng.choice((20, 210))
    pen.polygon([(x, 256), (x + 26, 256), (x + 20, 40), (x + 6, 40)], fill=(130, 90, 90))
    for _ in range(40):
        cx, cy, r = rng.randrange(256), rng.randint(-10, 60), rng.randint(12, 26)
        pink = rng.choice(((250, 190, 210), (245, 170, 195), (255, 215, 228)))
        pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=pink)
    _dots(pen, rng, 18, (2, 4), (245, 170, 195))
    return image


def window(rng):
    walls = ((240, 225, 200), (225, 210, 190), (230, 230, 220))
    image = Image.new("RGB", (256 * UNIT, 256 * UNIT), rng.choice(walls))
    pen, left = Pen(image), rng.randint(20, 120)
    pen.rectangle((left, 14, left + 130, 170), fill=(150, 205, 245), outline=(250, 248, 240), width=8)
    pen.line((left + 65, 14, left + 65, 170), fill=(250, 248, 240), width=6)
    pen.rectangle((0, 200, 256, 256), fill=(185, 140, 100))
    return image


def sparkles(rng):
    first = rng.choice(((255, 225, 235), (225, 235, 255), (255, 240, 210), (225, 250, 240)))
    image = _ramp(first, (255, 250, 250))
    pen = Pen(image)
    for _ in range(14):
        x, y, r = rng.randrange(256), rng.randrange(256), rng.randint(5, 13)
        points = [(x + (r if k % 2 == 0 else r / 4) * math.cos(k * math.pi / 4),
                   y + (r if k % 2 == 0 else r / 4) * math.sin(k * math.pi / 4)) for k in range(8)]  # fmt: skip
        pen.polygon(points, fill=rng.choice(((255, 215, 120), "white", (250, 180, 210))))
    return image


SCENES = {
    "under a night sky with a full moon": night, "at the beach": beach, "in a green forest": forest,
    "in the city at sunset": sunset, "in falling snow": snow, "on a rainy street": rain,
    "under cherry blossoms": blossoms, "by a window": window, "in front of a pastel background with sparkles": sparkles,
}  # fmt: skip


# --------------------------------------------------------------------------- pictures


def emoji_picture(row: dict, variant: int, rng: random.Random) -> tuple[Image.Image, dict]:
    """An emoji's picture, and what its caption needs."""
    image = drawing(row)
    turned = rotate_hue(image, rng.choice((0.15, 0.3, 0.45, 0.6, 0.75, 0.85))) if variant == 1 else image
    ground = rng.choice(list(BACKGROUNDS))
    shade = tuple(int(min(255, max(0, c + rng.randint(-12, 12)))) for c in BACKGROUNDS[ground])
    kept = {k: row[k] for k in ("style", "hexcode", "name", "tags") if k in row}
    kept |= {"colours": [colour_words(turned)] * 3, "ground": [None, None, ground]}
    return on_background(turned, shade if variant == 2 else (255, 255, 255)), kept


def person_picture(row: dict, variant: int, rng: random.Random) -> tuple[Image.Image, dict]:
    """An avatar's picture, and what its caption needs."""
    side = 256 * UNIT  # of the canvas, halved at the end
    person = draw(row["svg"], side)
    person = person.crop(person.getbbox())
    scale = side * rng.uniform(0.82, 0.95) / max(person.size)
    person = person.resize([round(n * scale) for n in person.size], Image.Resampling.LANCZOS)
    place = ((side - person.width) // 2, side - person.height)
    if row["design"] in HEADS:
        place = (place[0], place[1] // 2)
    if variant == 0:
        ground = rng.choice(["white", *BACKGROUNDS])
        canvas = Image.new("RGB", (side, side), BACKGROUNDS.get(ground, (255, 255, 255)))
        ground += " background"
    else:
        ground = rng.choice(list(SCENES))
        canvas = SCENES[ground](rng)
        if rng.random() < 0.3:
            canvas = canvas.filter(ImageFilter.GaussianBlur(2 * UNIT))
    canvas.paste(person, place, person)
    kept = {k: row[k] for k in ("design", "who", "hair", "face", "worn")} | {"style": "avatar", "ground": [ground] * 3}
    return canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS), kept


def picture(row: dict, variant: int, rng: random.Random) -> tuple[np.ndarray, dict]:
    """The picture of a row, uint8 (256, 256, 3), and the row that `captions.words` takes.

    `row`: of `load`, or {"style": "portrait" or "shapes", "number": n}.
    """
    if row["style"] == "portrait":
        import portraits

        return portraits.picture(row["number"])
    if row["style"] == "shapes":
        import shapes

        return shapes.picture(row["number"]), row
    image, kept = (person_picture if row["style"] == "avatar" else emoji_picture)(row, variant, rng)
    return np.array(image.convert("RGB")), kept


@cache
def load(pack: Path, group: str) -> list[dict]:
    """The rows of a group, as `corpus.py` and `people.py` wrote them, with their SVG; none without the file."""
    path = pack / f"{group}.jsonl.xz"
    if not path.is_file():
        print(f"{group}: not in {pack}")
        return []
    with lzma.open(path) as file:
        rows = [json.loads(line) for line in file]
    return [r | {"style": r.get("style", "avatar")} for r in rows]
