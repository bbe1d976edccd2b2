"""Draws a small data set of anime-style characters: 30 pictures to train on and 12 held out, each with a caption.

    python assets/anime/draw.py                             # rewrites train/ and test/ beside this file
    python assets/anime/draw.py --contact-sheet sheet.png   # and one overview of all the pictures

Every character is one row of the tables TRAIN and TEST below: the caption is made from the words of the row, and the
picture from the parametric parts in parts.py and figure.py, as SVG text that resvg renders. The test rows combine the
values of the training rows anew. The same rows give the same bytes on every run.

Needs: pip install resvg_py pillow numpy
"""

import argparse
import io
import json
import math
import random
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import resvg_py
from PIL import Image, ImageDraw

from figure import blossom, character
from parts import clip, ellipse, gradient, group, path, polygon, star

SIZE = 512
HERE = Path(__file__).resolve().parent


class Spec(NamedTuple):
    who: str
    hair_colour: str
    hair_style: str
    eyes: str
    expression: str
    outfit: str
    accessory: str
    setting: str
    fringe: str  # the last three shape the picture, but are not part of the caption
    pose: str
    gesture: str


def table(text):
    """The rows of a table whose columns are two or more spaces apart."""
    return [Spec(*re.split(r" {2,}", row)) for row in text.strip().splitlines()]


TRAIN = table("""
girl  blue    long        green   smiling    school uniform  ribbon      blossoms   classic  right        none
girl  pink    twin tails  red     laughing   hoodie          cat ears    pastel     blunt    tilt right   sleeves
boy   black   spiky       blue    smiling    school uniform  headphones  sunset     spiky    aside right  none
girl  blonde  ponytail    blue    winking    t-shirt         headphones  beach      swept    tilt left    peace left
girl  purple  wavy        golden  surprised  witch dress     witch hat   night      parted   far          none
boy   red     spiky       golden  pouting    knight armour   crown       forest     spiky    far          none
girl  brown   bob         green   shy        sweater         glasses     classroom  swept    left         sleeves
girl  silver  long        purple  sleepy     kimono          flower      snow       blunt    closer       none
girl  green   braids      brown   crying     school uniform  glasses     rain       parted   front        none
boy   blonde  tousled     green   winking    hoodie          nothing     rain       swept    right        peace right
girl  red     wavy        green   smiling    sundress        flower      beach      swept    aside right  none
girl  black   long        red     pouting    kimono          ribbon      blossoms   blunt    close        none
boy   silver  tousled     blue    surprised  space suit      nothing     night      classic  aside left   none
girl  pink    bob         purple  shy        school uniform  flower      classroom  classic  tilt left    none
girl  blue    twin tails  golden  winking    space suit      cat ears    night      swept    right        none
boy   brown   tousled     brown   laughing   sweater         scarf       snow       swept    tilt left    wave right
girl  blonde  braids      green   laughing   witch dress     witch hat   forest     parted   far left     wave right
girl  purple  ponytail    red     pouting    hoodie          headphones  sunset     classic  left         none
boy   green   spiky       red     winking    t-shirt         cat ears    pastel     spiky    tilt right   peace left
girl  brown   wavy        blue    crying     sundress        ribbon      rain       parted   closer       none
girl  silver  bob         blue    surprised  knight armour   crown       sunset     classic  aside left   none
boy   black   tousled     golden  sleepy     kimono          glasses     blossoms   swept    aside left   none
girl  pink    ponytail    brown   sleepy     sweater         scarf       snow       swept    aside left   sleeves
girl  red     twin tails  purple  surprised  school uniform  ribbon      classroom  classic  tilt left    none
boy   blue    spiky       brown   pouting    space suit      headphones  pastel     spiky    front        none
girl  green   long        golden  shy        sundress        flower      forest     classic  close        none
girl  blonde  long        purple  crying     knight armour   crown       night      parted   far left     none
boy   purple  tousled     green   laughing   witch dress     witch hat   sunset     classic  far          none
girl  black   bob         brown   smiling    hoodie          scarf       rain       blunt    close        sleeves
girl  brown   twin tails  golden  smiling    t-shirt         glasses     beach      blunt    left         peace right
""")

