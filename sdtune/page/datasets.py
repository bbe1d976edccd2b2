"""The training images that a window uploads: saved, paired with captions, checked, and kept for a training."""

import copy
import json
import secrets
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..check.before import check_set
from ..check.sheet import Card
from ..training import caption_variants, dataset, encoding
from ..training.buckets import AspectBuckets
from ..training.config import TrainConfig
from ..training.errors import DataError
from .errors import PageError
from .output_folder import OutputFolder, numbered
from .png_settings import make_slug

MAX_FILES = 1000
METADATA = "metadata.jsonl"


def _lines_of(caption: str) -> str | list[str]:
    """A caption, or a list of captions where several lines are written."""
    lines = [line.strip() for line in caption.splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else lines


@dataclass(frozen=True, eq=False)
class UploadedImages:
    """Uploaded images as pairs of file name and captions, one a line ("" if none was uploaded for it).

    `problems` keeps them from being trained on, apart from missing captions, which can be typed in the page. `notes`
    are what is good to know.
    """

    folder: Path
    pairs: list[tuple[str, str]]
    problems: list[str]
    notes: list[str]
    masks: dict[str, str]  # image -> mask, by the names of their files

    def splits(self, heldout: int = 0) -> dict[str, list[str]]:
        """The names of the images in each folder of the data set; with held-out ones these are train and test."""
        names = [name for name, _ in self.pairs]
        if not heldout:
            return {".": names}
        test = [names[int((i + 0.5) * len(names) / heldout)] for i in range(heldout)]  # spread evenly
        return {"train": [name for name in names if name not in test], "test": test}

    def metadata(self, captions: Sequence[str], heldout: int = 0) -> dict[str, str]:
        """The content of each folder's metadata.jsonl: a line for each image whose caption in the page is not empty."""
        texts = {name: caption for (name, _), caption in zip(self.pairs, captions) if caption and caption.strip()}
        return {
            split: "".join(
                json.dumps({"file_name": name, "text": _lines_of(texts[name])}, ensure_ascii=False) + "\n"
                for name in names
                if name in texts
            )
            for split, names in self.splits(heldout).items()
        }

    def write(self, folder: Path, captions: Sequence[str], heldout: int = 0) -> None:
        """Writes the images and captions as a data set into a new folder.

        Raises:
            PageError: if the images have been deleted.
        """
        if not self.folder.exists():
            raise PageError("These images were dropped more than a day ago and are deleted. Drop them again.")
        metadata = self.metadata(captions, heldout)
        for split, names in self.splits(heldout).items():
            (folder / split).mkdir(parents=True)
            for name in [*names, *(self.masks[name] for name in names if name in self.masks)]:
                shutil.copyfile(self.folder / name, folder / split / name)
            (folder / split / METADATA).write_text(metadata[split], encoding="utf-8")


class Datasets:
    """Saves, checks and keeps uploaded images. `side` is the side of the base's images in pixels."""

    def __init__(self, output: OutputFolder, tokenizer, side: int):
        self.output, self.side = output, side
        self._tokenizer, self._tokenizer_lock = copy.deepcopy(tokenizer), threading.Lock()  # it is not thread-safe

    def receive(self, files: Sequence[str | Path]) -> UploadedImages:
        """Copies uploaded images and caption files into a folder of their own, and pairs them.

        Raises:
            PageError: if there are more than MAX_FILES, or the disk is nearly full.
        """
        if len(files) > MAX_FILES:
            raise PageError(
                f"{len(files)} files were dropped; at most {MAX_FILES} are allowed here. "
                "For more, run train_anime.py with --data in a shell."
            )
        # they are copied here, once more while they are checked, and a third time to be trained on
        self.output.require_space(3 * sum(Path(file).stat().st_size for file in files), "These images")
        folder = self.output.new_dataset_path()
        folder.mkdir(parents=True)
        problems, caption_problems, notes = [], [], []
        for file in map(Path, files):
            name = file.name.lstrip(".") or "unnamed"
            if (folder / name).exists():
                problems.append(f"{name}: two files with this name were dropped; rename one of them")
            else:
                shutil.copyfile(file, folder / name)
        images = dataset.match_captions(folder, dataset.list_files(folder, problems), caption_problems, notes)
        missing = tuple(
            f"{image.name}: no caption" for image in images if not image.captions
        )  # to be typed in the page
        problems += [line for line in caption_problems if not line.startswith(missing)]
        pairs = [(image.name, "\n".join(image.captions or ())) for image in images]
        return UploadedImages(folder, pairs, problems, notes, {i.name: i.mask.name for i in images if i.mask})

    def check(
        self, uploaded: UploadedImages, captions: Sequence[str], config: TrainConfig | None = None
    ) -> tuple[list[str], list[str]]:
        """Checks images and captions as a training would.

        Args:
            config: of the training; by default the default one.

        Returns:
            The problems that prevent a training, and the notes; each a list of lines that name a file.
        """
        missing = [name for (name, _), caption in zip(uploaded.pairs, captions) if not (caption or "").strip()]
        problems = [*uploaded.problems, *(f"{name}: has no caption yet; type one next to it" for name in missing)]
        notes, config = list(uploaded.notes), config or TrainConfig()
        buckets = AspectBuckets(config.resolution or self.side, config.square)
        try:
            with self._written(uploaded, captions) as folder:
                pairs = dataset.read_pairs(folder, buckets, log=notes.append)
            texts = caption_variants.training_texts(pairs, config)
            with self._tokenizer_lock:
                too_long = encoding.truncated_texts([p.name for p in pairs], texts, self._tokenizer, config.max_tokens)
            if too_long:
                notes.append(f"the text encoder does not read the end of long captions: {', '.join(too_long[:5])}")
        except DataError as error:
            problems += error.problems
        return problems, list(dict.fromkeys(notes))

    def look_through(
        self, uploaded: UploadedImages, captions: Sequence[str], buckets: AspectBuckets
    ) -> tuple[list[str], list[Card]]:
        """What is worth a look in images that can be trained on: sentences about all, and a card for each.

        Raises:
            DataError: with every problem that prevents a training.
        """
        with self._written(uploaded, captions) as folder:
            report = check_set(str(folder), buckets)
        return report.lines, report.cards

    @contextmanager
    def _written(self, uploaded: UploadedImages, captions: Sequence[str]) -> Iterator[Path]:
        """A context that gives a folder with the images and captions; those without one get a placeholder."""
        folder = self.output.new_dataset_path()
        try:
            uploaded.write(folder, [c if (c or "").strip() else "no caption" for c in captions])
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def folder_for(self, uploaded: UploadedImages | None, captions: Sequence[str], name: str, heldout: int = 0) -> Path:
        """The folder in which these images and captions are kept, now or later; the same for the same content.

        Args:
            heldout: how many images are not trained on.

        Raises:
            PageError: if no image would be left to train on, or there are too many folders of this name.
        """
        data = self.output.path / "data"
        if uploaded is None:
            return data / "…"
        if not 0 <= heldout < max(1, len(uploaded.pairs)):
            raise PageError(
                f"{heldout} images cannot be held out of {len(uploaded.pairs)}; hold out 0, or fewer than there are."
            )
        stem = f"{make_slug(name) or 'images'}-{uploaded.folder.name[:6]}"
        for folder in (data / n for n in numbered(stem)):
            metadata = uploaded.metadata(captions, heldout)
            if not folder.exists() or all(_read(folder / s / METADATA) == text for s, text in metadata.items()):
                return folder
        raise PageError(f"There are already 999 data sets named {stem}. Choose another name.")

    def keep(self, uploaded: UploadedImages, captions: Sequence[str], folder: str | Path, heldout: int = 0) -> None:
        """Writes checked images and captions into the folder that a training reads."""
        folder = Path(folder)
        if not folder.exists():
            part = folder.with_name(f".{secrets.token_hex(8)}.part")
            try:
                uploaded.write(part, captions, heldout)
                part.rename(folder)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None
