"""Prepares two tasks for `python -m sdtune.evaluation`: 30 pairs of a style that the small base has never seen, each
with 120 held-out prompts and their true pictures, at 256 px.

    pip install resvg_py
    python assets/tasks.py            # writes .cache/tasks/openmoji and .cache/tasks/fluent3d

The drawings come from the npm packages `openmoji` (CC-BY-SA 4.0) and `@lobehub/fluent-emoji-3d` (MIT); they are not
stored in the repository. Both tasks have the same concepts in the same places, drawn at random from those that every
designer has drawn: the base knows them, only the style is new.
"""

import argparse
import json
import random
import shutil
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "tiny-sd"))
from corpus import UNSEEN, fetch, missing_tools, rows_of  # noqa: E402

KNOWN = ("noto", "twemoji", "fluent")  # the base has seen a concept if these designers have drawn it


def write(cache: Path, train: int = 30, test: int = 120, seed: int = 0) -> list[Path]:
    """Writes the tasks as imagefolders `cache/tasks/<style>/{train,test}` and returns these folders."""
    import render
    from captions import caption

    drawn = {style: {r["hexcode"]: r for r in rows_of(cache / "packages", style)} for style in KNOWN + UNSEEN}
    common = sorted(set.intersection(*map(set, drawn.values())))
    chosen = random.Random(seed).sample(common, train + test)
    folders = []
    for style in UNSEEN:
        folder = cache / "tasks" / style
        shutil.rmtree(folder, ignore_errors=True)
        for split, codes in (("train", chosen[:train]), ("test", chosen[train:])):
            (folder / split).mkdir(parents=True)
            lines = []
            for i, code in enumerate(codes):
                row = drawn[style][code]
                picture, _ = render.picture(row, 0, random.Random(0))
                Image.fromarray(picture).save(folder / split / f"{i:03d}.png")
                lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": caption(row)}))
            (folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        folders.append(folder)
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where packages and tasks go")
    cache = parser.parse_args().cache
    if problem := missing_tools():
        raise SystemExit(problem)
    fetch(cache / "packages", KNOWN + UNSEEN)
    for folder in write(cache):
        train, test = (len(list((folder / split).glob("*.png"))) for split in ("train", "test"))
        print(f"{folder}: {train} pairs, {test} held out")


if __name__ == "__main__":
    main()
