"""The output folder of a run: which one it is, that no other process writes to it, and that nothing in it is lost."""

import itertools
import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from .. import paths
from ..adapters import disk, tuner_file
from . import checkpoints
from .config import DEFAULT_OUTPUT, TrainConfig
from .errors import DiskFullError, TrainError

LAST_GOOD = "last-good.safetensors"  # what a run leaves whose loss was not finite
_LOCK = ".lock"


class TakenError(TrainError):
    """Another run has a folder; `fit` without a chosen one looks for the next."""


class RunFolder:
    """The output folder, locked from `claim` to the end of the `with`. The lock of a process that died is no lock.

    An error of a full disk leaves the `with` as a DiskFullError, which says what is whole and how to go on.
    """

    def __init__(self):
        self.path = Path(DEFAULT_OUTPUT)
        self._lock: FileLock | None = None

    def __enter__(self):
        return self

    def __exit__(self, _kind, error: BaseException | None, _traceback):
        self.release()
        if isinstance(error, Exception) and not isinstance(error, TrainError) and disk.is_full(error):
            raise DiskFullError(_describe_full_disk(self.path, error)) from error

    def release(self) -> None:
        """Lets other processes use the folder."""
        if self._lock:
            self._lock.release()
            self._lock = None

    def claim(self, config: TrainConfig, accelerator: Accelerator, log) -> tuple[Path, Path | None]:
        """The folder of a run, and the checkpoint that it continues from, or None; the same in all processes.

        A new run without a chosen folder gets the first free one of output/anime, output/anime-2, ...

        Raises:
            TrainError: if another process writes to the folder, if it holds what an earlier run has trained, or if
                there is nothing to resume.
        """
        answer = [None, None, None]
        if accelerator.is_main_process:
            try:
                answer[:2] = self._claim(config, log)
            except TrainError as error:
                answer[2] = str(error)
        if accelerator.num_processes > 1:
            broadcast_object_list(answer)
        folder, checkpoint, problem = answer
        if problem:
            raise TrainError(problem)
        self.path = folder
        return folder, checkpoint

    def _claim(self, config: TrainConfig, log) -> tuple[Path, Path | None]:
        if config.resume:
            folder = paths.expand(config.output) if config.output else _last_run()
            self._acquire(folder)
            return folder, checkpoints.find_checkpoint(folder, log)
        taken = ""
        for folder in [paths.expand(config.output)] if config.output else _numbered(DEFAULT_OUTPUT):
            try:
                self._acquire(folder)
                if what := describe_content(folder):
                    raise TakenError(what)
            except TakenError as error:
                self.release()
                if config.output:
                    raise
                taken = str(error).partition(". ")[0]
                continue
            if taken:
                log(f"{taken}; this run writes to {folder}")
            return folder, None

    def _acquire(self, folder: Path) -> None:
        """Locks a folder, which is made if need be, and writes into the lock which process has it."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            name = paths.show(folder)
            raise TrainError(f"the folder {name} cannot be made ({error.strerror}); give another --output") from error
        lock = FileLock(folder / _LOCK, timeout=0, mode=0o644)
        try:
            lock.acquire()
        except Timeout:
            holder = "another process"
            with suppress(OSError, ValueError, TypeError, KeyError):
                holder = f"process {json.loads((folder / _LOCK).read_text())['process']}"
            raise TakenError(
                f"{folder} is in use: {holder} trains there now. Wait until it has ended, or give another --output"
            ) from None
        except OSError as error:
            raise TrainError(f"{folder} cannot be written to ({error}); give another --output") from error
        self._lock = lock
        with suppress(OSError):  # the lock holds without it
            (folder / _LOCK).write_text(json.dumps({"process": os.getpid()}))


def read_config(folder: Path) -> TrainConfig:
    """The settings of a run as they were used, from the config.json in its output folder.

    Raises:
        TrainError: if it cannot be read.
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = content["train"]
        settings |= {k: v for k, v in content.get("resolved", {}).items() if settings.get(k) is None}
        known = {field.name for field in fields(TrainConfig)}
        settings = {k: v for k, v in {**checkpoints.BEFORE_OPTIONS, **settings}.items() if k in known}
        return TrainConfig(**settings, output=str(folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TrainError(f"{path} cannot be read ({error}); expected what a training wrote") from error


def describe_content(folder: Path) -> str:
    """What an earlier run has trained in a folder, as a sentence; empty if there is nothing that a new run may harm."""
    if finished := [n for n in (tuner_file.FILE_NAME, tuner_file.PEFT_FILE_NAME) if (folder / n).exists()]:
        what = f"{folder} holds a finished tuner, {' and '.join(finished)}"
        more = "Give another --output, or move it away, or train it further with --resume and more --steps"
    elif steps := checkpoints.list_checkpoints(folder):
        what = f"{folder} holds a run that stopped at step {checkpoints.step_of(steps[-1])}"
        more = "Continue it with --resume, or give another --output, or delete the folder"
    else:
        return ""
    return f"{what}. {more}"


def new_last_good_path(folder: Path) -> Path:
    """A path for the last good weights at which no earlier run has left its own."""
    stem, suffix = LAST_GOOD.split(".")
    names = (f"{stem}{number}.{suffix}" for number in ("", *(f"-{i}" for i in range(2, 10_000))))
    return next(folder / name for name in names if not (folder / name).exists())


def remove_leftovers(folder: Path, after: int | None) -> None:
    """Removes what belongs to no step of this run: unfinished parts, and previews.

    Args:
        after: the step from which the run continues, whose earlier previews stay; None for a new run.
    """
    for part in [*folder.glob(".*.part"), *folder.glob("previews/.*.part"), *folder.glob("checkpoints/.*.part")]:
        with suppress(OSError):
            shutil.rmtree(part) if part.is_dir() else part.unlink()
    for preview in folder.glob("previews/step-*.png"):
        if after is None or not preview.stem[5:].isdigit() or int(preview.stem[5:]) > after:
            preview.unlink()
    if after is None:
        for name in ("preview.png", "loss.png"):
            (folder / name).unlink(missing_ok=True)


def _numbered(stem: str):
    """A path and its numbered versions: output/anime, output/anime-2, ..."""
    yield Path(stem)
    yield from (Path(f"{stem}-{number}") for number in itertools.count(2))


def _last_run() -> Path:
    """The folder below the default output in which a run was started last, whether it got to a checkpoint or not.

    An earlier one is never taken for it: it may be finished, and its tuner would be trained further unasked.
    """
    default = Path(DEFAULT_OUTPUT)
    numbers = {f: f.name.removeprefix(default.name) for f in default.parent.glob(f"{default.name}*") if f.is_dir()}
    numbers = {f: int(n[1:] or 1) for f, n in numbers.items() if re.fullmatch(r"(-[1-9]\d*)?", n)}
    folders = sorted(numbers, key=numbers.get)
    if not folders:
        raise TrainError(f"nothing to resume: there is no {DEFAULT_OUTPUT}; start without --resume")
    # a new run looks into all folders before its own, so where the clock is coarse, that with the greatest number is it
    last = max(reversed(folders), key=lambda f: (f / _LOCK if (f / _LOCK).exists() else f).stat().st_mtime)
    if not checkpoints.list_checkpoints(last):
        others = [str(f) for f in folders if checkpoints.list_checkpoints(f)]
        more = f", or name another run: --output {' or '.join(others)}" if others else ""
        raise TrainError(f"nothing to resume: {last}, the last run, holds no checkpoint; start without --resume{more}")
    return last


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raises a DiskFullError if less than `needed` bytes are free on the disk of a folder."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFullError(
            f"the disk of {folder} is full: {what} needs {_megabytes(needed)}, and {_megabytes(free)} are free. "
            f"{_describe_whole(folder)}. {_advice(folder)}"
        )


def _describe_full_disk(folder: Path, error: Exception) -> str:
    name = getattr(error, "filename", None)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return (
        f"the disk of {folder} is full ({_megabytes(shutil.disk_usage(there).free)} are free now)"
        + (f": {name} could not be written" if name else "")
        + f". {_describe_whole(folder)}. {_advice(folder)}"
    )


def _advice(folder: Path) -> str:
    can_resume = checkpoints.list_checkpoints(folder)
    return "Free some space" + (", then continue with the same command and --resume" if can_resume else "")


def _describe_whole(folder: Path) -> str:
    """What of a run's results is completely there, as a sentence."""
    steps = checkpoints.list_checkpoints(folder)
    whole = [n for n in (tuner_file.FILE_NAME,) if (folder / n).exists()]
    whole += [f"the checkpoint of step {checkpoints.step_of(steps[-1])}"] if steps else []
    return f"Whole there: {' and '.join(whole)}" if whole else "Nothing was saved there yet"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