TEST = table("""
girl  silver  twin tails  red     smiling    school uniform  cat ears    night      blunt    tilt left    none
girl  black   ponytail    golden  laughing   kimono          flower      sunset     swept    right        sleeves
boy   blue    tousled     green   shy        sweater         glasses     snow       swept    aside right  none
girl  blonde  wavy        green   winking    sundress        ribbon      blossoms   swept    near left    peace left
girl  pink    long        blue    surprised  space suit      headphones  pastel     classic  right        none
boy   silver  spiky       red     smiling    hoodie          scarf       classroom  spiky    tilt left    wave right
girl  red     braids      brown   pouting    knight armour   crown       forest     parted   far left     none
girl  green   bob         purple  sleepy     witch dress     witch hat   rain       classic  far          wave left
girl  purple  long        blue    crying     t-shirt         cat ears    beach      parted   aside left   none
boy   brown   spiky       golden  surprised  t-shirt         nothing     blossoms   spiky    aside left   none
girl  blue    braids      purple  smiling    hoodie          headphones  snow       blunt    front        sleeves
girl  brown   ponytail    red     shy        kimono          ribbon      rain       swept    tilt left    none
""")


# --- captions ---------------------------------------------------------------------------------------------------------

HAIR_WORDS = {
    "long": "long {} hair", "wavy": "long wavy {} hair", "twin tails": "{} twin tails", "ponytail": "a {} ponytail",
    "bob": "a short {} bob", "braids": "{} braids", "spiky": "spiky {} hair", "tousled": "short tousled {} hair",
}  # fmt: skip
MOOD_WORDS = {
    "smiling": "smiling", "laughing": "laughing with {} eyes closed", "surprised": "looking surprised",
    "sleepy": "looking sleepy", "pouting": "pouting angrily", "shy": "blushing shyly", "winking": "winking",
    "crying": "sad, with tears in {} eyes",
}  # fmt: skip
OUTFIT_WORDS = {
    "school uniform": "a sailor school uniform", "kimono": "a pink kimono", "hoodie": "a teal hoodie",
    "knight armour": "knight armour with a red cape", "witch dress": "a purple witch dress",
    "t-shirt": "an orange t-shirt with a star", "sundress": "a white sundress",
    "sweater": "a purple knitted sweater", "space suit": "a white space suit",
}  # fmt: skip
BOYS_OUTFIT_WORDS = OUTFIT_WORDS | {
    "school uniform": "a dark school uniform", "kimono": "a blue kimono",
    "knight armour": "knight armour with a blue cape", "witch dress": "a purple wizard robe",
}  # fmt: skip
ACCESSORY_WORDS = {
    "ribbon": "a red ribbon", "cat ears": "cat ears", "headphones": "pink headphones", "witch hat": "a witch hat",
    "crown": "a golden crown", "glasses": "red glasses", "flower": "a pink flower in {} hair", "scarf": "a red scarf",
}  # fmt: skip
SETTING_WORDS = {
    "blossoms": "under cherry blossoms", "pastel": "in front of a pastel background with sparkles",
    "sunset": "in the city at sunset", "beach": "at the beach", "night": "under a night sky with a full moon",
    "forest": "in a green forest", "classroom": "by a classroom window", "snow": "in falling snow",
    "rain": "on a rainy street",
}  # fmt: skip


def outfit_words(spec):
    return (BOYS_OUTFIT_WORDS if spec.who == "boy" else OUTFIT_WORDS)[spec.outfit]


def caption(spec, number):
    """The words of a spec as one sentence; the number picks the order of its parts."""
    their = "her" if spec.who == "girl" else "his"
    hair = HAIR_WORDS[spec.hair_style].format(spec.hair_colour)
    looks = hair if spec.expression == "laughing" else f"{hair} and {spec.eyes} eyes"
    mood = MOOD_WORDS[spec.expression].format(their)
    outfit = outfit_words(spec)
    joint = "with" if spec.accessory == "flower" else "and"
    wears = (
        f"{outfit} {joint} {ACCESSORY_WORDS[spec.accessory].format(their)}" if spec.accessory != "nothing" else outfit
    )
    place = SETTING_WORDS[spec.setting]
    return (
        f"a {spec.who} with {looks}, {mood}, wearing {wears}, {place}, in anime style",
        f"portrait of a {spec.who} wearing {wears}, {mood}, with {looks}, {place}, in anime style",
        f"a {spec.who} {place}, {mood}, with {looks}, dressed in {wears}, in anime style",
        f"{place}, a {spec.who} with {looks}, {mood}, wearing {wears}, in anime style",
    )[number % 4]


