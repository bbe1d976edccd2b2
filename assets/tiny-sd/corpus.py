"""The corpus behind assets/tiny-sd: emoji of several designers, rendered at 128 px, with captions.

    python assets/tiny-sd/corpus.py            # fetches and renders into .cache/corpus

One concept drawn by several independent designers is exactly what few-shot style tuning needs:
tune on 30 pairs of a designer the base has never seen, and the true picture of every other prompt
is there to compare with. OpenMoji and Fluent 3D are such unseen designers: they are rendered, but
`Corpus.seen` leaves them out and the base's training never opens them.

Sources, by package name and licence: Debian `fonts-noto-color-emoji` (OFL), npm `@twemoji/svg`
(CC-BY 4.0), npm `@lobehub/fluent-emoji-flat` and `@lobehub/fluent-emoji-3d` (MIT), npm `openmoji`
(CC-BY-SA 4.0; its table of names and tags serves all styles). Needs npm, the font, and the Python
packages resvg_py and Pillow.
"""

import argparse
import io
import json
import random
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

SIZE = 128
INNER = 120  # the emoji's box inside the picture; the rest is margin
SEEN = ("noto", "twemoji", "fluent")
UNSEEN = ("openmoji", "fluent3d")
NOTO_FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
PACKAGES = {
    "twemoji": "@twemoji/svg@15.0.0",
    "openmoji": "openmoji@17.0.0",
    "fluent": "@lobehub/fluent-emoji-flat@1.1.0",
    "fluent3d": "@lobehub/fluent-emoji-3d@1.1.0",
}
GROUPS = (
    "smileys-emotion", "people-body", "animals-nature", "food-drink",
    "travel-places", "activities", "objects",
)  # fmt: skip
# CLDR subgroups that are signs rather than drawings, or rows of near-identical pictures.
LEFT_OUT = {"family", "time", "transport-sign", "alphanum", "keycap", "hand-fingers-partial"}


