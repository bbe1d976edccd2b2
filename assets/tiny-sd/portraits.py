"""Drawn faces for the corpus behind assets/tiny-sd: large-eyed, cel-shaded people, a different style in every picture.

    python assets/tiny-sd/portraits.py --sheet sheet.png --count 48     # a contact sheet to look at

A number gives a picture and the words of its caption. Proportions, kinds of eyes, line weights (none to thick), shading
(flat, two-tone, gradient), palettes, hair, expressions, tilt and turn of the head, clothes, things worn and places are
all drawn at random, so no one style prevails. The anime pairs of assets/anime are another program's, and their style is
held out: no code, construction or palette of it is used here. Needs resvg_py.
"""

import argparse
import io
import random
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from drawn import clothes
from drawn.canvas import Canvas, mix, oval, smooth, vary
from drawn.faces import Head, draw_blush, draw_brows, draw_eye, draw_mouth, draw_nose, draw_tear, eye_style
from drawn.grounds import PLACES, PLAIN, ground
from drawn.hair import back_hair, braids, front_hair

SIZE = 256
HAIR = {
    "black": "#2c2a36", "brown": "#7a5238", "blonde": "#f0cc66", "red": "#c43c34", "orange": "#ea8440",
    "pink": "#f294b8", "purple": "#8e5cc6", "blue": "#467ede", "green": "#48a872", "silver": "#cfd3de",
    "teal": "#3fb0a8", "white": "#f2f0ee",
}  # fmt: skip
EYES = {
    "blue": "#3f7fe0", "green": "#3fa65c", "brown": "#86563a", "red": "#cc3a40", "purple": "#8250c4",
    "golden": "#e0a62e", "gray": "#7c8898", "pink": "#e870a0", "teal": "#2fa49e",
}  # fmt: skip
SKIN = ("#ffe8d8", "#fde0cc", "#fbdcc4", "#f8d2b4", "#f0c29c", "#dca478", "#b07a50", "#865638")
FORMS = {
    "a girl": {
        "long {} hair": 5, "long wavy {} hair": 3, "a short {} bob": 3, "a {} bob": 2, "{} twin tails": 4,
        "a {} ponytail": 3, "{} braids": 3, "a {} bun": 1, "two {} buns": 1, "short {} hair": 1, "curly {} hair": 1,
    },
    "a boy": {
        "short {} hair": 3, "spiky {} hair": 4, "short tousled {} hair": 4, "long {} hair": 1, "curly {} hair": 1,
        "messy {} hair": 1,
    },
}  # fmt: skip
# Words: (kind of eyes, brows' angle and height, mouths).
FACES = {
    "smiling": ("open", (0, 0), ("smile", "smile", "grin", "cat", "small")),
    "laughing": ("open", (0.05, 0.08), ("laugh", "grin")),
    "laughing with {} eyes closed": ("happy", (0.05, 0.06), ("laugh", "laugh", "grin")),
    "smiling with {} eyes closed": ("happy", (0.05, 0.04), ("smile", "cat")),
    "winking": ("wink", (0, 0.04), ("smile", "laugh", "grin", "cat")),
    "sad": ("open", (-0.3, 0), ("frown", "wave", "small")),
    "sad, with tears in {} eyes": ("open", (-0.32, 0), ("frown", "wave", "small", "oh")),
    "looking surprised": ("wide", (0.05, 0.14), ("oh", "oh", "small")),
    "angry": ("angry", (0.35, -0.06), ("frown", "teeth", "wave")),
    "pouting angrily": ("angry", (0.3, -0.04), ("frown", "pout", "wave")),
    "blushing shyly": ("open", (-0.15, 0.02), ("small", "wave", "smile", "cat")),
    "looking sleepy": ("half", (-0.05, 0.05), ("small", "flat", "oh")),
    "calm": ("open", (0, 0), ("flat", "small")),
}
SHARES = (6, 2, 3, 1, 3, 2, 2, 3, 2, 2, 2, 2, 2)


def choose(rng: random.Random) -> dict:
    """What is in a picture: `who`, `hair`, `face`, `worn`, `ground`, as captions name them, and how to `draw` it."""
    who = rng.choices(("a girl", "a boy"), (3, 2))[0]
    form = rng.choices(list(FORMS[who]), list(FORMS[who].values()))[0]
    her = "her" if who == "a girl" else "his"
    colour, iris, cloth, thing_colour = (rng.choice(list(d)) for d in (HAIR, EYES, clothes.CLOTHES, clothes.CLOTHES))
    face = rng.choices(list(FACES), SHARES)[0]
    hair = form.format(colour)
    if FACES[face][0] != "happy" and rng.random() < 0.85:
        hair += f" and {iris} eyes"
    wear = rng.choice([w for w in clothes.WEAR if who == "a girl" or "dress" not in w])
    things = [rng.choice(clothes.ALSO)] if rng.random() < 0.45 else []
    if who == "a boy" or "buns" in form:
        things = [t for t in things if not any(w in t for w in ("bow", "ribbon", "flower", "clips", "earrings"))]
    words = [wear.format(cloth), *(t.format(thing_colour, her=her) for t in things)]
    place = rng.choice(list(PLACES)) if rng.random() < 0.62 else rng.choice(list(PLAIN)) + " background"
    return {
        "style": "portrait", "who": who, "hair": hair, "face": face.format(her), "worn": words, "ground": [place],
        "draw": {"form": form, "hair": colour, "iris": iris, "cloth": cloth, "thing_colour": thing_colour,
                 "face": face, "wear": wear, "things": things},
    }  # fmt: skip


