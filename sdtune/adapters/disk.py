"""Writes files so that a reader, also after a power cut, finds the old file or the whole new one; tells a full disk."""

import errno
import os
import re
import uuid
from contextlib import contextmanager
from pathlib import Path

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
# what safetensors and PyTorch say, which raise no OSError
_FULL_TEXT = re.compile(r"No space left on device|Disk quota exceeded|unexpected pos \d+ vs|PytorchStreamWriter failed")


@contextmanager
def new_file(path: Path):
    """A context that gives the path of a part to write; at its end the part is on the disk and in its place.

    If the writing fails, the part is removed and the old file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        sync(part)
        part.replace(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file and the folders to it, atomically, also when several processes write it."""
    with new_file(path) as part:
        part.write_bytes(content)


def sync(path: Path) -> None:
    """Waits until a file, or the list of the files in a folder, is on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    number = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without fsync
            raise
    finally:
        os.close(number)


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that the disk is full or the quota used up."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL or _FULL_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
