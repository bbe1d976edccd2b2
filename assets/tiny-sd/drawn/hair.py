"""The hair of `portraits.py`, behind and before the face. Coordinates in units of the head's half width."""

import math
import random

from .canvas import Canvas, lock, mix, oval, polygon, smooth, vary
from .faces import Head


def back_hair(c: Canvas, rng: random.Random, head: Head, form: str, colour: str) -> None:
    """What hangs or stands behind the face and the body."""
    deep, w, top = mix(c.tone(colour), colour, 0.3), head.side, head.top
    if "tails" in form or "ponytail" in form:
        sides = (-1, 1) if "tails" in form else (rng.choice((-1, 1)),)
        low, out, fat = rng.uniform(0.9, 2.4), rng.uniform(1.3, 1.75), rng.uniform(0.26, 0.42)
        high = rng.uniform(-0.75, 0.1)
        for s in sides:
            tail = [
                (s * 0.86, high - 0.16),
                (s * (out + fat * 0.5), high - 0.25),
                (s * (out + fat), 0.5 * low),
                (s * out, low),
                (s * (out - 0.1 - fat * 0.4), low * 0.6),
                (s * (out - fat * 0.9), high + 0.3),
            ]
            c.part(
                smooth(tail),
                colour,
                smooth([(s * 0.8, high + 0.2), (s * out, 0.3 * low), (s * out, low * 1.1), (s * 0.8, low)]),
            )
            for k in range(rng.randint(0, 3)):
                u = out + fat * (0.15 + 0.25 * k)
                c.outline(
                    f"M{s * (out - 0.1)},{high}Q{s * (u + 0.1)},{0.3 * low} {s * (u - 0.15)},{low * 0.75}", colour, 0.6
                )
            c.draw(
                oval(s * 0.96, high - 0.02, 0.15, 0.18),
                vary(rng, rng.choice(("#d84a50", "#f2c84c", "#4a80d8", "#f490b4", "#ffffff"))),
            )
    elif "bun" in form:
        for s in (-1, 1) if "two" in form else (0,):
            c.part(
                oval(s * 0.72, top - 0.02 - 0.18 * (s == 0), rng.uniform(0.34, 0.46)),
                colour,
                oval(s * 0.72 - 0.2 * c.light, top + 0.15, 0.42),
            )
    elif "curly" in form:
        r = rng.uniform(0.26, 0.4)
        low = rng.uniform(0.5, 1.1)
        for k in range(15):
            a = math.pi * (1 - low * 0.35 + k / 14 * (1 + low * 0.7))
            c.part(
                oval(w * 0.98 * math.cos(a), -0.1 + 1.05 * math.sin(a) * abs(top) * 0.92, r * rng.uniform(0.85, 1.15)),
                deep,
            )
    if "spiky" in form or "messy" in form or "tousled" in form:
        n, lean = rng.randint(7, 11), rng.uniform(-0.5, 0.5)
        out = 1.34 if "spiky" in form else 1.2 if "messy" in form else 1.12
        points = []
        for k in range(n + 1):
            a = math.pi * (0.84 + 1.32 * k / n)
            b = math.pi * (0.84 + 1.32 * (k + 0.5 + rng.uniform(-0.2, 0.2)) / n) + lean * 0.25
            d = 1 + (out - 1) * rng.uniform(0.6, 1.3)
            points += [(0.97 * w * math.cos(a), 0.93 * abs(top) * math.sin(a) + 0.05)]
            points += [(d * w * math.cos(b), d * abs(top) * math.sin(b) + 0.05)]
        c.part(polygon(points[:-1] + [(0.5, 0.85), (-0.5, 0.85)]), deep)
        return
    if form.startswith("long"):
        low, wide = rng.uniform(1.7, 3.2), w * rng.uniform(1.0, 1.3)
    elif "bob" in form:
        low, wide = rng.uniform(0.85, 1.25), w * rng.uniform(1.02, 1.16)
    elif (
        "short" in form or "tails" in form or "ponytail" in form or "bun" in form or "curly" in form or "braids" in form
    ):
        low, wide = rng.uniform(0.45, 0.8), w * 0.98
    else:
        low, wide = 1.0, w
    amount = 0.12 if "wavy" in form else 0.0
    left = [(-w * 0.75, top * 0.8), (-w * 1.0, -0.2)]
    steps = 5
    for k in range(1, steps + 1):
        y = -0.2 + (low + 0.2) * k / steps
        left.append((-(w + (wide - w) * k / steps) + amount * (-1) ** k, y))
    n = rng.randint(3, 6)
    tips = []
    for k in range(n):
        u = -1 + 2 * (k + 0.5) / n
        tips += [(u * wide * 0.95, low + rng.uniform(0.02, 0.22)), (u * wide * 0.95 + wide / n, low - 0.08)]
    shape = [(0, top), *left, *tips[:-1], *[(-x, y) for x, y in reversed(left)]]
    c.part(smooth(shape), deep)


