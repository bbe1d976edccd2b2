"""Prepares two tasks for `python -m sdtune.evaluation`: 30 pairs of a style that the small base has never seen, each
with 120 held-out prompts and their true pictures.

    pip install resvg_py
    python assets/tasks.py            # writes .cache/tasks/openmoji and .cache/tasks/fluent3d

The pictures are rendered by tiny-sd/corpus.py, which fetches the packages `openmoji` (CC-BY-SA 4.0) and
`@lobehub/fluent-emoji-3d` (MIT) from npm; they are not stored in the repository. Both tasks have the same concepts in
the same places, drawn at random from those that every designer has drawn: the base knows them, only the style is new.
"""

import argparse
import json
import random
import shutil
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "tiny-sd"))
from corpus import SEEN, UNSEEN, caption, fetch, load, render  # noqa: E402


def write(cache: Path, train: int = 30, test: int = 120, seed: int = 0) -> list[Path]:
    """Writes the tasks as imagefolders `cache/tasks/<style>/{train,test}` and returns these folders."""
    corpora = {style: dict(zip(*_by_concept(cache / "corpus", style))) for style in SEEN + UNSEEN}
    common = sorted(set.intersection(*map(set, corpora.values())))
    chosen = random.Random(seed).sample(common, train + test)
    folders = []
    for style in UNSEEN:
        folder = cache / "tasks" / style
        shutil.rmtree(folder, ignore_errors=True)
        for split, codes in (("train", chosen[:train]), ("test", chosen[train:])):
            (folder / split).mkdir(parents=True)
            lines = []
            for i, code in enumerate(codes):
                picture, row = corpora[style][code]
                Image.fromarray(picture).save(folder / split / f"{i:03d}.png")
                lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": caption(row)}))
            (folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        folders.append(folder)
    return folders


def _by_concept(corpus: Path, style: str) -> tuple[list[str], list[tuple]]:
    """The concepts of a style and, for each, its picture as drawn on white (128, 128, 3) and its row."""
    pictures, rows = load(corpus, (style,))
    return [row["hexcode"] for row in rows], list(zip(pictures[:, 0], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where packages, pictures and tasks go")
    cache = parser.parse_args().cache
    missing = [s for s in SEEN + UNSEEN if not (cache / "corpus" / f"{s}.npz").is_file()]
    if missing:
        fetch(cache / "packages")
        render(cache / "packages", cache / "corpus", missing)
    for folder in write(cache):
        train, test = (len(list((folder / split).glob("*.png"))) for split in ("train", "test"))
        print(f"{folder}: {train} pairs, {test} held out")


if __name__ == "__main__":
    main()
