"""The emoji of the corpus behind assets/tiny-sd: fetched from npm, named, and gathered as SVG in one file.

    python assets/tiny-sd/corpus.py            # writes .cache/pack/emoji.jsonl.xz

One concept drawn by several independent designers is exactly what few-shot style tuning needs: tune on 30 pairs of a
designer that the base has never seen, and the true picture of every other prompt is there to compare with. OpenMoji and
Fluent 3D are such unseen designers: `rows_of` knows them for assets/tasks.py, and the pack leaves them out.

Packages and licences: see README.md. Needs npm.
"""

import argparse
import json
import lzma
import re
import shutil
import subprocess
import tarfile
import unicodedata
from pathlib import Path

SEEN = ("noto", "twemoji", "fluent", "noto-v1", "emojione", "emojione-v1", "fxemoji")
UNSEEN = ("openmoji", "fluent3d")
PACKAGES = {
    "openmoji": "openmoji@17.0.0", "noto": "@iconify-json/noto@1.2.9", "twemoji": "@twemoji/svg@15.0.0",
    "fluent": "@lobehub/fluent-emoji-flat@1.1.0", "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3", "emojione-v1": "@iconify-json/emojione-v1@1.2.3",
    "fxemoji": "@iconify-json/fxemoji@1.2.2", "fluent3d": "@lobehub/fluent-emoji-3d@1.1.0",
}  # fmt: skip
GROUPS = (
    "smileys-emotion", "people-body", "animals-nature", "food-drink",
    "travel-places", "activities", "objects",
)  # fmt: skip
# CLDR subgroups that are signs rather than drawings, or rows of near-identical pictures.
LEFT_OUT = {"family", "time", "transport-sign", "alphanum", "keycap", "hand-fingers-partial"}


def missing_tools() -> str | None:
    """What is missing for fetching and rendering, with the command that installs it; None where nothing is."""
    wants = []
    if shutil.which("npm") is None:
        wants.append("npm, which fetches the drawings: apt-get install npm (or nodejs.org)")
    try:
        import resvg_py  # noqa: F401
    except ImportError:
        wants.append("resvg_py, which renders SVG: pip install resvg_py")
    return "Missing:\n" + "\n".join(f"  {w}" for w in wants) if wants else None


def fetch(folder: Path, styles=SEEN) -> None:
    """Downloads the packages of the styles, and the table of names, into `folder`, where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for style in {"openmoji": None, **dict.fromkeys(styles)}:
        if (folder / style).is_dir():
            continue
        print(f"fetching {PACKAGES[style]}", flush=True)
        command = ["npm", "pack", PACKAGES[style], "--silent"]
        out = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        archive = folder / out.stdout.strip().splitlines()[-1]
        with tarfile.open(archive) as tar:
            tar.extractall(folder / f"{style}.part", filter="data")
        archive.unlink()
        (folder / f"{style}.part").rename(folder / style)


def concepts(folder: Path) -> list[dict]:
    """The emoji concepts: `hexcode`, `name`, `tags`; no skin tones, flags, clocks or signs."""
    table = json.loads((folder / "openmoji/package/data/openmoji.json").read_text())
    kept = []
    for row in table:
        if row["group"] not in GROUPS or row["subgroups"] in LEFT_OUT or row["skintone"]:
            continue
        tags = [t.strip() for t in row["tags"].split(",") if t.strip()]
        name = row["annotation"].replace(":", "").replace("“", "").replace("”", "")
        kept.append({"hexcode": row["hexcode"], "name": name, "tags": tags})
    return kept


def _squashed(name: str) -> str:
    """Lower-case letters and digits alone, without accents: "piñata" and "Pinata" are the same."""
    plain = unicodedata.normalize("NFD", name.lower())
    return re.sub(r"[^a-z0-9]", "", plain)


def _unicode_name(hexcode: str) -> str:
    """The squashed Unicode name of a single character, or nothing."""
    codes = [int(h, 16) for h in hexcode.split("-") if h != "FE0F"]
    return _squashed(unicodedata.name(chr(codes[0]), "")) if len(codes) == 1 else ""


class _Iconify:
    """The drawings of an @iconify-json package, found by a concept's name."""

    def __init__(self, package: Path):
        self.data = json.loads((package / "icons.json").read_text())
        self.names = {_squashed(n): n for n in [*self.data.get("aliases", {}), *self.data["icons"]]}

    def svg(self, concept: dict) -> str | None:
        keys = (_squashed(concept["name"]), _unicode_name(concept["hexcode"]))
        name = next((self.names[k] for k in keys if k in self.names), None)
        while name in self.data.get("aliases", {}) and name not in self.data["icons"]:
            name = self.data["aliases"][name]["parent"]
        if name is None:
            return None
        icon = self.data["icons"][name]
        width, height = (icon.get(k, self.data.get(k, 16)) for k in ("width", "height"))
        head = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {head} viewBox="0 0 {width} {height}">{icon["body"]}</svg>'


def rows_of(folder: Path, style: str) -> list[dict]:
    """The concepts that a style's designer has drawn, each with its `svg`, or the `file` of its bitmap."""
    package, rows = folder / style / "package", []
    iconify = _Iconify(package) if (package / "icons.json").is_file() else None
    for concept in concepts(folder):
        row = {"style": style, **concept}
        if iconify:
            svg = iconify.svg(concept)
        else:
            code = concept["hexcode"].lower()
            pattern = {"openmoji": "color/svg/{}.svg", "twemoji": "{}.svg", "fluent": "assets/{}.svg"}
            files = [
                package / pattern.get(style, "assets/{}.webp").format(c.upper() if style == "openmoji" else c)
                for c in (code, code.replace("-fe0f", ""))
            ]
            file = next((f for f in files if f.is_file()), None)
            if style == "fluent3d" and file:
                rows.append(row | {"file": str(file)})
                continue
            svg = file.read_text() if file else None
        if svg and "<image" not in svg:
            rows.append(row | {"svg": svg})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where packages and the pack go")
    cache = parser.parse_args().cache
    if problem := missing_tools():
        raise SystemExit(problem)
    fetch(cache / "packages")
    (cache / "pack").mkdir(parents=True, exist_ok=True)
    rows = []
    for style in SEEN:
        own = rows_of(cache / "packages", style)
        print(f"{style}: {len(own)} concepts")
        rows += own
    data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
    (cache / "pack/emoji.jsonl.xz").write_bytes(lzma.compress(data, preset=6))
    print(f"{len(rows)} drawings, {len(data) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
