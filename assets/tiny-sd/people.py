"""The people of the corpus behind assets/tiny-sd: avatars of nine designers, drawn from attributes that we choose.

    python assets/tiny-sd/people.py            # writes .cache/pack/avatars.jsonl.xz

Emoji have no girls with long blue hair, and a base that has never seen any cannot be tuned to draw them in a new style
from 30 pictures. Each avatar is drawn from chosen attributes (hair, face, clothes, what is worn), so its caption is
known. The designers and their licences are in README.md. Needs npm and node.
"""

import argparse
import json
import lzma
import random
import subprocess
from pathlib import Path

from render import HEADS

DESIGNS = (
    "adventurer", "avataaars", "big-smile", "personas", "toon-head", "lorelei", "micah", "miniavs", "open-peeps",
)  # fmt: skip
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


def v(*numbers: int) -> list[str]:
    return [f"variant{n:02d}" for n in numbers]


def long(*numbers: int) -> list[str]:
    return [f"long{n:02d}" for n in numbers]


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
        (GIRL, "long {} hair", {"hair": long(4, 5, 7, 9)}),
        (GIRL, "long {} hair", {"hair": long(4, 5, 7, 9)}),
        (GIRL, "long wavy {} hair", {"hair": long(6, 17, 22, 24)}),
        (GIRL, "a {} bob", {"hair": long(1, 20, 26)}),
        (GIRL, "a {} bun", {"hair": long(10, 11, 12)}),
        (GIRL, "two {} buns", {"hair": long(13, 23)}),
        (GIRL, "{} twin tails", {"hair": long(14, 15)}),
        (GIRL, "a {} braid", {"hair": long(16)}),
        (GIRL, "a {} ponytail", {"hair": long(19)}),
        (GIRL, "short {} hair", {"hair": long(2, 21, 25)}),
        (GIRL, "long {} hair and flowers in it", {"hair": long(8, 18)}),
        *[(BOY, "short {} hair", {"hair": [f"short{i:02d}" for i in range(1, 20)]})] * 6,
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
        (GIRL, "a {} bun", {"hair": ["straightBun", "curlyBun"]}),
        (BOY, "short {} hair", {"hair": ["shortCombover", "fade", "buzzcut"]}),
    ],
    "toon-head": [
        (GIRL, "long {} hair", {"hair": ["sideComed", "bun"], "rearHair": ["longStraight"]}),
        (GIRL, "long wavy {} hair", {"hair": ["sideComed"], "rearHair": ["longWavy"]}),
        (GIRL, "a short {} bob", {"hair": ["sideComed"], "rearHair": ["shoulderHigh", "neckHigh"]}),
        (BOY, "spiky {} hair", {"hair": ["spiky"], "rearHairProbability": 0}),
        (BOY, "short {} hair", {"hair": ["undercut", "sideComed"], "rearHairProbability": 0}),
    ],
    "lorelei": [
        (GIRL, "long {} hair", {"hair": v(41, 40, 15, 21, 33, 13, 23)}),
        (GIRL, "long wavy {} hair", {"hair": v(35, 24, 37, 32)}),
        (GIRL, "a {} bob", {"hair": v(19, 16)}),
        (GIRL, "a {} bun", {"hair": v(46, 38, 14)}),
        (GIRL, "two {} buns", {"hair": v(26)}),
        (BOY, "short {} hair", {"hair": v(47, 28, 6, 4, 3, 2, 1, 7, 8, 12, 17, 43)}),
        (BOY, "short curly {} hair", {"hair": v(39, 5, 22, 9)}),
        (BOY, "messy {} hair", {"hair": v(20)}),
    ],
    "micah": [
        (GIRL, "long {} hair", {"hair": ["full"], "eyebrows": ["eyelashesUp"]}),
        (GIRL, "a {} bob", {"hair": ["pixie"], "eyebrows": ["eyelashesUp"]}),
        (BOY, "short {} hair", {"hair": ["fonze"], "eyebrows": ["up", "down"]}),
        (BOY, "a {} mohawk", {"hair": ["mrT"], "eyebrows": ["up", "down"]}),
    ],
    "miniavs": [
        (GIRL, "long {} hair", {"hair": ["long"]}),
        (GIRL, "a {} ponytail", {"hair": ["ponyTail"]}),
        (BOY, "short {} hair", {"hair": ["stylish", "elvis", "classic01", "classic02"]}),
        (BOY, "short curly {} hair", {"hair": ["curly"]}),
    ],
    "open-peeps": [
        (GIRL, "long black hair", {"head": ["long", "longBangs", "mediumStraight"]}),
        (GIRL, "long curly black hair", {"head": ["longCurly"]}),
        (GIRL, "a black bob", {"head": ["bangs2", "medium1", "medium2", "medium3"]}),
        (GIRL, "a black bun", {"head": ["bun2"]}),
        (GIRL, "a {} bob", {"head": ["bangs"]}),
        (GIRL, "a {} bob", {"head": ["bangs"]}),
        (GIRL, "a {} bun", {"head": ["grayBun"]}),
        (GIRL, "wavy {} hair", {"head": ["mediumBangs2"]}),
        (GIRL, "a black afro", {"head": ["afro", "longAfro"]}),
        (BOY, "a black afro", {"head": ["afro"]}),
        (BOY, "black dreadlocks", {"head": ["dreads1", "dreads2"]}),
        (BOY, "short black hair", {"head": ["short1", "short2", "short3", "short5", "pomp"]}),
        (BOY, "short {} hair", {"head": ["grayShort", "short4"]}),
        (BOY, "short {} hair", {"head": ["grayShort", "short4"]}),
        (BOY, "a {} mohawk", {"head": ["mohawk"]}),
    ],
}  # fmt: skip
NATURAL = ["default", "defaultNatural"]
MILD = v(1, 2, 3, 6, 8, 9)
PLAIN_EYES = v(24, 21, 20, 16, 14, 10, 6, 4)
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
    "lorelei": {
        "smiling": {"eyes": PLAIN_EYES, "mouth": ["happy01", "happy02", "happy05", "happy06"], "eyebrows": MILD},
        "grinning": {"eyes": PLAIN_EYES, "mouth": ["happy16", "happy07"], "eyebrows": MILD},
        "winking": {"eyes": v(18), "mouth": ["happy01", "happy05", "happy06"], "eyebrows": MILD},
        "smiling with {} eyes closed": {"eyes": v(19, 1), "mouth": ["happy01", "happy02", "happy05"], "eyebrows": MILD},
        "frowning": {"eyes": PLAIN_EYES, "mouth": ["sad05", "sad06"]},
    },
    "micah": {
        "smiling": {"eyes": ["eyes", "round"], "mouth": ["smile"]},
        "laughing": {"eyes": ["eyes", "round"], "mouth": ["laughing"]},
        "laughing with {} eyes closed": {"eyes": ["smiling"], "mouth": ["laughing"]},
        "sad": {"eyes": ["eyes", "round"], "mouth": ["sad", "frown"]},
        "looking surprised": {"eyes": ["eyes", "round"], "mouth": ["surprised"]},
    },
    "miniavs": {"smiling": {"eyes": ["normal", "happy"], "mouth": ["default"]}},
    "open-peeps": {
        "smiling": {"face": ["smile"]},
        "grinning": {"face": ["smileBig", "smileTeethGap"]},
        "laughing": {"face": ["smileLOL"]},
        "smiling with {} eyes closed": {"face": ["calm"]},
        "grinning with heart eyes": {"face": ["lovingGrin1", "lovingGrin2"]},
        "worried": {"face": ["concerned"]},
        "scared": {"face": ["fear"]},
        "angry": {"face": ["rage", "veryAngry", "angryWithFang"]},
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
    "micah": {"a {} t-shirt": {"shirt": ["crew"]}, "a {} shirt": {"shirt": ["collared"]}},
    "miniavs": {"a {} t-shirt": {"body": ["tShirt"]}, "a {} polo shirt": {"body": ["golf"]}},
    "open-peeps": {"a {} t-shirt": {}},
}  # fmt: skip
ALSO = {
    "avataaars": {"glasses": {"accessories": ["prescription02", "round"], "accessoriesProbability": 100},
                  "sunglasses": {"accessories": ["sunglasses"], "accessoriesProbability": 100}},
    "adventurer": {"glasses": {"glassesProbability": 100}},
    "big-smile": {"cat ears": {"accessories": ["catEars"], "accessoriesProbability": 100},
                  "glasses": {"accessories": ["glasses"], "accessoriesProbability": 100},
                  "a golden crown": {"accessories": ["sailormoonCrown"], "accessoriesProbability": 100}},
    "lorelei": {"glasses": {"glasses": v(1, 3, 4), "glassesProbability": 100},
                "sunglasses": {"glasses": v(2), "glassesProbability": 100}},
    "micah": {"glasses": {"glassesProbability": 100, "glassesColor": ["2b2b33"]},
              "earrings": {"earringsProbability": 100, "earringColor": ["f4c430"]}},
    "miniavs": {"glasses": {"glassesProbability": 100}},
    "open-peeps": {
        "glasses": {"accessories": ["glasses", "glasses2", "glasses3", "glasses5"], "accessoriesProbability": 100},
        "sunglasses": {"accessories": ["sunglasses", "sunglasses2"], "accessoriesProbability": 100}},
}  # fmt: skip
CHANCES = (
    "accessories", "glasses", "earrings", "features", "beard", "facialHair", "hairAccessories", "freckles", "mustache",
    "mask",
)  # fmt: skip
NOTHING = {f"{name}Probability": 0 for name in CHANCES}
SHARE = dict.fromkeys(DESIGNS[:5], 0.8) | {"lorelei": 0.75, "micah": 0.55, "miniavs": 0.35, "open-peeps": 0.55}


