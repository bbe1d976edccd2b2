"""Clothes and things worn, for the faces of `portraits.py`. Coordinates in units of the head's half width.

The body's origin is the centre of the head: the neck begins at y = 0.7, shoulders are at y = 1.5 to 1.8. `worn(...)`
draws what is on the head, in the head's own group.
"""

import math
import random

from .canvas import Canvas, mix, oval, polygon, smooth, vary

CLOTHES = {
    "red": "#d4483f", "orange": "#f0893a", "yellow": "#f3cd4e", "green": "#55a860", "teal": "#3ea9a2",
    "blue": "#4c80d8", "dark blue": "#2f3f72", "purple": "#8559ba", "pink": "#f08cb2", "white": "#f3f3f6",
    "black": "#2d2d36", "gray": "#8e949f", "brown": "#8a6244",
}  # fmt: skip
WEAR = (
    "a {} t-shirt", "a {} t-shirt with a star", "a {} t-shirt with a heart", "a striped {} t-shirt", "a {} hoodie",
    "a {} hoodie", "a {} sweater", "a {} knitted sweater", "a {} jacket", "a {} shirt", "a {} kimono",
    "a sailor school uniform", "a {} school uniform", "a {} coat", "{} overalls", "a {} dress", "a {} sundress",
    "knight armour with a {} cape", "a {} robe", "a {} space suit",
)  # fmt: skip
ALSO = (
    "{} glasses", "{} glasses", "a {} ribbon", "a {} bow in {her} hair", "cat ears", "{} headphones",
    "a {} flower in {her} hair", "a golden crown", "a {} beret", "a {} cap", "a witch hat", "earrings", "a {} scarf",
    "{} hair clips", "fox ears",
)  # fmt: skip


def star(x: float, y: float, r: float, points: int = 5, inner: float = 0.45) -> str:
    """The path of a star."""
    angles = [(math.pi * k / points - math.pi / 2, r if k % 2 == 0 else r * inner) for k in range(2 * points)]
    return polygon([(x + d * math.cos(a), y + d * math.sin(a)) for a, d in angles])


def heart(x: float, y: float, r: float) -> str:
    """The path of a heart."""
    return (
        f"M{x},{y + r}C{x - 1.9 * r},{y - 0.2 * r} {x - 0.9 * r},{y - 1.5 * r} {x},{y - 0.5 * r}"
        f"C{x + 0.9 * r},{y - 1.5 * r} {x + 1.9 * r},{y - 0.2 * r} {x},{y + r}Z"
    )


def bow(c: Canvas, x: float, y: float, size: float, colour: str, turn: float = 0.0) -> None:
    """A ribbon tied to a bow."""
    co, si = math.cos(turn), math.sin(turn)

    def at(u, v):
        return (x + size * (u * co - v * si), y + size * (u * si + v * co))

    for s in (-1, 1):
        c.part(polygon([at(0.1 * s, 0.1), at(0.75 * s, 1.0), at(0.3 * s, 0.9)]), colour, width=0.7)
        wing = [at(0, 0), at(0.6 * s, -0.55), at(1.05 * s, -0.4), at(1.0 * s, 0.4), at(0.55 * s, 0.45)]
        c.part(smooth(wing), colour, smooth([at(0, 0), at(0.5 * s, 0.1), at(1.1 * s, 0.5), at(0.5 * s, 0.6)]), 0.8)
    c.part(oval(x, y, 0.26 * size), mix(colour, "#000000", 0.12), width=0.8)