def fetch(folder: Path) -> None:
    """Downloads the npm packages into `folder` (one subfolder each); does nothing where they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for style, package in PACKAGES.items():
        if (folder / style).is_dir():
            continue
        print(f"fetching {package}", flush=True)
        out = subprocess.run(
            ["npm", "pack", package, "--silent"], cwd=folder, check=True, capture_output=True, text=True
        )
        with tarfile.open(folder / out.stdout.strip().splitlines()[-1]) as tar:
            tar.extractall(folder / f"{style}.part", filter="data")
        (folder / f"{style}.part").rename(folder / style)


def concepts(folder: Path) -> list[dict]:
    """The emoji concepts: `hexcode`, `emoji`, `name`, `tags`; no skin tones, flags, clocks or signs."""
    table = json.loads((folder / "openmoji/package/data/openmoji.json").read_text())
    kept = []
    for row in table:
        if row["group"] not in GROUPS or row["subgroups"] in LEFT_OUT or row["skintone"]:
            continue
        tags = [t.strip() for t in row["tags"].split(",") if t.strip()]
        name = row["annotation"].replace(":", "").replace("“", "").replace("”", "")
        kept.append({"hexcode": row["hexcode"], "emoji": row["emoji"], "name": name, "tags": tags})
    return kept


def _fit(image: Image.Image) -> Image.Image:
    """The picture, centred in a transparent SIZE x SIZE box with the common margin."""
    image = image.convert("RGBA")
    image.thumbnail((INNER, INNER), Image.LANCZOS)
    box = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
    box.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return box


def _svg(path: Path) -> Image.Image:
    import resvg_py

    data = resvg_py.svg_to_bytes(svg_path=str(path), width=2 * INNER, height=2 * INNER)
    return Image.open(io.BytesIO(bytes(data)))


def draw(folder: Path, style: str, concept: dict, font=None) -> Image.Image | None:
    """One concept in one style as RGBA, or None where that designer has not drawn it."""
    code = concept["hexcode"].lower()
    names = (code, code.replace("-fe0f", ""))
    if style == "noto":
        canvas = Image.new("RGBA", (160, 160), (255, 255, 255, 0))
        pen = ImageDraw.Draw(canvas)
        if pen.textlength(concept["emoji"], font=font) > 150:  # not one glyph: the font lacks the sequence
            return None
        pen.text((10, 10), concept["emoji"], font=font, embedded_color=True)
        box = canvas.getbbox()
        return _fit(canvas.crop(box)) if box else None
    for name in names:
        path = {
            "twemoji": folder / f"twemoji/package/{name}.svg",
            "fluent": folder / f"fluent/package/assets/{name}.svg",
            "fluent3d": folder / f"fluent3d/package/assets/{name}.webp",
            "openmoji": folder / f"openmoji/package/color/svg/{name.upper()}.svg",
        }[style]
        if path.is_file():
            return _fit(Image.open(path) if style == "fluent3d" else _svg(path))
    return None


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


def render(folder: Path, out: Path, styles=SEEN + UNSEEN, seed: int = 0) -> None:
    """Renders every style into `out/<style>.npz`: `pictures` (n, 3, 128, 128, 3) uint8 and `rows`, JSON lines.

    The three pictures of a concept are: as drawn, on white; hues turned, on white; as drawn, on a
    coloured ground. A row holds `name`, `tags`, and for each picture the `colours` and `ground` words.
    """
    out.mkdir(parents=True, exist_ok=True)
    font = ImageFont.truetype(NOTO_FONT, 109)
    every = concepts(folder)
    for style in styles:
        rng = random.Random(f"{seed}-{style}")
        pictures, rows = [], []
        for concept in tqdm(every, desc=f"rendering {style}"):
            image = draw(folder, style, concept, font)
            if image is None:
                continue
            turned = rotate_hue(image, rng.choice((0.15, 0.3, 0.45, 0.6, 0.75, 0.85)))
            ground = rng.choice(list(BACKGROUNDS))
            shade = tuple(int(min(255, max(0, c + rng.randint(-12, 12)))) for c in BACKGROUNDS[ground])
            white = (255, 255, 255)
            three = [on_background(image, white), on_background(turned, white), on_background(image, shade)]
            pictures.append(np.stack([np.asarray(p) for p in three]))
            words = colour_words(image)
            rows.append({
                "style": style, "hexcode": concept["hexcode"], "name": concept["name"], "tags": concept["tags"],
                "colours": [words, colour_words(turned), words], "ground": [None, None, ground],
            })  # fmt: skip
        np.savez(out / f"{style}.npz", pictures=np.stack(pictures), rows=np.array([json.dumps(r) for r in rows]))
        print(f"{style}: {len(rows)} concepts")


def load(out: Path, styles=SEEN) -> tuple[np.ndarray, list[dict]]:
    """The rendered `(pictures, rows)` of some styles, in order."""
    parts = [np.load(out / f"{s}.npz") for s in styles]
    rows = [json.loads(r) for p in parts for r in p["rows"]]
    return np.concatenate([p["pictures"] for p in parts]), rows


STYLE_WORDS = {
    "noto": "noto emoji", "twemoji": "twemoji", "fluent": "fluent emoji",
    "openmoji": "openmoji", "fluent3d": "3d emoji",
}  # fmt: skip


def caption(row: dict, variant: int = 0, rng: random.Random | None = None) -> str:
    """The caption of one picture; with `rng`, one of its many wordings.

    Without `rng`: the plain prompt, e.g. "noto emoji of cat face".
    """
    text = f"{STYLE_WORDS[row['style']]} of {row['name']}"
    colours, ground = row["colours"][variant], row["ground"][variant]
    if rng is None:
        return text
    if rng.random() < 0.1 and variant == 0:
        text = row["name"]
    if colours and (variant == 1 or rng.random() < 0.25):
        text += " in " + " and ".join(colours[: rng.choice((1, 2))] if variant != 1 else colours)
    if row["tags"] and rng.random() < 0.35:
        text += ", " + ", ".join(rng.sample(row["tags"], min(len(row["tags"]), rng.choice((1, 2)))))
    if ground or rng.random() < 0.1:
        text += f", {ground or 'white'} background"
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where packages and pictures go")
    args = parser.parse_args()
    fetch(args.cache / "packages")
    render(args.cache / "packages", args.cache / "corpus")
