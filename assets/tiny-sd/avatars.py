"""Drawn people for the corpus behind assets/tiny-sd: the avatars of DiceBear's designers, before flat scenes of ours.

    python assets/tiny-sd/avatars.py           # fetches the designs and renders .cache/corpus/avatars.npz

Emoji have no girls with long blue hair in front of a city, and a base that has never seen any cannot be tuned to draw
them in a new style from 30 pictures. Each avatar is drawn from attributes that we choose (hair, face, clothes, what is
worn, the place), so its caption is known. Designs, by npm package and licence: `@dicebear/avataaars` (Pablo Stanley,
free for personal and commercial use), `@dicebear/adventurer` (Lisa Wischofsky), `@dicebear/big-smile` (Ashley Seo),
`@dicebear/personas` (Draftbit), `@dicebear/toon-head` (Johan Melin): all CC BY 4.0. Needs npm, node and resvg_py.
"""

import argparse
import io
import json
import math
import random
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from corpus import BACKGROUNDS, SIZE

DESIGNS = ("adventurer", "avataaars", "big-smile", "personas", "toon-head")
VERSION = "9.4.3"
HAIR = {
    "black": "22222c 2c2433", "brown": "6a4e35 8b5a3c", "blonde": "f0c95c e8bb50", "red": "c8352f d94a3a",
    "orange": "e8853a", "pink": "f08ab8 ee7aa8", "purple": "8a4fc4 9a62cf", "blue": "3c6fd6 4a86e8",
    "green": "3fa36c 54b07a", "silver": "c8ccd8 d5d8e2", "teal": "3aa8a4",
}  # fmt: skip
CLOTHES = {
    "red": "d84a4a", "orange": "f08a3c", "yellow": "f2c94c", "green": "4fa25f", "teal": "3fa7a0", "blue": "4a7fd8",
    "dark blue": "2e3f70", "purple": "8358b8", "pink": "ee8ab0", "white": "f4f4f6", "black": "2b2b33", "gray": "8f95a0",
}  # fmt: skip
SKIN = ("ffe0c8", "f7d3b5", "f2c8a0", "e0ac80", "b98058", "8a5a3c")

