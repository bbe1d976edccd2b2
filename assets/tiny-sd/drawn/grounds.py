"""The places behind the faces of `portraits.py`, flat or graded, each drawn at random. Captions use the keys."""

import math
import random

from .canvas import Canvas, mix, oval, polygon, smooth, vary

ALL = "M0,0H256V256H0Z"
PLAIN = {
    "white": "#fafafa", "light blue": "#b4d8f4", "pink": "#f8c8d6", "green": "#a2d49a", "yellow": "#f8e39a",
    "purple": "#c6b2e4", "gray": "#c6cad0", "orange": "#f6c088", "dark blue": "#2a3560", "teal": "#98d8d2",
    "red": "#de6a62", "brown": "#b2926e", "black": "#26262c",
}  # fmt: skip


def _ridge(rng: random.Random, height: float, rough: float, steps: int = 7) -> str:
    """A closed area below a rolling line about `height` px from the top."""
    points = [(-20 + 296 * i / steps, height + rng.uniform(-rough, rough)) for i in range(steps + 1)]
    return smooth(points, closed=False) + "L276,276L-20,276Z"


def _cloud(c: Canvas, rng: random.Random, x: float, y: float, size: float, colour: str) -> None:
    for _ in range(rng.randint(3, 5)):
        c.draw(oval(x + rng.uniform(-1, 1) * size, y + rng.uniform(-0.2, 0.2) * size, size * rng.uniform(0.4, 0.7),
                    size * rng.uniform(0.25, 0.4)), colour)  # fmt: skip


def _towers(c: Canvas, rng: random.Random, wall: str, lights: str, low: int, high: int) -> None:
    x = -rng.randint(0, 25)
    while x < 256:
        width, top = rng.randint(20, 54), 256 - rng.randint(low, high)
        shade = vary(rng, wall, 0.5)
        c.draw(f"M{x},{top}H{x + width}V256H{x}Z", shade)
        if rng.random() < 0.8:
            step, side = rng.randint(9, 15), rng.randint(3, 7)
            for wx in range(x + 4, x + width - side, step):
                for wy in range(top + 6, 250, step + 2):
                    if rng.random() < 0.55:
                        c.draw(f"M{wx},{wy}h{side}v{side + 2}h-{side}Z", lights)
        x += width + rng.choice((0, 0, 3, 9))


