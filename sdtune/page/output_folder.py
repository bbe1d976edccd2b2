"""The folder that the page writes to: finished trainings, added adapter files, and what single windows need."""

import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

from .errors import PageError
from .png_settings import make_slug

KEEP_SECONDS = 24 * 3600  # how long the images and uploads of a window are kept
RESERVE = 1_000_000_000  # bytes that the page leaves free on the disk
OWN_NAMES = ("data", "hub", "uploads")  # folders of the page itself, which no training may be named after


class OutputFolder:
    """The output folder. Below `.page`, which is hidden, is what belongs to single windows and is deleted after a day.

    Every image that a window may load lies in a folder with a random name, so no window can guess those of another.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.private = self.path / ".page"
        self.images = self.private / "images"  # whose files the web server hands out, as it does a window's own uploads
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
        free = (n for n in numbered(stem) if n.lower() not in OWN_NAMES and not (self.path / n).exists())
        return next(free)

    def require_space(self, needed: float, what: str) -> None:
        """Raises a PageError unless `needed` bytes are free on the disk, and RESERVE after them.

        To be called before anything is written or queued: a request may not fill the disk.
        """
        free = shutil.disk_usage(self.path).free
        if needed + RESERVE > free:
            raise PageError(
                f"{what} needs about {_gigabytes(needed)}, and the disk of the page's output folder has "
                f"{_gigabytes(free)} free, of which {_gigabytes(RESERVE)} are kept. Ask for less, or free some space."
            )

    def delete_old(self) -> None:
        """Deletes what windows left a day ago."""
        for folder in (*self.private.glob("images/*"), *self.private.glob("datasets/*")):
            with suppress(OSError):  # another thread has deleted it
                if folder.stat().st_mtime < time.time() - KEEP_SECONDS:
                    shutil.rmtree(folder)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"


def numbered(stem: str) -> list[str]:
    """A name and its numbered versions: "anime", "anime-2", ... "anime-999"."""
    return [stem, *(f"{stem}-{i}" for i in range(2, 1000))]
