"""train_anime.py as the harness calls it: the real `main` with flags, in this process, on a base loaded once."""

import contextlib
import copy
import functools
import io
import sys
import zlib
from pathlib import Path

import sdtune
import train_anime
from sdtune.bases import load
from sdtune.training import run_folder, setup
from sdtune.training.errors import TrainError

from .cases import Failure

SHORT = ("--steps 1 --batch_size 1 --resolution 64 --preview_steps 1 --preview_every 0 --learning_rate 1e-3 "
         "--preview_prompts waves --guidance_scale 1 --rank 1 --num_heads 1 --ops attn1").split()  # fmt: skip
_load_base, _fit = load.load_base, sdtune.fit


@functools.cache
def loaded_base():
    return _load_base("tiny-sd")


def load_base_once(base="tiny-sd", dtype=None):
    """`load_base`, which for the small base copies the one that is loaded already."""
    if base == "tiny-sd" and dtype is None:
        return copy.deepcopy(loaded_base())
    return _load_base(base) if dtype is None else _load_base(base, dtype)


def train(*flags: str, pairs_read: list | None = None) -> tuple:
    """Runs `train_anime.main` with these flags.

    Returns:
        The result of the run and the training pairs that it has read.

    Raises:
        The exception that ended the run, or a TrainError with the message of a parser.
        Failure: if the command's exit code or what it has printed does not agree with how it ended.
    """
    found = {"pairs": [], "result": None, "error": None}

    def fit(*args, **kwargs):
        try:
            found["result"] = _fit(*args, **kwargs)
        except BaseException as error:
            found["error"] = error
            raise
        return found["result"]

    def read_pairs(*args):
        found["pairs"], heldout = _read_pairs(*args)
        if pairs_read is not None:
            pairs_read.extend(found["pairs"])
        return found["pairs"], heldout

    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    _read_pairs = setup.read_pairs
    load.load_base, setup.read_pairs, sdtune.fit, sys.argv = load_base_once, read_pairs, fit, ["train_anime.py", *flags]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = train_anime.main()
    except PairsRead:
        raise
    except SystemExit as stop:
        code = stop.code
    finally:
        load.load_base, setup.read_pairs, sys.argv = _load_base, _read_pairs, argv
        del sdtune.fit
    printed = err.getvalue()
    if "Traceback" in printed or (code == 0) != (found["error"] is None and found["result"] is not None):
        raise Failure(f"train_anime.py ended with exit code {code} and printed: {printed[-300:]}")
    if code:
        raise found["error"] or TrainError(printed.strip().splitlines()[-1] if printed.strip() else "")
    return found["result"], found["pairs"]


class PairsRead(Exception):
    """Ends a run once it has read its pairs."""


def train_on(data: Path, output: Path) -> list:
    """The pairs that a run on a folder has read; of one run in eight after it has trained on them for a step."""
    flags = "--data", str(data), "--output", str(output), *SHORT
    if zlib.crc32(data.parent.name.encode()) % 8 == 0:
        return train(*flags)[1]

    def stop(*_):
        raise PairsRead

    claim, run_folder.RunFolder.claim = run_folder.RunFolder.claim, stop
    found: list = []
    try:
        train(*flags, pairs_read=found)
    except PairsRead:
        return found
    finally:
        run_folder.RunFolder.claim = claim
    raise Failure("the run ended before it had read its pairs")
