"""The tasks of the evaluation: a data set, its validation split and its held-out prompts."""

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from ..training import dataset, encoding, images
from ..training.buckets import AspectBuckets
from .methods import EvaluationError

ROOT = Path(__file__).parents[2]
TASKS = {
    "anime": ROOT / ".cache/tasks/anime",
    "openmoji": ROOT / ".cache/tasks/openmoji",
    "fluent3d": ROOT / ".cache/tasks/fluent3d",
}
# Prompts outside every task's style: of what the small base was trained on, and what users of a large one draw.
UNRELATED_PROMPTS = {
    "small": [
        "noto emoji of grinning face", "twemoji of cat face", "fluent emoji of red heart", "twemoji of penguin",
        "noto emoji of woman red hair", "twemoji of rocket", "noto emoji of rose", "fluent emoji of octopus",
        "twemoji of hamburger", "noto emoji of fox", "fluent emoji of guitar", "fluent emoji of pizza",
    ],
    "large": [
        "a bowl of ramen, food photography", "a photo of a cat on a sofa", "a lighthouse on a cliff at sunset",
        "portrait photo of an old fisherman", "an oil painting of a vase of sunflowers", "a red sports car on a road",
        "a snowy mountain behind a lake", "a cup of coffee on a wooden table", "a watercolor of a village",
        "a black and white photo of a city street", "a dog running on a beach", "a bookshelf full of old books",
    ],
}  # fmt: skip


@dataclass
class Task:
    """Pairs to train on and held-out pairs. A quarter of the former serves to choose the learning rate."""

    name: str
    folder: Path  # of this task's results
    train: list[dataset.Pair]
    test: list[dataset.Pair]
    encoded: encoding.Encoded | None = None  # the held-out pairs, once they are encoded

    @property
    def train_part(self) -> list[dataset.Pair]:
        """The three quarters of the training pairs that validation runs train on."""
        return [p for i, p in enumerate(self.train) if i % 4 != 3]

    @property
    def validation(self) -> list[dataset.Pair]:
        """The quarter of the training pairs that validation runs measure."""
        return self.train[3::4]


def read_task(source: str, output: Path, resolution: int, prompts: int) -> Task:
    """A task in `TASKS` by its name, or any folder (or hub data set) with the splits train and test.

    Raises:
        EvaluationError, DataError: if it is not there, lacks enough pairs, or cannot be used.
    """
    where = TASKS.get(source, source)
    if source in TASKS and not Path(where).is_dir():
        raise EvaluationError(f"the task {source} is not prepared yet; run: python assets/tasks.py")
    train, test = dataset.read_splits(where, AspectBuckets(resolution, square=True), log=lambda text: None)
    if len(train) < 4 or len(test) < 2:
        raise EvaluationError(
            f"{where} has {len(train)} pairs to train on and {len(test)} held-out ones (in its folder test); at least "
            "4 and 2 are needed"
        )
    name = source if source in TASKS else Path(source).name
    return Task(name, output / name, train, test[:prompts])


def write_pairs(folder: Path, pairs: list[dataset.Pair], captions: list[str], resolution: int) -> None:
    """Writes an imagefolder for the trainer, complete or not at all, also when several processes write it."""
    if folder.exists():
        return
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    part.mkdir(parents=True)
    lines = []
    for i, (pair, caption) in enumerate(zip(pairs, captions)):
        images.crop_to_shape(pair.open(), (resolution, resolution)).save(part / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": caption}) + "\n")
    (part / "metadata.jsonl").write_text("".join(lines))
    try:
        part.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(part)