def body(c: Canvas, rng: random.Random, wear: str, colour: str, skin: str, boy: bool, chin: float) -> None:
    """Neck, shoulders and clothes; `wear` is one of WEAR, `chin` the chin's y."""
    wide = rng.uniform(1.35, 1.75) if boy else rng.uniform(1.1, 1.45)
    neck, level = rng.uniform(0.24, 0.34) if boy else rng.uniform(0.18, 0.27), chin + rng.uniform(0.36, 0.5)
    trim = vary(rng, rng.choice(list(CLOTHES.values())))
    shape = [(-neck - 0.12, level - 0.1), (-wide * 0.75, level + 0.12), (-wide, level + 0.5), (-wide * 1.12, 4.2)]
    torso = smooth([*shape, (wide * 1.12, 4.2), *[(-x, y) for x, y in reversed(shape[:3])]])
    throat = (
        f"M{-neck},{chin - 0.4}L{-neck},{level - 0.12}Q{-neck},{level + 0.05} {-wide * 0.55},{level + 0.2}"
        f"H{wide * 0.55}Q{neck},{level + 0.05} {neck},{level - 0.12}L{neck},{chin - 0.4}Z"
    )
    shade = polygon(
        [
            (0.15 * c.light, level),
            (-wide * 1.5 * c.light, level - 0.3),
            (-wide * 1.5 * c.light, 4.4),
            (-0.7 * wide * c.light, 4.4),
        ]
    )
    bare = "dress" in wear or "kimono" in wear or "t-shirt" in wear
    if "hoodie" in wear or "cape" in wear or "coat" in wear:
        hood = [(-0.75, chin - 0.05), (-1.1, level + 0.1), (-0.7, level + 0.5), (0.7, level + 0.5), (1.1, level + 0.1)]
        c.part(smooth([*hood, (0.75, chin - 0.05)]), mix(colour, "#000020", 0.15))
    if "armour" in wear:
        c.part(
            smooth([(-wide * 1.25, level + 0.1), (-wide * 1.5, 4.3), (wide * 1.5, 4.3), (wide * 1.25, level + 0.1)]),
            mix(colour, "#000020", 0.1),
        )
        colour = vary(rng, "#c4cad6", 0.5)
    if "space suit" in wear and rng.random() < 0.5:
        colour = "#eceef2"
    c.part(torso, colour, shade)
    deep = level + (
        0.55 if "sundress" in wear else 0.42 if "dress" in wear or "kimono" in wear else 0.3 if bare else 0.16
    )
    opening = f"M{-neck - 0.14},{level - 0.14}Q0,{2 * deep - level} {neck + 0.14},{level - 0.14}Z"
    if "sundress" in wear:
        opening = polygon(
            [
                (-wide * 1.3, level - 0.4),
                (-wide * 0.62, level + 0.1),
                (-wide * 0.5, deep),
                (0, deep + 0.14),
                (wide * 0.5, deep),
                (wide * 0.62, level + 0.1),
                (wide * 1.3, level - 0.4),
            ]
        )
        c.draw(torso, skin)
        c.part(
            smooth(
                [
                    (-wide * 0.78, deep + 0.12),
                    (-wide * 0.4, deep - 0.02),
                    (0, deep + 0.1),
                    (wide * 0.4, deep - 0.02),
                    (wide * 0.78, deep + 0.12),
                    (wide * 0.9, 4.3),
                    (-wide * 0.9, 4.3),
                ]
            ),
            colour,
        )
        for s in (-1, 1):
            c.stroke(f"M{s * wide * 0.45},{deep}L{s * wide * 0.4},{level - 0.02}", colour, 0.12 * c.unit)
            c.outline(f"M{s * wide * 0.86},{level + 0.1}Q{s * wide},{level + 0.3} {s * wide * 1.02},4.2", skin)
    elif "space" not in wear and "armour" not in wear:
        c.draw(opening, skin)
        c.outline(opening, mix(colour, skin, 0.3), 0.8)
    c.draw(
        throat
        if "sundress" in wear
        else throat.split("Q")[0] + f"Q0,{deep + 0.02} {neck},{level - 0.12}L{neck},{chin - 0.4}Z",
        skin,
    )
    c.draw(
        smooth(
            [
                (-neck, chin - 0.3),
                (neck, chin - 0.3),
                (neck, chin + 0.08),
                (0, chin + rng.uniform(0.16, 0.28)),
                (-neck, chin + 0.08),
            ]
        ),
        c.warm(skin, 1.2),
    )
    for s in (-1, 1):
        c.outline(f"M{s * neck},{chin - 0.2}L{s * neck},{level - 0.12}", skin, 0.8)
    middle = (level + deep) / 2
    if "t-shirt" in wear:
        c.stroke(opening.rstrip("Z"), trim if rng.random() < 0.4 else mix(colour, "#ffffff", 0.4), 0.07 * c.unit)
        if "star" in wear or "heart" in wear:
            pale = rng.choice(("#fff3c8", "#ffffff", trim))
            c.part((star if "star" in wear else heart)(0, deep + 0.55, rng.uniform(0.26, 0.4)), pale, width=0.7)
        elif "striped" in wear:
            name, k = c.clip(torso), rng.uniform(0.24, 0.4)
            for i in range(8):
                c.stroke(
                    f"M-3,{deep + 0.15 + i * k}Q0,{deep + 0.3 + i * k} 3,{deep + 0.15 + i * k}",
                    trim,
                    0.4 * k * c.unit,
                    name,
                )
    elif "hoodie" in wear:
        inner = mix(colour, "#000020", 0.2)
        for s in (-1, 1):
            c.part(
                smooth(
                    [
                        (s * (neck + 0.02), level - 0.2),
                        (s * 0.7, level - 0.06),
                        (s * 0.55, level + 0.28),
                        (s * 0.08, deep + 0.2),
                    ]
                ),
                colour,
            )
            c.stroke(
                f"M{s * 0.2},{deep + 0.2}q{s * 0.04},{rng.uniform(0.2, 0.5)} 0,{rng.uniform(0.4, 0.7)}",
                mix(inner, "#ffffff", 0.75),
                0.06 * c.unit,
            )
    elif "sweater" in wear:
        collar = (
            f"M{-neck - 0.06},{chin + 0.12}Q0,{chin + 0.32} {neck + 0.06},{chin + 0.12}"
            f"L{neck + 0.16},{level + 0.04}Q0,{level + 0.34} {-neck - 0.16},{level + 0.04}Z"
        )
        c.part(collar, colour)
        if "knitted" in wear:
            name = c.clip(torso)
            for i in range(-5, 6):
                c.stroke(
                    f"M{i * 0.3},{level + 0.1}" + "".join(f"l{0.06 if k % 2 else -0.06},0.16" for k in range(14)),
                    mix(colour, "#201030", 0.2),
                    1.3,
                    name,
                )
    elif "kimono" in wear:
        for s in (1, -1):
            c.part(
                polygon(
                    [
                        (s * (neck + 0.08), level - 0.22),
                        (s * (neck + 0.3), level - 0.08),
                        (-s * 0.12, deep + 1.1),
                        (-s * 0.42, deep + 1.0),
                    ]
                ),
                mix(trim, "#ffffff", 0.5),
            )
        for _ in range(rng.randint(0, 9)):
            c.draw(
                star(rng.uniform(-wide, wide), rng.uniform(level + 0.5, 2.6), 0.12, rng.randint(4, 6), 0.6),
                mix(colour, "#ffffff", 0.65),
            )
    elif "sailor" in wear:
        for s in (-1, 1):
            flap = [
                (s * (neck + 0.1), level - 0.2),
                (s * wide * 0.86, level + 0.2),
                (s * wide * 0.7, level + 0.55),
                (0, deep + 0.5),
            ]
            c.part(polygon(flap), trim)
            c.stroke(f"M{s * wide * 0.68},{level + 0.46}L0,{deep + 0.38}", "#ffffff", 1.3)
        c.draw(polygon([(-neck - 0.1, level - 0.16), (neck + 0.1, level - 0.16), (0, deep + 0.44)]), skin)
        bow(c, 0, deep + 0.6, rng.uniform(0.26, 0.42), vary(rng, rng.choice(("#d8404a", "#3a58b0", "#f0c048"))))
    elif "school" in wear or "jacket" in wear or "coat" in wear:
        shirt = "#f6f6f4" if rng.random() < 0.7 else trim
        c.part(
            polygon([(-neck - 0.1, level - 0.18), (0, level + 1.5), (neck + 0.1, level - 0.18), (0, level + 0.12)]),
            shirt,
            width=0.6,
        )
        for s in (-1, 1):
            c.part(
                polygon(
                    [
                        (s * (neck + 0.02), level - 0.24),
                        (s * (neck + 0.42), level + 0.1),
                        (s * 0.34, level + 0.7),
                        (s * 0.02, level + 1.5),
                    ]
                ),
                mix(colour, "#ffffff", 0.08),
            )
        if "school" in wear or rng.random() < 0.2:
            c.part(
                polygon(
                    [
                        (-0.1, level + 0.1),
                        (0.1, level + 0.1),
                        (0.13, level + 1.0),
                        (0, level + 1.2),
                        (-0.13, level + 1.0),
                    ]
                ),
                vary(rng, "#c03a44"),
                width=0.6,
            )
    elif "shirt" in wear or "robe" in wear or "overalls" in wear:
        for s in (-1, 1):
            c.part(
                polygon(
                    [
                        (s * 0.02, deep - 0.06),
                        (s * (neck + 0.1), level - 0.26),
                        (s * (neck + 0.34), level + 0.06),
                        (s * 0.3, deep + 0.26),
                    ]
                ),
                mix(colour, "#ffffff", 0.15),
            )
        c.outline(f"M0,{deep}V4", colour, 0.7)
        for k in range(4):
            c.draw(oval(0.06, deep + 0.35 + 0.4 * k, 0.045), mix(colour, "#ffffff", 0.7))
        if "overalls" in wear:
            c.part(
                polygon([(-wide * 0.5, deep + 0.5), (wide * 0.5, deep + 0.5), (wide * 0.7, 4.2), (-wide * 0.7, 4.2)]),
                trim,
            )
            for s in (-1, 1):
                c.stroke(f"M{s * wide * 0.42},{deep + 0.6}L{s * wide * 0.55},{level}", trim, 0.16 * c.unit)
    elif "dress" in wear and "sundress" not in wear:
        for s in (-1, 1):
            c.part(oval(s * wide * 0.98, level + 0.62, 0.4, 0.46), mix(colour, "#ffffff", 0.1))
            c.part(
                smooth([(0, middle + 0.28), (s * 0.3, level - 0.18), (s * 0.5, level + 0.02), (s * 0.34, deep + 0.12)]),
                mix(trim, "#ffffff", 0.6),
                width=0.7,
            )
        bow(c, 0, deep + 0.06, 0.22, trim)
    elif "armour" in wear or "space" in wear:
        c.part(
            (
                f"M{-neck - 0.2},{chin + 0.2}H{neck + 0.2}L{neck + 0.4},{level + 0.2}"
                f"Q0,{level + 0.5} {-neck - 0.4},{level + 0.2}Z"
            ),
            mix(colour, "#50608a", 0.25),
        )
        for s in (-1, 1):
            c.part(
                oval(s * wide * 0.86, level + 0.5, 0.5, 0.42),
                mix(colour, "#ffffff", 0.25),
                oval(s * wide * 0.86, level + 0.75, 0.5, 0.3),
            )
        c.part(star(0, level + 0.95, 0.22, 4, 0.5), trim, width=0.7)
    if rng.random() < 0.15:
        c.outline(
            f"M{-wide * 0.8},{level + 1.1}q0.1,0.6 0.06,1.4M{wide * 0.8},{level + 1.1}q-0.1,0.6 -0.06,1.4", colour, 0.8
        )