# --- settings: each returns what lies behind the character and what floats in front of it -----------------------------


def sky(*colours):
    return gradient("sky", *colours) + f'<rect width="{SIZE}" height="{SIZE}" fill="url(#sky)"/>'


def blurred(content, name="blur"):
    return group(content, extra=f'filter="url(#{name})"')


def cloud(x, y, s, colour="#ffffff", shade="#dcebfb"):
    puffs = [(-62, 4, 26), (-32, -16, 34), (6, -30, 42), (44, -10, 34), (72, 6, 22)]
    out = "".join(ellipse(px, py, r, r, colour) for px, py, r in puffs)
    base = path("M-92 30C-92 8 -60 2 -44 16C-24 0 10 2 22 14C44 0 96 6 98 30Z", shade)
    return group(out + path("M-90 30V4H94V30Z", colour) + base, f"translate({x:.0f} {y:.0f}) scale({s:.2f})")


def floating(rng, number):
    """Random places that leave the face free."""
    places = ((rng.uniform(0, SIZE), rng.uniform(0, SIZE)) for _ in range(2 * number))
    return [(x, y) for x, y in places if math.hypot(x - 256, (y - 270) * 0.9) > 125][:number]


def blossoms(rng):
    def cluster(x, y, size, n):
        out = ""
        for tone in ("#f28fb4", "#ffb5cf", "#ffd6e4"):
            for _ in range(n):
                a, r = rng.uniform(0, 6.28), rng.uniform(0, size)
                dot = rng.uniform(0.28, 0.5) * size
                out += ellipse(x + 1.3 * r * math.cos(a), y + 0.8 * r * math.sin(a), dot, dot * 0.8, tone)
        return out

    back = sky("#a9dcff", "#dff1ff", "#fff0f4")
    back += blurred(path("M0 400C120 330 220 380 300 350S460 330 512 360V512H0Z", "#ffc9da")
                    + path("M0 440C160 400 330 430 512 400V512H0Z", "#b9e3b4"))  # fmt: skip
    side = rng.choice((1, -1))
    bark = "M-20 520C10 420 8 300 -10 200C-16 150 0 90 40 40L76 30C40 90 44 150 52 200C60 300 66 420 96 520Z"
    bark += "M20 150C90 110 190 90 330 60L330 66C200 104 100 140 40 190Z"
    tree = path(bark, "#a37080") + path("M52 200C60 300 66 420 96 520L60 520C50 420 44 300 30 200Z", "#835468")
    for x, y, size in ((20, 30, 84), (130, 24, 74), (235, 20, 70), (340, 6, 66), (30, 130, 52), (440, -6, 60)):
        tree += cluster(x, y, size, 7)
    for _ in range(14):
        tree += blossom(rng.uniform(0, 400), rng.uniform(0, 120), rng.uniform(9, 15), "#fff1f6", "#f0709c")
    back += blurred(group(tree, "" if side > 0 else "translate(512 0) scale(-1 1)"), "haze")
    petal = "M0 -9C7 -5 7 5 0 10C-7 5 -7 -5 0 -9Z"
    front = ""
    for x, y in floating(rng, 18):
        place = f"translate({x:.0f} {y:.0f}) rotate({rng.uniform(0, 360):.0f})"
        front += group(
            path(petal, rng.choice(("#ffc4d8", "#ffdbe7", "#ff9fbf"))), f"{place} scale({rng.uniform(0.7, 1.3):.2f})"
        )
    return back, front


