"""The folder that the page writes to: finished trainings, added adapter files, and what single windows need."""

import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

from .png_settings import make_slug

KEEP_SECONDS = 24 * 3600  # how long the images and uploads of a window are kept


class OutputFolder:
    """The output folder. Below `.page`, which is hidden, is what belongs to single windows and is deleted after a day.

    Every image that a window may load lies in a folder with a random name, so no window can guess those of another.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.private = self.path / ".page"
        self.images = self.private / "images"  # the only folder whose files the web server hands out
        self.private.mkdir(parents=True, exist_ok=True)
        self.delete_old()

    def new_image_folder(self) -> Path:
        """A new folder for the images of one drawing."""
        self.delete_old()
        folder = self.images / secrets.token_hex(16)
        folder.mkdir(parents=True)
        return folder

    def publish(self, image: Path) -> Path:
        """A copy of an image that the web server may hand out."""
        return Path(shutil.copy(image, self.new_image_folder() / image.name))

    def new_dataset_path(self) -> Path:
        """A path for the uploaded files of one window; the folder does not exist yet."""
        return self.private / "datasets" / secrets.token_hex(16)

    def free_run_name(self, wanted: str) -> str:
        """A name, made from the wanted one, that no training run has yet."""
        stem = make_slug(wanted) or "tuner"
        return next(name for name in numbered(stem) if not (self.path / name).exists())

    def delete_old(self) -> None:
        """Deletes what windows left a day ago."""
        for folder in (*self.private.glob("images/*"), *self.private.glob("datasets/*")):
            with suppress(OSError):  # another thread has deleted it
                if folder.stat().st_mtime < time.time() - KEEP_SECONDS:
                    shutil.rmtree(folder)


def numbered(stem: str) -> list[str]:
    """A name and its numbered versions: "anime", "anime-2", ... "anime-999"."""
    return [stem, *(f"{stem}-{i}" for i in range(2, 1000))]
