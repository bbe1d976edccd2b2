"""Flat shapes with outlines, strands and glossy discs, drawn at random: line work for the autoencoder, no captions."""

import colorsys
import io
import math
import random

import numpy as np
import resvg_py
from PIL import Image


def colour(rng: random.Random, dark: bool = False) -> str:
    h, s, v = rng.random(), rng.random() ** 0.7, rng.uniform(0.35, 1) if not dark else rng.uniform(0, 0.35)
    if rng.random() < 0.25:
        s *= 0.25
    return "#" + bytes(int(255 * c) for c in colorsys.hsv_to_rgb(h, s, v)).hex()


def blob(rng: random.Random, x: float, y: float, r: float, points: int) -> str:
    """A closed path around (x, y) px, smooth or, one in four, of straight lines."""
    turn, squash = rng.random() * 6.28, rng.uniform(0.4, 1.0)
    ps = []
    for i in range(points):
        a, d = 6.2832 * i / points, r * rng.uniform(0.6, 1.15)
        u, v = d * math.cos(a), d * squash * math.sin(a)
        ps.append((x + u * math.cos(turn) - v * math.sin(turn), y + u * math.sin(turn) + v * math.cos(turn)))
    if rng.random() < 0.25:
        return "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in ps) + "Z"
    mid = [((a[0] + b[0]) / 2, (a[1] + b[1]) / 2) for a, b in zip(ps, ps[1:] + ps[:1])]
    curves = "".join(f"Q{p[0]:.1f},{p[1]:.1f} {m[0]:.1f},{m[1]:.1f}" for p, m in zip(ps, mid))
    return f"M{mid[-1][0]:.1f},{mid[-1][1]:.1f}{curves}Z"


class Drawing:
    """One picture under construction: its own colour and width of lines, and fills that are flat or graded."""

    def __init__(self, rng: random.Random):
        self.rng, self.defs, self.body = rng, [], []
        self.line = colour(rng, dark=rng.random() < 0.8)
        self.width = rng.choice((0.8, 1.2, 1.6, 2, 2.5, 3.2, 4.5))
        self.add("rect", self.paint(), width=256, height=256)

    def paint(self) -> str:
        """A colour, or one time in three a gradient."""
        rng = self.rng
        if rng.random() > 0.35:
            return colour(rng)
        name, a = f"g{len(self.defs)}", rng.random() * 6.28
        offsets = (0, 1) if rng.random() < 0.7 else (0, 0.5, 1)
        stops = "".join(f'<stop offset="{o}" stop-color="{colour(rng)}"/>' for o in offsets)
        if rng.random() < 0.7:
            ends = (0.5 + s * f(a) / 2 for s, f in ((-1, math.cos), (-1, math.sin), (1, math.cos), (1, math.sin)))
            at = " ".join(f'{k}="{v:.2f}"' for k, v in zip(("x1", "y1", "x2", "y2"), ends))
            self.defs.append(f'<linearGradient id="{name}" {at}>{stops}</linearGradient>')
        else:
            self.defs.append(f'<radialGradient id="{name}">{stops}</radialGradient>')
        return f"url(#{name})"

    def add(self, kind: str, fill: str, stroke: str | None = None, line: float = 0, **more) -> None:
        more = {k.replace("_", "-"): f"{v:.2f}" if isinstance(v, float) else v for k, v in more.items()}
        more |= {"stroke": stroke, "stroke-width": f"{line:.2f}", "stroke-linejoin": "round"} if stroke else {}
        self.body.append(f'<{kind} fill="{fill}" ' + " ".join(f'{k}="{v}"' for k, v in more.items()) + "/>")

    def shape(self) -> None:
        """One more thing, anywhere: a blob, strands, a glossy disc, dots, or stripes."""
        rng, kind = self.rng, self.rng.random()
        x, y, r = rng.uniform(0, 256), rng.uniform(0, 256), 6 * 2 ** rng.uniform(0, 4)
        outline = {"stroke": self.line if rng.random() < 0.8 else None, "line": self.width * rng.uniform(0.6, 1.3)}
        if kind < 0.5:
            opacity = rng.uniform(0.3, 0.9) if rng.random() < 0.2 else 1.0
            self.add("path", self.paint(), d=blob(rng, x, y, r, rng.randint(3, 9)), fill_opacity=opacity, **outline)
        elif kind < 0.68:  # strands: many curves from about one place
            bend, fall = rng.uniform(-r, r), rng.uniform(-3.14, 3.14)
            for _ in range(rng.randint(4, 24)):
                a = fall + rng.gauss(0, 0.35)
                ex, ey = x + 1.5 * r * math.cos(a), y + 1.5 * r * math.sin(a)
                sx, sy = x + rng.gauss(0, r / 3), y + rng.gauss(0, r / 5)
                d = f"M{sx:.1f},{sy:.1f}Q{(sx + ex) / 2 + bend * 0.4:.1f},{(sy + ey) / 2:.1f} {ex:.1f},{ey:.1f}"
                self.add("path", "none", self.line if rng.random() < 0.7 else colour(rng), rng.uniform(0.6, 2.5), d=d)
        elif kind < 0.86:  # a disc within a disc, with a gleam
            ry = r * rng.uniform(0.6, 1.6)
            self.add("ellipse", self.paint(), cx=x, cy=y, rx=r, ry=ry, **outline)
            for _ in range(rng.randint(1, 3)):
                f, u, v = rng.uniform(0.2, 0.75), rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2)
                self.add("ellipse", self.paint(), cx=x + u * r, cy=y + v * ry, rx=f * r, ry=f * ry)
            for _ in range(rng.randint(0, 3)):
                u, v, f = rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5), rng.uniform(0.05, 0.25)
                self.add("circle", rng.choice(("white", "white", colour(rng))), cx=x + u * r, cy=y + v * ry, r=r * f)
        elif kind < 0.95:  # a field of dots
            for _ in range(rng.randint(5, 30)):
                fill, at = colour(rng) if rng.random() < 0.3 else "white", (x + rng.gauss(0, 60), y + rng.gauss(0, 60))
                opacity = rng.uniform(0.4, 1.0)
                self.add("circle", fill, cx=at[0], cy=at[1], r=rng.uniform(0.6, 4), fill_opacity=opacity)
        else:  # stripes
            step, width = rng.uniform(5, 20), rng.uniform(1, 6)
            for k in range(-14, 15):
                self.add("line", "none", self.line, width, x1=x + k * step, x2=x + k * step, y1=y - r, y2=y + r)

    def svg(self) -> str:
        head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 256 256">'
        return f"{head}<defs>{''.join(self.defs)}</defs>{''.join(self.body)}</svg>"


def picture(number: int) -> np.ndarray:
    """The picture of a number, uint8 (256, 256, 3)."""
    rng = random.Random(f"shapes-{number}")
    drawing = Drawing(rng)
    for _ in range(rng.randint(4, 16)):
        drawing.shape()
    data = resvg_py.svg_to_bytes(svg_string=drawing.svg(), width=256, height=256, skip_system_fonts=True)
    return np.array(Image.open(io.BytesIO(bytes(data))).convert("RGB"))
