"""The face of `portraits.py`: the head's measures, eyes and mouth. Coordinates in units of the head's half width."""

import random

from .canvas import Canvas, mix, oval, polygon, smooth


class Head:
    """The measures of one head, in units of its half width, origin at its centre; `turn` in -1..1, + to the right."""

    def __init__(self, rng: random.Random, boy: bool):
        self.turn = rng.choice((0, 0, rng.uniform(-1, 1), rng.uniform(-0.6, 0.6)))
        self.chin = rng.uniform(0.92, 1.16) + 0.06 * boy
        self.point = rng.uniform(0.05, 0.3) + 0.06 * boy  # half width of the chin
        self.cheek = rng.uniform(0.7, 0.93)
        self.eye_y = rng.uniform(0.18, 0.36)
        self.eye_x = rng.uniform(0.42, 0.53)
        self.eye_w = rng.uniform(0.22, 0.34) * (0.92 if boy else 1)
        self.eye_h = rng.uniform(0.24, 0.44) * (0.82 if boy else 1)
        self.top = -rng.uniform(1.12, 1.42)  # of the hair
        self.side = rng.uniform(1.04, 1.27)  # half width of the hair
        self.mouth = self.chin - rng.uniform(0.24, 0.34)
        self.slant = rng.uniform(-0.12, 0.16)
        self.shift = 0.17 * self.turn

    def eye(self, s: int) -> tuple[float, float]:
        """x and half width of the eye on side `s`."""
        far = 1 - 0.24 * max(0.0, s * self.turn)
        return self.shift + s * self.eye_x * (1 - 0.12 * max(0.0, s * self.turn)), self.eye_w * far

    def outline(self) -> str:
        t, k, chin = 0.1 * self.turn, self.cheek, self.chin
        low = 0.5 * chin
        return smooth(
            [
                (-0.97, -0.35),
                (-0.98, 0.05),
                (-k + 0.4 * t, low),
                (-self.point - 0.16 + t, chin - 0.17),
                (-self.point * 0.6 + 1.3 * t, chin - 0.02),
                (self.point * 0.6 + 1.3 * t, chin - 0.02),
                (self.point + 0.16 + t, chin - 0.17),
                (k + 0.4 * t, low),
                (0.98, 0.05),
                (0.97, -0.35),
                (0.6, -0.92),
                (0, -1.05),
                (-0.6, -0.92),
            ]
        )


def draw_eye(c: Canvas, style: dict, head: Head, s: int, kind: str, iris: str, lash: str, skin: str) -> None:
    """One eye; `kind`: open, wide, half, angry, happy or shut. `style`: of `eye_style`."""
    e, (x, w), y, h = style, head.eye(s), head.eye_y, head.eye_h
    lift = head.slant * h

    def p(u, v):  # u: outwards, in half widths; v: downwards, in half heights
        return f"{x + s * u * w:.3f},{y + v * h - lift * u:.3f}"

    thick = e["lash"]
    if kind in ("happy", "shut"):
        bend = -0.75 if kind == "happy" else 0.55
        c.stroke(f"M{p(-0.95, 0.3)}Q{p(0, 0.3 + 1.6 * bend)} {p(1, 0.25)}", lash, thick * 1.05)
        if e["flick"] and kind == "shut":
            c.stroke(f"M{p(0.7, 0.5)}L{p(1.0, 0.75)}M{p(0.25, 0.75)}L{p(0.38, 1.02)}", lash, thick * 0.6)
        return
    v = {"wide": 1.12, "half": 0.9}.get(kind, 1.0)
    a, b = e["corner"]
    white = (
        f"M{p(-1, 0.25)}C{p(-0.85, -a * v)} {p(0.1, -1.25 * v)} {p(0.55, -0.92 * v)}"
        f"Q{p(0.95, -0.6)} {p(1, 0.15)}C{p(0.9, b)} {p(-0.75, b)} {p(-1, 0.25)}Z"
    )
    if kind == "half":
        white = f"M{p(-1, 0.1)}Q{p(0, -0.2)} {p(1.02, 0.0)}C{p(0.9, b)} {p(-0.75, b)} {p(-1, 0.1)}Z"
    elif kind == "angry":
        white = (
            f"M{p(-0.98, 0.05)}L{p(0.75, -0.85)}Q{p(1.0, -0.5)} "
            f"{p(1, 0.15)}C{p(0.9, b)} {p(-0.75, b)} {p(-0.98, 0.05)}Z"
        )
    c.draw(white, e["white"])
    name = c.clip(white)
    rx, ry = w * e["iris_w"] * (0.8 if kind == "wide" else 1), h * e["iris_h"] * (0.8 if kind == "wide" else 1)
    ix, iy = x + e["look"] * w * 0.3, y + 0.02 * h
    disc = oval(ix, iy, rx, ry)
    dark = mix(iris, "#120a20", e["dark"])
    if e["iris"] == "ramp":
        c.draw(disc, c.ramp(dark, mix(iris, "#ffffff", 0.25)), clip=name)
    elif e["iris"] == "two":
        c.draw(disc, iris, clip=name)
        c.draw(
            oval(ix, iy - 0.55 * ry, rx * 1.05, ry * 0.85),
            dark,
            clip=c.clip(disc) if kind in ("open", "wide") else name,
        )
    else:
        c.draw(disc, iris, clip=name)
    if e["rim"]:
        c.stroke(disc, dark, e["rim"], name)
    if e["pupil"]:
        c.draw(oval(ix, iy - 0.05 * ry, rx * e["pupil"], ry * e["pupil"] * 1.05), mix(iris, "#0c0618", 0.85), clip=name)
    if e["glow"]:
        c.draw(oval(ix, iy + 0.55 * ry, rx * 0.6, ry * 0.32), mix(iris, "#ffffff", 0.55), 0.8, name)
    if e["shade"]:
        c.draw(f"M{p(-1.1, -1.5)}L{p(1.1, -1.5)}L{p(1.1, -0.5)}Q{p(0, -0.85)} {p(-1.1, -0.1)}Z", "#30204a", 0.28, name)
    gx, gy, g = e["gleam"]
    c.draw(oval(ix + gx * rx, iy + gy * ry, rx * g, ry * g * e["gleam_tall"]), "#ffffff")
    if e["second"]:
        c.draw(oval(ix - gx * rx * 0.9, iy - gy * ry * 0.8, rx * g * 0.5), "#ffffff")
    if kind == "half":
        upper = f"M{p(-1.05, 0.12)}Q{p(0, -0.2)} {p(1.08, 0.02)}"
    elif kind == "angry":
        upper = f"M{p(-1.0, 0.08)}L{p(0.75, -0.86)}Q{p(1.0, -0.55)} {p(1.04, 0.05)}"
    else:
        upper = (
            f"M{p(-1, 0.25)}C{p(-0.85, -a * v)} {p(0.1, -1.25 * v)} {p(0.55, -0.92 * v)}Q{p(0.95, -0.6)} {p(1.02, 0.1)}"
        )
    c.stroke(upper, lash, thick)
    if e["flick"]:
        c.stroke(
            f"M{p(0.86, -0.5)}L{p(1.3, -0.72)}" + (f"M{p(0.98, -0.2)}L{p(1.32, -0.3)}" if e["flick"] > 1 else ""),
            lash,
            thick * 0.8,
        )
    if e["lower"]:
        c.stroke(f"M{p(-0.3, b * 0.78)}Q{p(0.4, b * 0.86)} {p(0.8, b * 0.52)}", lash, e["lower"])
    if e["fold"]:
        c.stroke(f"M{p(-0.6, -1.12 * v)}Q{p(0.2, -1.5 * v)} {p(0.9, -0.98)}", mix(skin, "#602030", 0.5), 0.9)