def pastel(rng):
    one, two, dots = rng.choice((("#c9f0ea", "#e9dcff", "#ffffff"), ("#ffe9c9", "#ffd3e2", "#fffaf0"),
                                 ("#d3e6ff", "#f6dcff", "#ffffff")))  # fmt: skip
    back = sky(one, two)
    for k in range(12):
        a = k * math.pi / 6
        rays = [(256, 250), *((256 + 520 * math.cos(a + d), 250 + 520 * math.sin(a + d)) for d in (-0.13, 0.13))]
        back += path(polygon(rays), dots, extra='opacity="0.35"')
    back += ellipse(256, 250, 214, 214, "none", f'stroke="{dots}" stroke-width="16" opacity="0.8"')
    back += ellipse(256, 250, 238, 238, "none", f'stroke="{dots}" stroke-width="4" opacity="0.8"')
    front = ""
    for _ in range(22):
        a, r = rng.uniform(0, 6.28), rng.uniform(195, 330)
        tint = rng.choice(("#ffffff", "#fff3a6", "#ffb7d5", "#a8e6ff"))
        front += star(256 + r * math.cos(a), 250 + r * math.sin(a), rng.uniform(8, 24), tint, extra='opacity="0.95"')
    return back, front


def skyline(rng, base, low, high, colour, lit=None):
    """A row of buildings; with a colour for lit windows, some of them shine."""
    out, x = "", -20
    while x < SIZE:
        w, h = rng.randrange(44, 90), rng.randrange(low, high)
        out += f'<rect x="{x}" y="{base - h}" width="{w}" height="{h + 200}" fill="{colour}"/>'
        for wx in range(x + 8, x + w - 12, 16):
            for wy in range(base - h + 12, base + 10, 24):
                if lit and rng.random() < 0.4:
                    out += f'<rect x="{wx}" y="{wy}" width="8" height="12" fill="{lit}"/>'
        x += w + rng.randrange(0, 8)
    return out


def sunset(rng):
    x = rng.choice((110, 400))
    back = sky("#5f5aa8", "#c46aa8", "#ff8f7a", "#ffd48a", "#ffe9b0")
    back += blurred(ellipse(x, 250, 120, 120, "#ffe9a0", 'opacity="0.6"'), "wide") + ellipse(x, 250, 62, 62, "#fff6cf")
    for y in (60, 120, 180):
        cx = rng.uniform(80, 430)
        back += path(
            f"M{cx - 150:.0f} {y}q60 -20 130 -8q90 -16 170 10q-90 14 -170 8q-70 6 -130 -10Z",
            "#ffc2b0",
            extra='opacity="0.65"',
        )
    back += blurred(skyline(rng, 380, 70, 170, "#b0659a"), "haze")
    return back + blurred(skyline(rng, 440, 60, 190, "#6b4a8c", "#ffdf8e"), "haze"), ""


def beach(rng):
    back = sky("#4fb4f7", "#9fdcff", "#e6f8ff")
    back += cloud(rng.randrange(40, 130), 210, 1.15) + cloud(rng.randrange(380, 470), 180, 1.3)
    back += (
        gradient("sea", "#2f9be0", "#4cc7e4", "#9cecea") + '<rect y="270" width="512" height="150" fill="url(#sea)"/>'
    )
    for _ in range(16):
        x, y = rng.uniform(0, 512), rng.uniform(282, 372)
        back += path(f"M{x:.0f} {y:.0f}h{rng.uniform(20, 60):.0f}", line="#d6fbff", width=3, extra='opacity="0.8"')
    back += path("M0 396C90 372 150 404 250 388S420 378 512 396V512H0Z", "#ffffff")
    back += path("M0 410C90 386 150 418 250 402S420 392 512 410V512H0Z", "#ffe7b8")
    side = rng.choice((1, -1))
    leaves = ""
    for angle in (8, 34, 62, 96):
        leaf = path("M0 0C60 -34 140 -30 200 20C140 0 70 6 0 0Z", "#3fae78")
        leaves += group(leaf + path("M0 0C60 -20 130 -18 200 20C140 0 70 6 0 0Z", "#2f8f68"), f"rotate({angle})")
    return back + group(leaves, f"translate({256 - side * 276} -6) scale({side} 1)"), ""