# What each design calls a thing: (whose, words for the hair, the design's options).
GIRL, BOY = "a girl", "a boy"
LOOKS = {
    "avataaars": [
        (GIRL, "long {} hair", {"top": ["straight01", "straight02", "straightAndStrand", "longButNotTooLong"]}),
        (GIRL, "long wavy {} hair", {"top": ["curvy", "bigHair", "curly"]}),
        (GIRL, "a {} bob", {"top": ["bob", "miaWallace"]}),
        (GIRL, "a {} bun", {"top": ["bun"]}),
        (BOY, "short {} hair", {"top": ["shortFlat", "shortRound", "shortWaved", "theCaesar", "shaggy"]}),
        (BOY, "short curly {} hair", {"top": ["shortCurly", "frizzle"]}),
    ],
    "adventurer": [
        (GIRL, "long {} hair", {"hair": [f"long{i:02d}" for i in range(1, 27)]}),
        (BOY, "short {} hair", {"hair": [f"short{i:02d}" for i in range(1, 20)]}),
    ],
    "big-smile": [
        (GIRL, "long {} hair", {"hair": ["straightHair", "bangs"]}),
        (GIRL, "{} braids", {"hair": ["braids"]}),
        (GIRL, "a wavy {} bob", {"hair": ["wavyBob", "curlyBob"]}),
        (BOY, "short {} hair", {"hair": ["shortHair", "bowlCutHair"]}),
        (BOY, "a {} mohawk", {"hair": ["mohawk"]}),
    ],
    "personas": [
        (GIRL, "long {} hair", {"hair": ["long", "extraLong"]}),
        (GIRL, "{} twin tails", {"hair": ["pigtails"]}),
        (GIRL, "a {} bob", {"hair": ["bobCut", "bobBangs"]}),
        (GIRL, "a {} ponytail", {"hair": ["straightBun", "curlyBun"]}),
        (BOY, "short {} hair", {"hair": ["shortCombover", "fade", "buzzcut"]}),
    ],
    "toon-head": [
        (GIRL, "long {} hair", {"hair": ["sideComed", "bun"], "rearHair": ["longStraight"]}),
        (GIRL, "long wavy {} hair", {"hair": ["sideComed"], "rearHair": ["longWavy"]}),
        (GIRL, "a short {} bob", {"hair": ["sideComed"], "rearHair": ["shoulderHigh", "neckHigh"]}),
        (BOY, "spiky {} hair", {"hair": ["spiky"], "rearHairProbability": 0}),
        (BOY, "short {} hair", {"hair": ["undercut", "sideComed"], "rearHairProbability": 0}),
    ],
}  # fmt: skip
NATURAL = ["default", "defaultNatural"]
FACES = {
    "avataaars": {
        "smiling": {"eyes": ["default"], "mouth": ["smile", "twinkle"], "eyebrows": NATURAL},
        "laughing with {} eyes closed": {"eyes": ["happy"], "mouth": ["smile"], "eyebrows": NATURAL},
        "winking": {"eyes": ["wink"], "mouth": ["twinkle", "smile"], "eyebrows": NATURAL},
        "sad": {"eyes": ["default"], "mouth": ["sad", "concerned"], "eyebrows": ["sadConcernedNatural"]},
        "crying, with tears": {"eyes": ["cry"], "mouth": ["sad"], "eyebrows": ["sadConcernedNatural"]},
        "looking surprised": {"eyes": ["surprised"], "mouth": ["disbelief"], "eyebrows": ["raisedExcitedNatural"]},
        "angry": {"eyes": ["default", "squint"], "mouth": ["serious"], "eyebrows": ["angryNatural", "angry"]},
        "looking sleepy": {"eyes": ["closed"], "mouth": ["default"], "eyebrows": NATURAL},
    },
    "adventurer": {"": {}},
    "big-smile": {
        "smiling": {"eyes": ["cheery", "normal"], "mouth": ["kawaii", "teethSmile", "openedSmile"]},
        "winking": {"eyes": ["winking"], "mouth": ["openedSmile", "kawaii"]},
        "looking sleepy": {"eyes": ["sleepy"], "mouth": ["unimpressed", "kawaii"]},
        "sad": {"eyes": ["sad"], "mouth": ["openSad"]},
        "angry": {"eyes": ["angry"], "mouth": ["unimpressed", "openSad"]},
    },
    "personas": {
        "smiling": {"eyes": ["open"], "mouth": ["smile", "bigSmile", "smirk"]},
        "laughing with {} eyes closed": {"eyes": ["happy"], "mouth": ["bigSmile"]},
        "winking": {"eyes": ["wink"], "mouth": ["smile", "smirk"]},
        "sad": {"eyes": ["open"], "mouth": ["frown"]},
        "looking surprised": {"eyes": ["open"], "mouth": ["surprise"]},
        "looking sleepy": {"eyes": ["sleep"], "mouth": ["smile"]},
    },
    "toon-head": {
        "smiling": {"eyes": ["wide", "happy"], "mouth": ["smile"], "eyebrows": ["happy", "neutral"]},
        "laughing": {"eyes": ["happy"], "mouth": ["laugh"], "eyebrows": ["happy", "raised"]},
        "winking": {"eyes": ["wink"], "mouth": ["smile", "laugh"], "eyebrows": ["happy"]},
        "sad": {"eyes": ["humble", "wide"], "mouth": ["sad"], "eyebrows": ["sad"]},
        "looking surprised": {"eyes": ["wide"], "mouth": ["agape"], "eyebrows": ["raised"]},
        "angry": {"eyes": ["wide"], "mouth": ["angry"], "eyebrows": ["angry"]},
    },
}  # fmt: skip
WEAR = {
    "avataaars": {
        "a {} hoodie": {"clothing": ["hoodie"]}, "a {} t-shirt": {"clothing": ["shirtCrewNeck", "shirtVNeck"]},
        "a {} sweater": {"clothing": ["collarAndSweater"]}, "a {} jacket": {"clothing": ["blazerAndShirt"]},
        "{} overalls": {"clothing": ["overall"]},
    },
    "personas": {"a {} shirt": {"body": ["rounded", "squared", "small"]}},
    "toon-head": {
        "a {} sweater": {"clothes": ["turtleNeck"]}, "a {} jacket": {"clothes": ["openJacket"]},
        "a {} dress": {"clothes": ["dress"]}, "a {} t-shirt": {"clothes": ["tShirt"]},
        "a {} shirt": {"clothes": ["shirt"]},
    },
}  # fmt: skip
ALSO = {
    "avataaars": {"glasses": {"accessories": ["prescription02", "round"], "accessoriesProbability": 100},
                  "sunglasses": {"accessories": ["sunglasses"], "accessoriesProbability": 100}},
    "adventurer": {"glasses": {"glassesProbability": 100}},
    "big-smile": {"cat ears": {"accessories": ["catEars"], "accessoriesProbability": 100},
                  "glasses": {"accessories": ["glasses"], "accessoriesProbability": 100},
                  "a golden crown": {"accessories": ["sailormoonCrown"], "accessoriesProbability": 100}},
}  # fmt: skip
CHANCES = ("accessories", "glasses", "earrings", "features", "beard", "facialHair")
NOTHING = {f"{name}Probability": 0 for name in CHANCES}