def eye_style(rng: random.Random, boy: bool) -> dict:
    """What both eyes of a face have in common."""
    return {
        "lash": rng.choice((1.6, 2.2, 3.0, 3.8, 4.6)) * (0.85 if boy else 1),
        "flick": 0 if boy else rng.choice((0, 1, 2)),
        "corner": (rng.uniform(0.75, 1.15), rng.uniform(1.05, 1.3)),
        "white": rng.choice(("#ffffff", "#ffffff", "#f4f4fa", "#fdf6f0")),
        "iris": rng.choice(("ramp", "ramp", "two", "two", "flat")),
        "iris_w": rng.uniform(0.58, 0.82),
        "iris_h": rng.uniform(0.78, 1.0),
        "dark": rng.uniform(0.35, 0.7),
        "rim": rng.choice((0, 0.8, 1.2, 1.6)),
        "pupil": rng.choice((0, 0.36, 0.45, 0.5, 0.58)),
        "glow": rng.random() < 0.4,
        "shade": rng.random() < 0.5,
        "look": rng.choice((0, 0, 0, rng.uniform(-0.6, 0.6))),
        "gleam": (rng.choice((-1, 1)) * rng.uniform(0.2, 0.42), -rng.uniform(0.3, 0.5), rng.uniform(0.24, 0.4)),
        "gleam_tall": rng.uniform(0.7, 1.1),
        "second": rng.random() < 0.6,
        "lower": rng.choice((0, 0.8, 1.2)),
        "fold": rng.random() < 0.35,
    }