def night(rng):
    x, y = rng.choice(((112, 110), (404, 104)))
    back = sky("#151a50", "#2d2f7d", "#5a4aa8", "#a078c8")
    for _ in range(60):
        r = rng.uniform(0.8, 2.4)
        back += ellipse(
            rng.uniform(0, 512), rng.uniform(0, 380), r, r, "#ffffff", f'opacity="{rng.uniform(0.4, 1):.1f}"'
        )
    for _ in range(8):
        back += star(rng.uniform(10, 500), rng.uniform(10, 320), rng.uniform(7, 13), "#fff6c9", inner=0.18)
    back += blurred(ellipse(x, y, 110, 110, "#fff3b8", 'opacity="0.45"'), "wide") + ellipse(x, y, 70, 70, "#fff5c4")
    for dx, dy, r in ((-24, -14, 15), (20, 22, 19), (16, -30, 9), (-22, 30, 8)):
        back += ellipse(x + dx, y + dy, r, r, "#f5e2a0")
    back += group(
        cloud(70, 400, 1.6, "#6a5bb8", "#5748a4") + cloud(440, 380, 1.5, "#6a5bb8", "#5748a4"), extra='opacity="0.8"'
    )
    return back + path("M0 452C90 400 150 440 240 424S400 400 512 446V512H0Z", "#2b2768"), ""


def forest(rng):
    def leaves(x, y, r, tones):
        out = ""
        for k, tone in enumerate(tones):
            for _ in range(7):
                px, py, q = (
                    x + rng.uniform(-1, 1) * r,
                    y + rng.uniform(-0.5, 0.5) * r - k * r * 0.12,
                    rng.uniform(0.3, 0.5) * r,
                )
                out += ellipse(px, py, q, q * 0.75, tone)
        return out

    back = sky("#d9f5b4", "#f4ffd6", "#c4ecae") + blurred(
        ellipse(256, 190, 170, 170, "#ffffe6", 'opacity="0.8"'), "wide"
    )
    far = "".join(path(f"M{x} -10h18l8 540h-34Z", "#b4d79c") for x in (60, 150, 236, 330, 424))
    far += "".join(leaves(x, 440, 80, ("#a5d68c", "#b8e29a")) for x in range(0, 560, 90))
    back += blurred(far, "blur")
    near = ""
    for x, lean in ((24, 14), (118, -8), (410, 10), (486, -12)):
        w = 24 if 100 < x < 420 else 40
        near += path(f"M{x - w / 2} -10H{x + w / 2}L{x + w * 0.7 + lean} 520H{x - w * 0.9 + lean}Z", "#8d6a55")
        near += path(f"M{x + w / 6} -10H{x + w / 2}L{x + w * 0.7 + lean} 520H{x + w / 6 + lean}Z", "#6e4f48")
    near += "".join(
        leaves(x, y, 74, ("#3f9160", "#5bb274", "#86cf83"))
        for x, y in (
            (0, 20),
            (100, -6),
            (200, -22),
            (310, -22),
            (410, -6),
            (505, 20),
            (0, 470),
            (110, 500),
            (400, 500),
            (505, 470),
        )
    )
    back += blurred(near, "haze")
    for x in (120, 250, 380):
        back += path(f"M{x} -10h46l-130 540h-90Z", "#ffffdc", extra='opacity="0.3"')
    front = ""
    for x, y in floating(rng, 16):
        r = rng.uniform(3, 6)
        front += ellipse(x, y, r * 2.4, r * 2.4, "#fdffb8", 'opacity="0.35"') + ellipse(x, y, r, r, "#feffe0")
    return back, front


def classroom(rng):
    shift = rng.randrange(-60, 20)
    back = '<rect width="512" height="512" fill="#f6e3c6"/><rect y="400" width="512" height="112" fill="#dcb98e"/>'
    panes = ""
    for x in (shift - 150, shift + 90, shift + 330):
        view = (
            gradient("pane", "#7cc8fb", "#d9f3ff")
            + f'<rect x="{x}" y="30" width="220" height="340" fill="url(#pane)"/>'
        )
        view += cloud(x + rng.randrange(60, 160), rng.randrange(150, 260), 0.9) + ellipse(
            x + 60, 392, 100, 60, "#93d08c"
        )
        view += ellipse(x + 190, 388, 90, 56, "#7bc07f")
        panes += clip(f"pane{x + 200}", f"M{x} 30h220v340h-220Z") + group(
            view, extra=f'clip-path="url(#pane{x + 200})"'
        )
        panes += f'<rect x="{x}" y="30" width="220" height="340" fill="none" stroke="#ffffff" stroke-width="14"/>'
        panes += path(f"M{x + 110} 30v340M{x} 130h220", line="#ffffff", width=8)
    back += blurred(panes + '<rect y="376" width="512" height="16" fill="#c99b6c"/>', "haze")
    side = rng.choice((1, -1))
    curtain = path("M-10 -10H110C96 120 120 260 74 400H-10Z", "#fff8ea")
    curtain += path("M30 -10C26 120 40 260 24 400M70 -10C62 120 82 260 54 400", line="#ecd9bb", width=7)
    back += group(curtain, f"translate({256 - side * 256} 0) scale({side} 1)")
    return back + path("M300 -10H420L220 520H60Z", "#fffbe0", extra='opacity="0.3"'), ""


