"""Prepares the tasks of `python -m sdtune.evaluation`: 30 pairs of a style that the small base has never seen, each
with held-out prompts and their true pictures.

    pip install resvg_py
    python assets/tasks.py            # writes .cache/tasks/anime, .cache/tasks/openmoji and .cache/tasks/fluent3d

- anime: the pairs of `assets/anime`, and 36 more held-out characters by the same program, which recombine the values of
  the training characters at random; 48 in all, since 12 are too few to tell methods apart.
- openmoji, fluent3d: 120 held-out emoji at 256 px. The drawings come from the npm packages `openmoji` (CC-BY-SA 4.0)
  and `@lobehub/fluent-emoji-3d` (MIT); they are not stored in the repository. Both tasks have the same concepts in the
  same places, drawn at random from those that every designer has drawn: the base knows them, only the style is new.
"""

import argparse
import json
import random
import shutil
import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "tiny-sd"), str(HERE / "anime")]
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


def write_anime(cache: Path, more: int = 36, seed: int = 0) -> Path:
    """Writes `cache/tasks/anime`: the pairs of assets/anime with `more` held-out characters; returns this folder."""
    import draw

    folder, rng = cache / "tasks/anime", random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(HERE / "anime/train", folder / "train")
    shutil.copytree(HERE / "anime/test", folder / "test")
    with open(folder / "test/metadata.jsonl", "a") as lines:
        for number in range(len(draw.TEST), len(draw.TEST) + more):
            like = rng.choice(draw.TRAIN)  # gives who it is, and what belongs to this: hair style, pose and gesture
            pick = [getattr(rng.choice(draw.TRAIN), field) for field in draw.Spec._fields]
            spec = draw.Spec(*pick)._replace(
                who=like.who, hair_style=like.hair_style, fringe=like.fringe, pose=like.pose, gesture=like.gesture,
                outfit=rng.choice([row.outfit for row in draw.TRAIN if row.who == like.who]),
            )  # fmt: skip
            name = f"test-{number + 1:02d}.png"
            draw.picture(spec, f"test{number}").save(folder / "test" / name)
            lines.write(json.dumps({"file_name": name, "text": draw.caption(spec, number)}) + "\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where packages and tasks go")
    cache = parser.parse_args().cache
    if problem := missing_tools():
        raise SystemExit(problem)
    fetch(cache / "packages", KNOWN + UNSEEN)
    for folder in (write_anime(cache), *write(cache)):
        train, test = (len(list((folder / split).glob("*.png"))) for split in ("train", "test"))
        print(f"{folder}: {train} pairs, {test} held out")


if __name__ == "__main__":
    main()