def draw_mouth(c: Canvas, rng: random.Random, head: Head, kind: str, ink: str, width: float) -> None:
    """A mouth: smile, small, grin, laugh, cat, frown, wave, oh, teeth, pout or flat."""
    x, y, w = head.shift * 1.15, head.mouth, rng.uniform(0.16, 0.26)
    if kind in ("grin", "laugh"):
        tall = w * (rng.uniform(0.7, 0.95) if kind == "grin" else rng.uniform(1.1, 1.5))
        top = y - 0.08
        d = (
            f"M{x - w},{top}Q{x},{top + 0.25 * w} {x + w},{top}"
            f"C{x + w * 0.9},{top + tall} {x - w * 0.9},{top + tall} {x - w},{top}Z"
        )
        c.draw(d, rng.choice(("#7a2430", "#9c3040", "#5c1c28")))
        name = c.clip(d)
        c.draw(oval(x, top + tall * 0.85, w * 0.62, tall * 0.35), "#f08a8a", clip=name)
        if rng.random() < 0.5:
            c.draw(
                f"M{x - w},{top - 0.1}H{x + w}V{top + 0.2 * tall}Q{x},{top + 0.34 * tall} {x - w},{top + 0.2 * tall}Z",
                "#ffffff",
                clip=name,
            )
        c.stroke(d, ink, width)
    elif kind == "oh":
        d = oval(x, y, w * rng.uniform(0.32, 0.5), w * rng.uniform(0.4, 0.7))
        c.draw(d, "#8a2c38")
        c.stroke(d, ink, width)
    elif kind == "teeth":
        d = f"M{x - w},{y + 0.06}Q{x},{y - 0.12} {x + w},{y + 0.06}Q{x},{y + 0.2} {x - w},{y + 0.06}Z"
        c.draw(d, "#ffffff")
        c.stroke(d + f"M{x - w * 0.8},{y + 0.05}H{x + w * 0.8}", ink, width)
    else:
        paths = {
            "smile": f"M{x - w},{y - 0.05}Q{x},{y + 0.14} {x + w},{y - 0.05}",
            "small": f"M{x - w * 0.5},{y}Q{x},{y + 0.05} {x + w * 0.5},{y}",
            "cat": (
                f"M{x - w},{y - 0.04}Q{x - w * 0.5},{y + 0.11} "
                f"{x},{y - 0.01}Q{x + w * 0.5},{y + 0.11} {x + w},{y - 0.04}"
            ),
            "frown": f"M{x - w * 0.8},{y + 0.06}Q{x},{y - 0.12} {x + w * 0.8},{y + 0.06}",
            "wave": f"M{x - w * 0.8},{y}q{w * 0.27},-0.07 {w * 0.53},0t{w * 0.53},0t{w * 0.53},0",
            "pout": (
                f"M{x - w * 0.4},{y + 0.03}Q{x},{y - 0.07} {x + w * 0.4},{y + 0.03}M{x - w * 0.2},{y + 0.12}h{w * 0.4}"
            ),
            "flat": f"M{x - w * 0.6},{y}H{x + w * 0.6}",
        }
        c.stroke(paths[kind], ink, width * 1.15)


def draw_blush(c: Canvas, rng: random.Random, head: Head, shy: bool, face: str) -> None:
    """Red cheeks, or for the shy sometimes strokes; `face`: the face's clipping path. Most faces have none."""
    kind = rng.random()
    if kind > 0.45 and not shy:
        return
    strong = 0.55 if shy else rng.uniform(0.2, 0.45)
    for s in (-1, 1):
        x, y = head.eye(s)[0] + s * 0.1, head.eye_y + head.eye_h + 0.1
        if kind < 0.3 or not shy:
            c.draw(oval(x, y, rng.uniform(0.15, 0.24), rng.uniform(0.07, 0.13)), "#f0707a", strong, face)
        else:
            strokes = "".join(f"M{x + (k - 1) * 0.1:.3f},{y + 0.06:.3f}l0.05,-0.12" for k in range(3))
            c.stroke(strokes, "#e85a68", 1.4, face)


def draw_tear(c: Canvas, rng: random.Random, head: Head, s: int) -> None:
    """A tear below the eye on side `s`."""
    (x, w), y, tall = head.eye(s), head.eye_y + head.eye_h, rng.uniform(0.16, 0.4)
    drop = oval(x + s * w * 0.5, y + tall * 0.5, 0.07, tall * 0.6)
    c.draw(drop, "#a8dcf8", 0.9)
    c.stroke(drop, "#5aa0d8", 0.7)


def draw_nose(c: Canvas, rng: random.Random, head: Head, ink: str, skin: str) -> None:
    """A dot, a line, a small shadow, or nothing."""
    kind, x = rng.choice(("none", "dot", "line", "shade", "line")), head.shift * 1.25
    y = (head.eye_y + head.eye_h * 0.5 + head.mouth) / 2
    if kind == "dot":
        c.draw(oval(x, y, 0.03), ink)
    elif kind == "line":
        c.stroke(f"M{x},{y - 0.06}l{0.05 * (1 if head.turn >= 0 else -1)},0.08", ink, 1.2)
    elif kind == "shade":
        c.draw(polygon([(x, y - 0.1), (x - 0.07 * c.light, y + 0.03), (x + 0.02, y + 0.03)]), c.warm(skin))


def draw_brows(c: Canvas, head: Head, angle: float, height: float, ink: str, width: float) -> None:
    """Both brows; `angle`: positive for anger; `height`: above their usual place."""
    for s in (-1, 1):
        x, w = head.eye(s)
        y = head.eye_y - head.eye_h - 0.16 - height
        start, end = (x - s * w * 0.75, y + angle * 0.28), (x + s * w * 0.85, y - angle * 0.3)
        c.stroke(
            f"M{start[0]:.3f},{start[1]:.3f}Q{x + s * w * 0.1:.3f},{y - 0.1:.3f} {end[0]:.3f},{end[1]:.3f}", ink, width
        )