def snow(rng):
    back = sky("#9fc3ea", "#cfe3f6", "#f3f8ff")
    for depth, colour in ((0, "#b6d0e8"), (1, "#8fb3d3")):
        part = ""
        for _ in range(7):
            x, s = rng.uniform(0, 512), rng.uniform(0.8, 1.3) * (1 + 0.35 * depth)
            tree = "".join(path(f"M0 {-150 + 44 * k}L{34 + 14 * k} {-76 + 44 * k}H{-34 - 14 * k}Z", colour)
                           + path(f"M0 {-150 + 44 * k}L{17 + 7 * k} {-113 + 44 * k}H{-17 - 7 * k}Z", "#ffffff")
                           for k in (2, 1, 0))  # fmt: skip
            part += group(tree, f"translate({x:.0f} 400) scale({s:.2f})")
        back += blurred(part, ("blur", "haze")[depth])
    back += path("M0 420C140 370 260 420 512 384V512H0Z", "#f7fbff")
    front = ""
    for x, y in floating(rng, 46):
        r = rng.uniform(2, 6)
        front += ellipse(x, y, r, r, "#ffffff", 'opacity="0.92"')
    near = "".join(ellipse(x, y, 13, 13, "#ffffff", 'opacity="0.8"') for x, y in floating(rng, 6))
    return back, front + blurred(near, "haze")


def rain(rng):
    back = sky("#566a94", "#8098b8", "#a9bccf")
    back += blurred(skyline(rng, 400, 120, 300, "#6d84a8", "#ffe2a0"), "blur")
    back += blurred(skyline(rng, 450, 60, 210, "#4f648c", "#ffd98a"), "haze")
    for _ in range(14):
        r = rng.uniform(14, 34)
        tint = rng.choice(("#ffd27a", "#ff9f8a", "#8fe0e6", "#f7b5e0"))
        back += ellipse(rng.uniform(0, 512), rng.uniform(160, 430), r, r, tint, 'opacity="0.42"')
    back += path("M0 436H512V512H0Z", "#5c7196")
    for x in (rng.uniform(20, 110), rng.uniform(400, 490)):
        back += path(f"M{x:.0f} 520V150q0 -26 24 -26", line="#3c4a6e", width=8) + blurred(
            ellipse(x + 30, 138, 62, 62, "#ffe3a0", 'opacity="0.55"'), "wide"
        )
        back += path(f"M{x + 14:.0f} 124h32l8 18h-48Z", "#3c4a6e") + ellipse(x + 30, 144, 17, 8, "#fff3c8")
        back += blurred(ellipse(x + 30, 478, 46, 9, "#ffe3a0", 'opacity="0.45"'), "blur")
    front = ""
    for _ in range(46):
        x, y, length = rng.uniform(0, 540), rng.uniform(-20, 500), rng.uniform(18, 44)
        front += path(
            f"M{x:.0f} {y:.0f}l{-length * 0.18:.1f} {length:.1f}", line="#e8f3ff", width=2.4, extra='opacity="0.6"'
        )
    return back, front


SETTINGS = {  # drawing, tint of the light on the character, colour and side of the rim light
    "blossoms": (blossoms, (1.0, 0.98, 0.99), "#fff4f8"),
    "pastel": (pastel, (1.0, 1.0, 1.0), "#ffffff"),
    "sunset": (sunset, (1.0, 0.94, 0.9), "#ffd98a"),
    "beach": (beach, (1.0, 1.0, 0.98), "#ffffff"),
    "night": (night, (0.95, 0.93, 1.0), "#cfd6ff"),
    "forest": (forest, (0.99, 1.0, 0.96), "#fbffcf"),
    "classroom": (classroom, (1.0, 0.99, 0.95), "#fffbe6"),
    "snow": (snow, (0.99, 0.99, 1.0), "#ffffff"),
    "rain": (rain, (0.97, 0.97, 1.0), "#dcebff"),
}