def scarf(c: Canvas, rng: random.Random, colour: str, chin: float) -> None:
    y = chin + 0.28
    c.part(smooth([(0.1, y), (0.6, y + 0.2), (0.75, y + 1.5), (0.3, y + 1.55)]), mix(colour, "#000020", 0.1))
    c.part(
        smooth(
            [(-0.62, y - 0.22), (0, y - 0.02), (0.62, y - 0.22), (0.72, y + 0.16), (0, y + 0.42), (-0.72, y + 0.16)]
        ),
        colour,
        smooth([(-0.7, y + 0.1), (0, y + 0.26), (0.7, y + 0.1), (0.7, y + 0.5), (-0.7, y + 0.5)]),
    )


def worn(c: Canvas, rng: random.Random, thing: str, colour: str, top: float, eyes: tuple) -> None:
    """A thing worn on the head.

    `top`: the hair's highest y; `eyes`: their y, x of the left, x of the right, half height.
    """
    side, (y, left, right, high) = rng.choice((-1, 1)), eyes
    if "glasses" in thing:
        r, width = min(abs(right - left) * 0.44, high * 1.35), rng.uniform(0.035, 0.08)
        flat = rng.choice((0.85, 1.0))
        for x in (left, right):
            lens = oval(x, y, r, r * flat)
            c.draw(lens, "#ffffff", 0.15)
            c.stroke(lens, colour, width * c.unit)
        c.stroke(f"M{left + r},{y}Q{(left + right) / 2},{y - 0.1} {right - r},{y}", colour, width * c.unit)
    elif "cat ears" in thing or "fox ears" in thing:
        tall = 1.0 if "fox" in thing else 0.7
        for s in (-1, 1):
            c.part(
                smooth([(s * 0.28, top + 0.22), (s * 0.66, top - tall * 0.55), (s * 1.02, top + 0.62)])
                if tall < 1
                else polygon([(s * 0.28, top + 0.25), (s * 0.8, top - 0.5), (s * 1.0, top + 0.65)]),
                colour,
            )
            c.draw(polygon([(s * 0.46, top + 0.2), (s * 0.7, top - tall * 0.26), (s * 0.88, top + 0.46)]), "#f6b8c0")
    elif "headphones" in thing:
        c.stroke(f"M-1.12,0.1C-1.2,{top * 1.45} 1.2,{top * 1.45} 1.12,0.1", mix(colour, "#ffffff", 0.2), 0.14 * c.unit)
        for s in (-1, 1):
            c.part(oval(s * 1.12, 0.22, 0.22, 0.36), colour, oval(s * 1.12, 0.45, 0.3, 0.3))
    elif "flower" in thing:
        x, z, r = side * 0.78, top + 0.62, rng.uniform(0.14, 0.2)
        for k in range(5):
            a = 1.257 * k + rng.random() * 0.1
            c.part(oval(x + r * math.cos(a), z + r * math.sin(a), r * 0.8), colour, width=0.6)
        c.draw(oval(x, z, r * 0.6), "#f8dc70")
    elif "crown" in thing:
        n, w = rng.randint(3, 5), 0.55
        tips = [
            p for k in range(n) for p in ((-w + 2 * w * k / n, top + 0.02), (-w + 2 * w * (k + 0.5) / n, top - 0.45))
        ]
        c.part(polygon([*tips, (w, top + 0.02), (w, top + 0.28), (-w, top + 0.28)]), "#f4c440")
        c.draw(oval(0, top + 0.14, 0.08), "#d84858")
    elif "beret" in thing:
        c.part(
            smooth(
                [
                    (-1.0, top + 0.45),
                    (-1.15, top + 0.05),
                    (-0.3 + side * 0.3, top - 0.4),
                    (1.05, top),
                    (1.0, top + 0.4),
                    (0, top + 0.25),
                ]
            ),
            colour,
            smooth([(-1.2, top + 0.3), (0, top + 0.1), (1.2, top + 0.3), (0, top + 0.7)]),
        )
    elif "cap" in thing:
        c.part(
            smooth(
                [
                    (-1.08, top + 0.8),
                    (-0.95, top + 0.15),
                    (0, top - 0.2),
                    (0.95, top + 0.15),
                    (1.08, top + 0.8),
                    (0, top + 0.55),
                ]
            ),
            colour,
        )
        c.part(
            smooth(
                [
                    (-0.85, top + 0.62),
                    (0, top + 0.46),
                    (0.85, top + 0.62),
                    (0.75, top + 0.86),
                    (0, top + 0.68),
                    (-0.75, top + 0.86),
                ]
            ),
            mix(colour, "#000020", 0.2),
        )
    elif "witch hat" in thing:
        c.part(
            smooth(
                [(-0.8, top + 0.35), (-0.45, top - 0.5), (side * 0.3, top - 1.25), (0.45, top - 0.5), (0.8, top + 0.35)]
            ),
            colour,
        )
        c.part(oval(0, top + 0.36, 1.5, 0.26), colour, oval(0, top + 0.5, 1.5, 0.2))
        c.draw(
            f"M-0.78,{top + 0.22}Q0,{top + 0.42} 0.78,{top + 0.22}L0.72,{top + 0.02}Q0,{top + 0.2} -0.72,{top + 0.02}Z",
            rng.choice(("#f0c048", "#c04a60", "#8860c0")),
        )
    elif "clips" in thing:
        for k in range(2):
            c.stroke(f"M{side * 0.62},{-0.42 + 0.14 * k}l{side * 0.24},{0.1}", colour, 0.08 * c.unit)
    elif "ribbon" in thing or "bow" in thing:
        bow(
            c,
            side * rng.uniform(0.5, 0.85),
            top + rng.uniform(0.2, 0.5),
            rng.uniform(0.3, 0.5),
            colour,
            side * rng.uniform(0, 0.7),
        )
    elif "earrings" in thing:
        for s in (-1, 1):
            c.part(oval(s * 1.0, 0.66, 0.09, 0.12), "#f0c850", width=0.6)