def choose(rng: random.Random) -> dict:
    """One avatar: its `design`, the `options` to draw it by, and the words for its caption."""
    design = rng.choices(list(SHARE), list(SHARE.values()))[0]
    who, hair, look = rng.choice(LOOKS[design])
    face, features = rng.choice(list(FACES[design].items()))
    colour, cloth = rng.choice(list(HAIR)), rng.choice(list(CLOTHES))
    options = NOTHING | {"rearHairProbability": 100} | look | features
    options |= {"hairColor": rng.sample(HAIR[colour].split(), 1), "skinColor": [rng.choice(SKIN)]}
    options |= {name: [CLOTHES[cloth]] for name in ("clothesColor", "clothingColor", "shirtColor")}
    options |= {"headContrastColor": options["hairColor"]} if design == "open-peeps" else {}
    options |= {"baseColor": options["skinColor"]} if design == "micah" else {}
    options |= {"bodyColor": [CLOTHES[cloth]]} if design == "miniavs" else {}
    worn = []
    if design in WEAR:
        words, how = rng.choice([w for w in WEAR[design].items() if who == GIRL or w[0] != "a {} dress"])
        worn, options = [words.format(cloth)], options | how
    if design in ALSO and rng.random() < 0.3:
        words, how = rng.choice(list(ALSO[design].items()))
        if words != "sunglasses" or not any(w in face for w in ("eyes", "wink", "sleepy", "tears", "surprised")):
            worn, options = [*worn, words], options | how  # sunglasses would hide what the caption says
    face = face.format("her" if who == GIRL else "his")
    hair = hair.format(colour)
    return {"design": design, "options": options, "who": who, "hair": hair, "face": face, "worn": worn}


def install(folder: Path) -> None:
    """Installs the designs into `folder` by npm, where they are not there, and writes the script that draws."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where packages and the pack go")
    parser.add_argument("--count", type=int, default=6200)
    args = parser.parse_args()
    folder = args.cache / "packages/dicebear"
    install(folder)
    rng = random.Random(1)
    rows = [choose(rng) for _ in range(args.count)]
    wanted = [{"design": r["design"], "options": r["options"] | {"seed": str(i)}} for i, r in enumerate(rows)]
    lines = "\n".join(map(json.dumps, wanted))
    drawn = subprocess.run(["node", "draw.mjs"], input=lines, cwd=folder, check=True, capture_output=True, text=True)
    lines = []
    for row, svg in zip(rows, drawn.stdout.splitlines(), strict=True):
        del row["options"]
        lines.append(json.dumps(row | {"head": row["design"] in HEADS, "svg": json.loads(svg)}))
    (args.cache / "pack").mkdir(parents=True, exist_ok=True)
    data = "".join(f"{line}\n" for line in lines).encode()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 26}]
    (args.cache / "pack/avatars.jsonl.xz").write_bytes(lzma.compress(data, filters=filters))
    print(f"{len(lines)} people, {len(data) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