def svg(row: dict, rng: random.Random) -> str:
    """The drawing of what `choose` chose."""
    what, boy = row["draw"], row["who"] == "a boy"
    line = rng.choice((0, 0, 0.8, 1.2, 1.6, 2.0, 2.6, 3.4))
    ink = rng.choice((None, None, None, "#1a1418", "#3a2420", "#2a2450", "#5a3040"))
    c = Canvas(line, ink, rng.choices(("flat", "two-tone", "gradient"), (3, 5, 2))[0], rng.choice((-1, 1)))
    ground(c, rng, row["ground"][0])
    head = Head(rng, boy)
    hair, iris = vary(rng, HAIR[what["hair"]]), vary(rng, EYES[what["iris"]])
    cloth, extra = vary(rng, clothes.CLOTHES[what["cloth"]]), vary(rng, clothes.CLOTHES[what["thing_colour"]], 0.5)
    skin = vary(rng, rng.choices(SKIN, (3, 3, 3, 3, 2, 1, 1, 1))[0], 0.4)
    unit, x, y = rng.uniform(48, 72), 128 + rng.gauss(0, 9), rng.uniform(106, 130)
    tilt = rng.choice((0, rng.uniform(-5, 5), rng.uniform(-14, 14)))
    hat = next((t for t in what["things"] if any(k in t for k in ("hat", "crown", "ears", "beret", "cap"))), None)
    if hat and "witch" in hat:
        y, unit = y + 18, unit * 0.88
    c.group(x, y, unit, tilt * 0.7)
    back_hair(c, rng, head, what["form"], hair)
    c.end()
    c.group(x, y, unit, 0)
    clothes.body(c, rng, what["wear"], cloth, skin, boy, head.chin)
    if any("scarf" in t for t in what["things"]):
        clothes.scarf(c, rng, extra, head.chin)
    c.end()
    c.group(x, y, unit, tilt)
    if boy or rng.random() < 0.5:
        for s in (-1, 1):
            c.skin(oval(s * 0.98, 0.28, 0.16, 0.24), skin)
    face = head.outline()
    dim = [(-0.5, -1.2), (-0.8, 0.1), (-0.55, 0.7), (0.1, head.chin + 0.02), (-0.3, 2), (-1.6, 1.0), (-1.6, -1)]
    c.skin(face, skin, smooth([(x * c.light, y) for x, y in dim]) if rng.random() < 0.7 else None)
    name = c.clip(face)
    draw_blush(c, rng, head, "blush" in row["face"], name)
    dark = rng.choice((mix(hair, "#181020", 0.75), "#221820", ink or "#2c1c24"))
    kind, (angle, height), mouths = FACES[what["face"]]
    style, shut = eye_style(rng, boy), rng.choice((-1, 1))
    for s in (-1, 1):
        own = kind if kind != "wink" else (rng.choice(("happy", "shut")) if s == shut else "open")
        draw_eye(c, style, head, s, own, iris, dark, skin)
        if "tears" in row["face"]:
            draw_tear(c, rng, head, s)
    mouth_ink = mix(skin, "#601828", rng.uniform(0.6, 0.95))
    draw_mouth(c, rng, head, rng.choice(mouths), mouth_ink, rng.choice((1.2, 1.6, 2.2)))
    draw_nose(c, rng, head, mouth_ink, skin)
    brow = mix(hair, "#000000", 0.3) if rng.random() < 0.6 else dark
    over, thick = rng.random() < 0.6, rng.choice((1.2, 1.8, 2.6, 3.6)) * (1.2 if boy else 1)
    if not over:
        draw_brows(c, head, angle, height, brow, thick)
    front_hair(c, rng, head, what["form"], hair, skin, name)
    if over:
        draw_brows(c, head, angle, height, brow, thick)
    if "braids" in what["form"]:
        braids(c, rng, head, hair)
    eyes = (head.eye_y, head.eye(-1)[0], head.eye(1)[0], head.eye_h)
    for thing in what["things"]:
        own = extra
        if "cat" in thing:
            own = vary(rng, rng.choice((hair, "#3a3040", "#f4f0ec")))
        elif "fox" in thing:
            own = vary(rng, "#e08a48")
        elif "witch" in thing and rng.random() < 0.5:
            own = "#34264e"
        clothes.worn(c, rng, thing, own, head.top, eyes)
    c.end()
    return c.svg()


def picture(number: int) -> tuple[np.ndarray, dict]:
    """The picture of a number, uint8 (256, 256, 3), and its row for `captions.py`."""
    rng = random.Random(f"portrait-{number}")
    row = choose(rng)
    data = resvg_py.svg_to_bytes(svg_string=svg(row, rng), width=SIZE, height=SIZE, skip_system_fonts=True)
    image = np.array(Image.open(io.BytesIO(bytes(data))).convert("RGB"))
    return image, {k: v for k, v in row.items() if k != "draw"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sheet", type=Path, required=True, help="where the contact sheet goes")
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--start", type=int, default=0)
    args = parser.parse_args()
    images = [picture(i)[0] for i in range(args.start, args.start + args.count)]
    rows = [np.concatenate(images[i : i + 8], 1) for i in range(0, len(images) // 8 * 8, 8)]
    Image.fromarray(np.concatenate(rows)).save(args.sheet)


if __name__ == "__main__":
    main()
