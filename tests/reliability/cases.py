"""What a case of the harness is, and what may come of it.

A case makes a bad (or odd) input and passes it through one of sdtune's real entry points. Right are two outcomes: a
result that agrees with a second, independent reading of the input, or an error of ours that names the input. All else
is a `Failure`: an exception that is not ours, a result that is silently wrong, an input file that has changed, a hang.
"""

import hashlib
import os
import random
import signal
import stat
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sdtune
from sdtune.page.errors import PageError
from sdtune.training.errors import TrainError, is_out_of_memory

SECONDS = 60  # a case that computes longer hangs; so does one that waits as long and computes nothing
OURS = (TrainError, sdtune.DataError, sdtune.BaseError, sdtune.TunerFileError, PageError)
PACKAGE = str(Path(sdtune.__file__).parent) + os.sep


class Failure(Exception):
    """What is wrong, as a sentence."""


class Hang(BaseException):
    """Raised by the alarm; no handler of ours or of a library may take it for an ordinary error."""


@dataclass(frozen=True)
class Case:
    """One input. `run` gets an empty folder and returns "refused: <message>" or "right", or raises a Failure."""

    title: str
    run: Callable[[Path], str]


@dataclass
class Outcome:
    title: str
    result: str  # "right", "refused" or "failure"
    text: str = ""


def run_case(case: Case, folder: Path) -> Outcome:
    folder.mkdir(parents=True)
    try:
        with time_limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = case.run(folder)
    except Failure as error:
        return Outcome(case.title, "failure", str(error))
    except Hang:
        return Outcome(case.title, "failure", f"it took longer than {SECONDS} s")
    except Exception as error:  # an error of the harness itself must not pass for a result
        return Outcome(case.title, "failure", f"the harness failed: {describe_traceback(error)}")
    return Outcome(case.title, text.partition(":")[0], text.partition(": ")[2])


@contextmanager
def time_limit(seconds: int):
    """A context that raises Hang after so many seconds of computing, or of waiting; a busy machine is no hang."""
    used = time.process_time()

    def raise_hang(*_):
        raise Hang

    def check_waiting(*_):
        nonlocal used
        if time.process_time() - used < 0.01 * seconds:
            raise Hang
        used = time.process_time()

    signal.signal(signal.SIGPROF, raise_hang)
    signal.signal(signal.SIGALRM, check_waiting)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def judge(
    call: Callable[[], object],
    inputs: Path | list[Path],
    names: str | list[str] = (),
    find_fault: Callable[[object], str] | None = None,
    after_refusal: Callable[[], str] | None = None,
) -> str:
    """Calls an entry point and judges what comes of it.

    Args:
        inputs: files or folders that must not change.
        names: of which an error message must contain one; none allows any message.
        find_fault: from the result to what is wrong with it; None where nothing but a refusal is right.
        after_refusal: what is wrong after an error, such as a pipeline that has changed.
    """
    inputs = [inputs] if isinstance(inputs, Path) else list(inputs)
    before = [digest(path) for path in inputs]
    try:
        result = call()
    except Exception as error:
        check_message(error, [names] if isinstance(names, str) else list(names))
        answer = f"refused: {' '.join(str(error).split())[:300]}"
        fault = after_refusal() if after_refusal else ""
    else:
        if find_fault is None:
            raise Failure("it was accepted, and nothing was said")
        fault, answer = find_fault(result), "right"
    if fault:
        raise Failure(fault)
    if [digest(path) for path in inputs] != before:
        raise Failure("an input file was changed")
    return answer


def check_message(error: Exception, names: list[str] = ()) -> None:
    """Raises a Failure unless an error is ours and names what it is about."""
    text = str(error)
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if is_out_of_memory(error):
        return  # train_anime.py and the page have one sentence for it
    if not isinstance(error, OURS) and not (isinstance(error, ValueError) and raised_in.startswith(PACKAGE)):
        raise Failure(f"not an error of ours: {describe_traceback(error)}")
    if not text.strip() or "object at 0x" in text or "Traceback" in text or len(text) > 4000:
        raise Failure(f"not a readable message: {text[:300]!r}")
    if not all(c.isprintable() or c == "\n" for c in text):
        raise Failure(f"a message with control characters: {text[:300]!r}")
    if names and not any(name in text for name in names):
        raise Failure(f"the message names none of {', '.join(names)}: {text[:300]}")


def describe_traceback(error: BaseException) -> str:
    """An exception in one line, with the last places in the code that it came through."""
    frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-5:]]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({' > '.join(frames)})"


def digest(path: Path) -> str:
    """A digest of the names and contents of all files below a path; pipes and broken links count by name."""
    found = hashlib.sha256()
    paths = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in paths:
        found.update(os.fsencode(file) + b"\0")
        if file.is_symlink():
            found.update(os.fsencode(os.readlink(file)))
        elif file.exists() and stat.S_ISREG(file.stat().st_mode):
            found.update(file.read_bytes())
    return found.hexdigest()


# ----------------------------------------------------------------------------- mutations of the bytes of a file


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(1, len(content))]


def flip_bit(content: bytes, rng: random.Random) -> bytes:
    changed, place = bytearray(content), rng.randrange(len(content))
    changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def zero_part(content: bytes, rng: random.Random) -> bytes:
    """A stretch of zeros, as a power cut leaves it."""
    start = rng.randrange(len(content))
    length = min(rng.randrange(1, 4096), len(content) - start)
    return content[:start] + bytes(length) + content[start + length :]


def remove_part(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.randrange(1, 512) :]


def insert_noise(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + rng.randbytes(rng.randrange(1, 64)) + content[start:]


def append_noise(content: bytes, rng: random.Random) -> bytes:
    return content + rng.randbytes(rng.randrange(1, 64))


def replace_all(content: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(len(content))


BYTE_MUTATIONS = (truncate, flip_bit, zero_part, remove_part, insert_noise, append_noise, replace_all)