# --- pictures, files and the overview ---------------------------------------------------------------------------------


def lighting(tint, rim):
    """A filter that tints the character and lights the rim that faces the light."""
    r, g, b = tint
    return (
        '<filter id="light" filterUnits="userSpaceOnUse" x="0" y="0" width="512" height="512" '
        'color-interpolation-filters="sRGB">'
        f'<feColorMatrix values="{r} 0 0 0 0 0 {g} 0 0 0 0 0 {b} 0 0 0 0 0 1 0" result="body"/>'
        '<feMorphology in="SourceAlpha" operator="erode" radius="3" result="core"/>'
        '<feOffset in="core" dx="5" dy="5" result="moved"/>'
        f'<feFlood flood-color="{rim}" flood-opacity="0.6"/><feComposite in2="core" operator="in"/>'
        '<feComposite in2="moved" operator="out" result="rim"/>'
        '<feMerge><feMergeNode in="body"/><feMergeNode in="rim"/></feMerge></filter>'
    )


def picture(spec, seed):
    scene, tint, rim = SETTINGS[spec.setting]
    back, front = scene(random.Random(seed))
    blurs = '<filter id="soft" x="-50%" y="-50%" width="200%" height="200%"><feGaussianBlur stdDeviation="5"/></filter>'
    for name, size in (("haze", 1.6), ("blur", 4), ("wide", 22)):
        area = 'filterUnits="userSpaceOnUse" x="-40" y="-40" width="592" height="592"'
        blurs += f'<filter id="{name}" {area}><feGaussianBlur stdDeviation="{size}"/></filter>'
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIZE} {SIZE}"><defs>{blurs}{lighting(tint, rim)}</defs>'
        + back + group(character(spec), extra='filter="url(#light)"') + front + "</svg>"
    )  # fmt: skip
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
    even = [min(254, value + 1 & ~1) for value in range(256)] * 3  # smooth shades in steps of two pack much smaller
    return Image.open(io.BytesIO(png)).convert("RGB").point(even)


def check(train, test):
    """Every value of a test row occurs at least twice in train, and no combination is drawn twice."""
    for spec in test:
        for field in Spec._fields[:8]:
            assert sum(getattr(t, field) == getattr(spec, field) for t in train) >= 2, (field, spec)
        assert sum(outfit_words(t) == outfit_words(spec) for t in train) >= 2, spec
    looks = [(s.who, s.hair_colour, s.hair_style) for s in train + test]
    assert len(set(looks)) == len(looks), "two characters with the same hair"


def write(split, specs):
    """Writes one split in imagefolder layout and returns its (picture, caption) pairs."""
    folder = HERE / split
    folder.mkdir(exist_ok=True)
    rows, pairs = [], []
    for number, spec in enumerate(specs):
        name = f"{split}-{number + 1:02d}.png"
        image, text = picture(spec, f"{split}{number}"), caption(spec, number)
        image.save(folder / name, optimize=True)
        rows.append(json.dumps({"file_name": name, "text": text}) + "\n")
        pairs.append((image, text))
    (folder / "metadata.jsonl").write_text("".join(rows))
    return pairs


def contact_sheet(pairs, columns=7, cell=220):
    sheet = Image.new("RGB", (columns * cell, -(-len(pairs) // columns) * (cell + 54)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(pairs):
        x, y = i % columns * cell, i // columns * (cell + 54)
        sheet.paste(image.resize((cell - 4, cell - 4), Image.LANCZOS), (x + 2, y + 2))
        pen.multiline_text((x + 4, y + cell), "\n".join(textwrap.wrap(text, 44)), "black", font_size=9, spacing=1)
    return sheet


def main():
    parser = argparse.ArgumentParser(description="Draw the anime pictures and write their captions.")
    parser.add_argument("--contact-sheet", metavar="FILE", help="also write one labelled overview of all the pictures")
    args = parser.parse_args()
    check(TRAIN, TEST)
    pairs = write("train", TRAIN) + write("test", TEST)
    if args.contact_sheet:
        contact_sheet(pairs).save(args.contact_sheet)


if __name__ == "__main__":
    main()