# ------------------------------------------------------------------------------------------- scenes


def _ramp(top: tuple, bottom: tuple, side: int = 2 * SIZE) -> Image.Image:
    part = np.linspace(0, 1, side)[:, None, None]
    colours = np.array(top) * (1 - part) + np.array(bottom) * part
    return Image.fromarray(np.broadcast_to(colours, (side, side, 3)).astype(np.uint8))


def _dots(pen, rng, count: int, sizes: tuple, colour, below: int = 2 * SIZE) -> None:
    for _ in range(count):
        x, y, r = rng.randrange(2 * SIZE), rng.randrange(below), rng.uniform(*sizes)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _hills(pen, rng, height: int, colour) -> None:
    for x in range(-40, 2 * SIZE + 40, 60):
        r = rng.randint(50, 90)
        pen.ellipse((x - r, 2 * SIZE - height - rng.randint(0, 20), x + r, 2 * SIZE + 120), fill=colour)


def _houses(pen, rng, wall, light, tallest: int = 150) -> None:
    x = -rng.randint(0, 20)
    while x < 2 * SIZE:
        width, height = rng.randint(24, 48), rng.randint(50, tallest)
        pen.rectangle((x, 2 * SIZE - height, x + width, 2 * SIZE), fill=wall)
        for wx in range(x + 6, x + width - 6, 12):
            for wy in range(2 * SIZE - height + 8, 2 * SIZE, 16):
                if rng.random() < 0.6:
                    pen.rectangle((wx, wy, wx + 5, wy + 8), fill=light)
        x += width + rng.choice((0, 0, 6))


def night(rng):
    image = _ramp((18, 20, 60), (60, 50, 110))
    pen = ImageDraw.Draw(image)
    _dots(pen, rng, 40, (0.8, 2.2), (255, 250, 220))
    x, y, r = rng.randint(30, 226), rng.randint(25, 80), rng.randint(18, 34)
    pen.ellipse((x - r, y - r, x + r, y + r), fill=(250, 240, 180))
    return image


def beach(rng):
    image = _ramp((110, 190, 245), (190, 230, 250))
    pen = ImageDraw.Draw(image)
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
    pen = ImageDraw.Draw(image)
    for x in range(rng.randint(-10, 20), 256, rng.randint(34, 50)):
        pen.rectangle((x, 0, x + rng.randint(10, 18), 230), fill=rng.choice(((120, 85, 60), (105, 75, 55))))
    _dots(pen, rng, 30, (14, 30), (80, 150, 80), below=60)
    _hills(pen, rng, 20, (95, 165, 85))
    return image