def plain(c: Canvas, rng: random.Random, colour: str) -> None:
    """One colour, now and then graded, with rays, dots, stripes or a disc in a close tone."""
    shade = vary(rng, colour, 0.5)
    near = mix(shade, rng.choice(("#ffffff", "#ffffff", "#303050")), rng.uniform(0.12, 0.35))
    kind = rng.choice(("flat", "flat", "flat", "ramp", "disc", "dots", "stripes", "rays"))
    c.draw(ALL, c.ramp(near, shade) if kind == "ramp" else shade)
    if kind == "disc":
        c.draw(oval(128 + rng.uniform(-20, 20), 120, rng.uniform(70, 115)), near)
    elif kind == "dots":
        step, r = rng.randint(22, 44), rng.uniform(2, 7)
        for i, y in enumerate(range(0, 270, step)):
            for x in range(i % 2 * step // 2, 270, step):
                c.draw(oval(x, y, r), near)
    elif kind == "stripes":
        lean, step = rng.choice((0, 60, -60)), rng.randint(14, 40)
        for x in range(-80, 340, 2 * step):
            c.draw(f"M{x},0h{step}l{lean},256h-{step}Z", near)
    elif kind == "rays":
        n, x, y = rng.randint(8, 16), rng.uniform(90, 160), rng.uniform(90, 160)
        for i in range(n):
            a, b = (2 * math.pi * (i + k) / n for k in (0, 0.5))
            c.draw(polygon([(x, y), (x + 300 * math.cos(a), y + 300 * math.sin(a)),
                            (x + 300 * math.cos(b), y + 300 * math.sin(b))]), near)  # fmt: skip


def night(c, rng):
    top = vary(rng, rng.choice(("#101a48", "#1c1450", "#0c2440")))
    c.draw(ALL, c.ramp(top, mix(top, "#8060b0", rng.uniform(0.2, 0.5))))
    for _ in range(rng.randint(15, 60)):
        c.draw(oval(rng.uniform(0, 256), rng.uniform(0, 230), rng.choice((0.7, 0.9, 1.3, 1.8))), "#fff6d8")
    x, y, r = rng.choice((rng.uniform(20, 70), rng.uniform(186, 236))), rng.uniform(22, 70), rng.uniform(15, 34)
    moon = vary(rng, "#f6ecb4", 0.5)
    if rng.random() < 0.5:
        c.draw(oval(x, y, r * 1.5), moon, 0.2)
    c.draw(oval(x, y, r), moon)
    if rng.random() < 0.5:
        c.draw(_ridge(rng, rng.uniform(190, 230), 14), mix(top, "#000010", 0.35))


def beach(c, rng):
    sky = vary(rng, "#7cc4f2")
    c.draw(ALL, c.ramp(sky, mix(sky, "#ffffff", 0.55)))
    for _ in range(rng.randint(1, 4)):
        _cloud(c, rng, rng.uniform(0, 256), rng.uniform(15, 90), rng.uniform(14, 34), "#ffffff")
    level = rng.uniform(110, 165)
    sea = vary(rng, rng.choice(("#2f8fd0", "#28a4b8")))
    c.draw(f"M0,{level:.1f}H256V256H0Z", sea)
    for _ in range(rng.randint(0, 8)):
        x, y = rng.uniform(0, 230), rng.uniform(level + 4, level + 40)
        c.stroke(f"M{x:.1f},{y:.1f}h{rng.uniform(8, 30):.1f}", mix(sea, "#ffffff", 0.6), 1.6)
    c.draw(_ridge(rng, level + rng.uniform(35, 60), 7), vary(rng, "#f0d6a0"))


def forest(c, rng):
    leaf = vary(rng, "#6cb060")
    c.draw(ALL, c.ramp(mix(leaf, "#f8ffd8", 0.6), mix(leaf, "#ffffff", 0.15)))
    for depth in (0.55, 0.2):
        for x in range(rng.randint(-20, 10), 270, rng.randint(30, 60)):
            w = rng.uniform(6, 18)
            bark = mix(vary(rng, "#7a5638"), mix(leaf, "#ffffff", 0.4), depth)
            c.draw(f"M{x},0h{w:.1f}l{rng.uniform(0, 4):.1f},256h-{w + 5:.1f}Z", bark)
    for _ in range(rng.randint(10, 24)):
        c.draw(oval(rng.uniform(0, 256), rng.uniform(-10, 50), rng.uniform(14, 34)), vary(rng, leaf))
    c.draw(_ridge(rng, rng.uniform(195, 225), 8), vary(rng, mix(leaf, "#205020", 0.2)))


def sunset(c, rng):
    high, low = rng.choice((("#5a3a8a", "#f79a6a"), ("#c04a70", "#ffc66a"), ("#364a8c", "#f58a80")))
    c.draw(ALL, c.ramp(vary(rng, high), vary(rng, low)))
    if rng.random() < 0.7:
        c.draw(oval(rng.uniform(20, 236), rng.uniform(90, 150), rng.uniform(18, 44)), "#ffe09a")
    for _ in range(rng.randint(0, 3)):
        _cloud(c, rng, rng.uniform(0, 256), rng.uniform(10, 80), rng.uniform(16, 30), mix(low, high, 0.4))
    _towers(c, rng, mix(high, "#201030", 0.45), rng.choice(("#ffd27a", "#ffe9a8")), 50, 165)


def snow(c, rng):
    sky = vary(rng, "#a4c0e0")
    c.draw(ALL, c.ramp(sky, mix(sky, "#ffffff", 0.6)))
    if rng.random() < 0.6:
        for x in range(rng.randint(-30, 0), 270, rng.randint(26, 50)):
            y, h, w = rng.uniform(180, 225), rng.uniform(40, 110), rng.uniform(14, 26)
            c.draw(polygon([(x - w, y), (x, y - h), (x + w, y)]), mix(vary(rng, "#5c8098"), sky, rng.uniform(0, 0.5)))
    c.draw(_ridge(rng, rng.uniform(180, 215), 10), "#f2f6fc")
    for _ in range(rng.randint(25, 70)):
        c.draw(oval(rng.uniform(0, 256), rng.uniform(0, 256), rng.uniform(1, 4)), "#ffffff", rng.choice((0.7, 1)))


def rain(c, rng):
    sky = vary(rng, "#5a6688")
    c.draw(ALL, c.ramp(mix(sky, "#101830", 0.4), mix(sky, "#c0c8dc", 0.3)))
    _towers(c, rng, mix(sky, "#181c38", 0.55), rng.choice(("#f2cf84", "#e8b86a")), 70, 200)
    lean, colour = rng.uniform(-8, 2), mix(sky, "#ffffff", 0.65)
    for _ in range(rng.randint(25, 60)):
        x, y, k = rng.uniform(0, 270), rng.uniform(-10, 250), rng.uniform(0.6, 1.6)
        c.stroke(f"M{x:.1f},{y:.1f}l{lean * k:.1f},{14 * k:.1f}", colour, rng.choice((0.8, 1.2)))


def blossoms(c, rng):
    sky = vary(rng, rng.choice(("#bcdcf6", "#f8e2ea", "#d8ecd8")))
    c.draw(ALL, c.ramp(sky, mix(sky, "#ffffff", 0.5)))
    x, bark = rng.choice((rng.uniform(-5, 30), rng.uniform(215, 255))), vary(rng, "#7a5a58")
    c.draw(smooth([(x - 12, 260), (x - 8, 130), (x - 14, 30), (x + 8, 30), (x + 10, 130), (x + 18, 260)]), bark)
    for _ in range(rng.randint(20, 50)):
        pink = vary(rng, rng.choice(("#f6b8cc", "#f9cedb", "#f29cba")), 0.6)
        c.draw(oval(rng.uniform(-5, 261), abs(rng.gauss(0, 30)), rng.uniform(7, 22)), pink)
    for _ in range(rng.randint(5, 22)):
        c.draw(oval(rng.uniform(0, 256), rng.uniform(60, 250), rng.uniform(1.5, 4), rng.uniform(1.2, 2.5)), "#f4a8c0")


def window(c, rng):
    wall = vary(rng, rng.choice(("#ecdcc2", "#dfe3d6", "#d8cfe0", "#cfdfe6")))
    c.draw(ALL, wall)
    x, y, w, h = rng.uniform(5, 90), rng.uniform(8, 30), rng.uniform(110, 165), rng.uniform(120, 170)
    frame, sky = mix(wall, "#ffffff", 0.75), vary(rng, rng.choice(("#9ad0f4", "#9ad0f4", "#f6c79a", "#2c3a70")))
    box = f"M{x:.1f},{y:.1f}h{w:.1f}v{h:.1f}h-{w:.1f}Z"
    c.draw(box, c.ramp(sky, mix(sky, "#ffffff", 0.4)))
    c.stroke(box, frame, rng.uniform(5, 9))
    c.stroke(f"M{x + w / 2:.1f},{y:.1f}v{h:.1f}M{x:.1f},{y + h / 2:.1f}h{w:.1f}", frame, rng.uniform(3, 6))
    if rng.random() < 0.5:
        cloth = vary(rng, rng.choice(("#e8a0a0", "#a8c8a0", "#f4e6c8", "#a0b0d8")))
        for side in (x - 14, x + w - 12):
            c.draw(f"M{side:.1f},0h26q-8,90 2,{h + 20:.1f}h-30Z", cloth)
    if rng.random() < 0.6:
        c.draw(f"M0,{rng.uniform(195, 225):.1f}H256V256H0Z", vary(rng, "#b4885e"))


def sparkles(c, rng):
    first = vary(rng, rng.choice(("#fbdbe6", "#dde6fb", "#fdf0d2", "#daf4ea", "#e8dcf8")), 0.5)
    c.draw(ALL, c.ramp(first, mix(first, "#ffffff", 0.6)))
    for _ in range(rng.randint(8, 22)):
        x, y, r = rng.uniform(0, 256), rng.uniform(0, 256), rng.uniform(3, 13)
        colour = rng.choice(("#ffffff", "#ffd98a", "#f8b4cc", "#b4c8f8"))
        if rng.random() < 0.6:
            c.draw(
                (
                    f"M{x:.1f},{y - r:.1f}q{r / 6:.1f},{r * 5 / 6:.1f} "
                    f"{r:.1f},{r:.1f}q{-r * 5 / 6:.1f},{r / 6:.1f} {-r:.1f},{r:.1f}"
                    f"q{-r / 6:.1f},{-r * 5 / 6:.1f} {-r:.1f},{-r:.1f}q{r * 5 / 6:.1f},{-r / 6:.1f} {r:.1f},{-r:.1f}Z"
                ),
                colour,
            )
        else:
            c.draw(oval(x, y, r * 0.5), colour, 0.8)


PLACES = {
    "under a night sky with a full moon": night, "at the beach": beach, "in a green forest": forest,
    "in the city at sunset": sunset, "in falling snow": snow, "on a rainy street": rain,
    "under cherry blossoms": blossoms, "by a window": window, "in front of a pastel background with sparkles": sparkles,
}  # fmt: skip


def ground(c: Canvas, rng: random.Random, place: str) -> None:
    """Draws the place of a caption: one of PLACES, or "<colour> background"."""
    if place in PLACES:
        PLACES[place](c, rng)
    else:
        plain(c, rng, PLAIN[place.removesuffix(" background")])