def front_hair(c: Canvas, rng: random.Random, head: Head, form: str, colour: str, skin: str, face: str) -> None:
    """The cap of hair, its fringe and the locks beside the face; `face`: the face's clipping path, for the shadow."""
    w, top, shift = head.side, head.top, head.shift * 0.8
    boy_like = any(k in form for k in ("spiky", "tousled", "messy"))
    kind = rng.choice(
        ("locks", "locks", "swept") if boy_like else ("blunt", "locks", "locks", "swept", "parted", "wisps")
    )
    level = head.eye_y - head.eye_h  # the top of the eyes
    temple = rng.uniform(0.1, 0.5)
    if "bun" not in form and "ponytail" not in form and not boy_like and rng.random() < 0.8:
        long = rng.uniform(0.8, 1.5) if form.startswith("long") or "tails" in form else rng.uniform(0.6, head.chin)
        for s in (-1, 1):
            for k in range(rng.randint(1, 2)):
                c.part(
                    lock(
                        s * (w - 0.16 - 0.1 * k),
                        -0.3,
                        s * (w - 0.14 - 0.16 * k),
                        long - 0.25 * k,
                        rng.uniform(0.24, 0.36),
                        s * rng.uniform(-0.15, 0.05),
                    ),
                    colour,
                    width=0.8,
                )
    elif boy_like or "short" in form:
        for s in (-1, 1):
            c.part(lock(s * (w - 0.1), -0.25, s * (w - 0.16), temple + 0.2, 0.26, 0), colour, width=0.8)
    tips = []  # from right to left: (x, y), valleys between
    if kind in ("blunt", "locks", "wisps"):
        n = {"blunt": rng.randint(5, 9), "locks": rng.randint(3, 6), "wisps": rng.randint(2, 4)}[kind]
        depth = {"blunt": 0.06, "locks": rng.uniform(0.25, 0.5), "wisps": rng.uniform(0.35, 0.55)}[kind]
        lean = rng.uniform(-0.2, 0.2)
        arch = rng.uniform(0, 0.25)
        for k in range(n):
            u = 0.86 - 1.72 * (k + 0.5) / n
            y = level + rng.uniform(-0.1, 0.06) - (0.04 if kind == "blunt" else rng.uniform(-0.12, 0.12)) + arch * u * u
            tips.append((u + lean * 0.6 + shift, y + (0.08 if kind == "locks" else 0)))
            if k < n - 1:
                tips.append(
                    (0.86 - 1.72 * (k + 1) / n + shift, y - depth * (rng.uniform(0.6, 1.2) if kind != "blunt" else 1))
                )
    else:
        x = (rng.uniform(-0.2, 0.2) if kind == "parted" else rng.choice((-1, 1)) * rng.uniform(0.3, 0.6)) + shift
        tips = [((0.9 + x) / 2 + 0.2, level - 0.12), (x, rng.uniform(-0.85, -0.6)), ((x - 0.9) / 2 - 0.2, level - 0.12)]
    d = (
        f"M{-w},{temple}C{-w * 1.05},{top * 0.72} {-w * 0.62},{top} "
        f"0,{top}C{w * 0.62},{top} {w * 1.05},{top * 0.72} {w},{temple}"
    )
    d += (
        f"Q{w * 0.92},{min(level, temple) - 0.25} {0.86 + shift * 0.5:.3f},{level - 0.28:.3f}"
        if kind not in ("swept", "parted")
        else f"Q{w * 0.86},{level - 0.1} {0.8:.3f},{level - 0.12:.3f}"
    )
    px, py = 0.86, level - 0.28
    for i, (x, y) in enumerate(tips):
        bend, sink = (0.06 if kind != "blunt" else 0.0) * (1 if i % 2 == 0 else -1), 0.04 if i % 2 == 0 else 0.02
        d += f"Q{(px + x) / 2 + bend:.3f},{(py + y) / 2 + sink:.3f} {x:.3f},{y:.3f}"
        px, py = x, y
    d += (
        f"Q{-0.84:.3f},{level - 0.2:.3f} {-0.88 + shift * 0.5:.3f},{level - 0.28:.3f}"
        f"Q{-w * 0.92},{min(level, temple) - 0.25} {-w},{temple}Z"
    )
    shadow = smooth(
        [
            (-1.2 * c.light, top),
            (-0.75 * c.light, top * 0.5),
            (-0.7 * c.light, 0.0),
            (-0.5 * c.light, 0.6),
            (-1.6 * c.light, 0.6),
        ]
    )
    if rng.random() < 0.7:
        c.body.append(
            f'<g clip-path="url(#{face})"><g transform="translate({0.03 * c.light:.3f} {rng.uniform(0.05, 0.12):.3f})">'
        )
        c.draw(d, c.warm(skin, 2.2), rng.uniform(0.4, 0.8))
        c.body.append("</g></g>")
    c.part(d, colour, shadow)
    name = c.clip(d)
    for _ in range(rng.choice((0, 0, 2, 3, 5, 7))):
        u = rng.uniform(-0.85, 0.85)
        x0 = u * 0.35 + shift
        c.stroke(
            f"M{x0:.3f},{top + 0.12:.3f}Q{u * 0.9:.3f},{top * 0.6:.3f} {u:.3f},{level - 0.1:.3f}",
            mix(colour, "#201030", 0.35),
            max(0.8, c.line * 0.6),
            name,
        )
    shine = rng.choice(("none", "none", "band", "streaks", "spot"))
    light = mix(colour, "#ffffff", rng.uniform(0.35, 0.6))
    if shine == "band":
        y = top * rng.uniform(0.5, 0.68)
        c.stroke(f"M-0.72,{y + 0.28}Q0,{y - 0.2} 0.72,{y + 0.28}", light, 0.1 * c.unit, name, 0.8)
    elif shine == "streaks":
        for _ in range(rng.randint(3, 6)):
            u = rng.uniform(-0.7, 0.7)
            c.draw(lock(u, top * 0.72 + u * u * 0.3, u * 1.15, top * 0.36 + u * u * 0.35, 0.1, 0.0), light, 0.8, name)
    elif shine == "spot":
        c.draw(oval(0.4 * c.light, top * 0.62, 0.26, 0.13), light, 0.7, name)
    if boy_like or rng.random() < 0.15:
        for _ in range(rng.randint(0, 3)):
            u = rng.uniform(-0.4, 0.4)
            c.part(
                lock(
                    u,
                    top + 0.1,
                    u * 1.6 + rng.uniform(-0.2, 0.2),
                    top - rng.uniform(0.12, 0.35),
                    0.2,
                    rng.uniform(-0.1, 0.1),
                ),
                colour,
                width=0.8,
            )


def braids(c: Canvas, rng: random.Random, head: Head, colour: str) -> None:
    """Two braids over the shoulders."""
    n, r, x = rng.randint(5, 8), rng.uniform(0.15, 0.2), rng.uniform(0.86, 1.02)
    for s in (-1, 1):
        for k in range(n):
            y = 0.55 + k * r * 1.45
            for side in (-1, 1):
                c.part(
                    smooth(
                        [
                            (s * x + side * r * 1.1, y - r),
                            (s * x + side * r * 1.2, y),
                            (s * x, y + r * 0.9),
                            (s * x - side * r * 0.3, y - r * 0.2),
                        ]
                    ),
                    colour,
                    width=0.7,
                )
        c.draw(
            oval(s * x, 0.55 + n * r * 1.45, r * 0.7, r * 0.5),
            vary(rng, rng.choice(("#d84a50", "#f2c84c", "#4a80d8", "#f490b4"))),
        )
        c.part(lock(s * x, 0.55 + n * r * 1.45, s * x, 0.95 + n * r * 1.45, r * 1.3, 0), colour, width=0.7)