def sunset(rng):
    image = _ramp((90, 60, 140), (250, 150, 110))
    pen = ImageDraw.Draw(image)
    x, r = rng.randint(40, 216), rng.randint(24, 40)
    pen.ellipse((x - r, 150 - r, x + r, 150 + r), fill=(255, 215, 130))
    _houses(pen, rng, (75, 50, 100), (255, 215, 120))
    return image


def snow(rng):
    image = _ramp((150, 185, 225), (225, 236, 248))
    pen = ImageDraw.Draw(image)
    for x in range(-20, 256, 46):
        h = rng.randint(50, 100)
        pen.polygon([(x, 226), (x + 34, 226 - h), (x + 68, 226)], fill=(120, 150, 180))
    _hills(pen, rng, 30, (245, 248, 252))
    _dots(pen, rng, 50, (2, 5), "white")
    return image


def rain(rng):
    image = _ramp((50, 60, 95), (95, 105, 140))
    pen = ImageDraw.Draw(image)
    _houses(pen, rng, (45, 50, 80), (235, 205, 130), 190)
    for _ in range(50):
        x, y, length = rng.randrange(270), rng.randrange(256), rng.randint(8, 22)
        pen.line((x, y, x - length // 4, y + length), fill=(190, 205, 235), width=1)
    return image


def blossoms(rng):
    image = _ramp((190, 220, 250), (250, 235, 240))
    pen = ImageDraw.Draw(image)
    x = rng.choice((20, 210))
    pen.polygon([(x, 256), (x + 26, 256), (x + 20, 40), (x + 6, 40)], fill=(130, 90, 90))
    for _ in range(40):
        cx, cy, r = rng.randrange(256), rng.randint(-10, 60), rng.randint(12, 26)
        pink = rng.choice(((250, 190, 210), (245, 170, 195), (255, 215, 228)))
        pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=pink)
    _dots(pen, rng, 18, (2, 4), (245, 170, 195))
    return image


def window(rng):
    image = Image.new("RGB", (256, 256), rng.choice(((240, 225, 200), (225, 210, 190), (230, 230, 220))))
    pen, left = ImageDraw.Draw(image), rng.randint(20, 120)
    pen.rectangle((left, 14, left + 130, 170), fill=(150, 205, 245), outline=(250, 248, 240), width=8)
    pen.line((left + 65, 14, left + 65, 170), fill=(250, 248, 240), width=6)
    pen.rectangle((0, 200, 256, 256), fill=(185, 140, 100))
    return image


def sparkles(rng):
    first = rng.choice(((255, 225, 235), (225, 235, 255), (255, 240, 210), (225, 250, 240)))
    image = _ramp(first, (255, 250, 250))
    pen = ImageDraw.Draw(image)
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


# ------------------------------------------------------------------------------------------ avatars


def choose(rng: random.Random) -> dict:
    """One avatar: its `design`, the `options` to draw it by, and the words for its caption."""
    design = rng.choice(DESIGNS)
    who, hair, look = rng.choice(LOOKS[design])
    face, features = rng.choice(list(FACES[design].items()))
    colour, cloth = rng.choice(list(HAIR)), rng.choice(list(CLOTHES))
    options = NOTHING | {"rearHairProbability": 100} | look | features
    options |= {"hairColor": rng.sample(HAIR[colour].split(), 1), "skinColor": [rng.choice(SKIN)]}
    options |= {name: [CLOTHES[cloth]] for name in ("clothesColor", "clothingColor")}
    worn = []
    if design in WEAR:
        words, how = rng.choice(list(WEAR[design].items()))
        worn, options = [words.format(cloth)], options | how
    if design in ALSO and rng.random() < 0.3:
        words, how = rng.choice(list(ALSO[design].items()))
        worn, options = [*worn, words], options | how
    face = face.format("her" if who == GIRL else "his")
    hair = hair.format(colour)
    return {"design": design, "options": options, "who": who, "hair": hair, "face": face, "worn": worn}


def people_caption(row: dict, variant: int, rng: random.Random) -> str:
    """One of the many wordings of an avatar's caption: what is seen, in changing order."""
    hair, face, place = f"with {row['hair']}", row["face"], row["ground"][variant]
    worn = rng.choice(("wearing ", "dressed in ")) + " and ".join(row["worn"]) if row["worn"] else ""
    parts = [p for p in (hair, face, worn) if p]
    if rng.random() < 0.4:
        rng.shuffle(parts)
    if rng.random() < 0.2:
        parts.pop(rng.randrange(len(parts)))
    text = row["who"] + (" " if parts and parts[0].startswith("with") else ", " if parts else "") + ", ".join(parts)
    if place and rng.random() < 0.2:
        text = f"{place}, {text}"
    elif place:
        text += f", {place}"
    start = rng.choice(("avatar of ", "avatar of ", "portrait of ", ""))
    return (start + text).replace(" a orange", " an orange")


def render(packages: Path, out: Path, count: int = 4000, seed: int = 0) -> None:
    """Writes `out/avatars.npz`, as `corpus.render` does: here the three pictures are each before another ground."""
    folder = packages / "dicebear"
    if not (folder / "node_modules").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text("{}")
        names = [f"@dicebear/{name}@{VERSION}" for name in ("core", *DESIGNS)]
        subprocess.run(["npm", "install", "--silent", *names], cwd=folder, check=True)
    (folder / "draw.mjs").write_text("""
import { createAvatar } from '@dicebear/core';
import { createInterface } from 'node:readline';
for await (const line of createInterface({ input: process.stdin })) {
  const { design, options } = JSON.parse(line);
  console.log(JSON.stringify(createAvatar(await import('@dicebear/' + design), options).toString()));
}
""")
    import resvg_py

    rng = random.Random(seed)
    rows = [choose(rng) for _ in range(count)]
    wanted = [{"design": r["design"], "options": r["options"] | {"seed": str(i)}} for i, r in enumerate(rows)]
    lines = "\n".join(map(json.dumps, wanted))
    drawn = subprocess.run(["node", "draw.mjs"], input=lines, cwd=folder, check=True, capture_output=True, text=True)
    pictures = []
    for row, svg in zip(rows, tqdm(drawn.stdout.splitlines(), desc="rendering avatars", mininterval=2)):
        data = resvg_py.svg_to_bytes(svg_string=json.loads(svg), width=2 * SIZE, height=2 * SIZE)
        person = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
        person = person.crop(person.getbbox())
        scale = 2 * SIZE * rng.uniform(0.82, 0.95) / max(person.size)
        person = person.resize([round(n * scale) for n in person.size], Image.Resampling.LANCZOS)
        place = ((2 * SIZE - person.width) // 2, 2 * SIZE - person.height)
        if row["design"] in ("adventurer", "big-smile"):  # heads alone
            place = (place[0], place[1] // 2)
        three, grounds = [], []
        for kind in ("plain", "scene", "scene"):
            if kind == "plain":
                ground = rng.choice(["white", *BACKGROUNDS])
                canvas = Image.new("RGB", (2 * SIZE,) * 2, BACKGROUNDS.get(ground, (255, 255, 255)))
                ground += " background"
            else:
                ground = rng.choice(list(SCENES))
                canvas = SCENES[ground](rng)
                if rng.random() < 0.3:
                    canvas = canvas.filter(ImageFilter.GaussianBlur(2))
            canvas.paste(person, place, person)
            three.append(np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS)))
            grounds.append(ground)
        pictures.append(np.stack(three))
        row |= {"style": "avatar", "ground": grounds}
        del row["options"]
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "avatars.npz", pictures=np.stack(pictures), rows=np.array([json.dumps(r) for r in rows]))
    print(f"avatars: {len(rows)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where packages and pictures go")
    parser.add_argument("--count", type=int, default=4000)
    args = parser.parse_args()
    render(args.cache / "packages", args.cache / "corpus", args.count)
