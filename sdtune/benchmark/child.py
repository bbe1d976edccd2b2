"""The process of one candidate, started by `processes`: it takes turns with others, or measures itself alone."""

import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from unittest.mock import patch

import psutil
import torch

from ..bases import load
from ..inference import compare
from ..training import dataset, encoding, fit, launch
from .candidates import REFERENCE, Job, prepare
from .kernel_switches import switched_off


def take_turns(job: Job) -> None:
    """The other end of `processes.CandidateProcess`: a turn in JSON per line of stdin, its seconds per unit on stdout.

    All else that the candidate prints goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    candidate = prepare(job)
    print("ready", file=answers)
    for line in sys.stdin:
        turn = json.loads(line)
        with switched_off(turn["kernels_off"]):
            if torch.cuda.is_available():
                seconds_per_call(candidate.run)  # reserves again the memory that the others needed
            print(seconds_per_call(candidate.run, turn["units"]), file=answers)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure_alone(job: Job, started: float, result: str) -> None:
    """Measures one candidate in this process and writes what was found to the file `result`, as JSON.

    It has, in bytes beyond what the imports take, `loaded` (in use between two units of work), `peak` (the most during
    them) and `whole` (the most since the start); in seconds `imports`, `ready` (start-up), `seconds` (of each unit),
    `total`, and the parts of a start-up. Of a whole run (`finish`) of our trainer it has the times alone.

    Args:
        started: the `time.time()` at which this process was started.
    """
    found, before = {"imports": time.time() - started}, used_memory()
    with _timed_parts(found):
        if job.part == "finish" and job.name != REFERENCE:
            fit.fit(*job.configs())
        else:
            with _peak_memory() as whole:
                candidate = prepare(job)
                found["ready"] = time.time() - started
                candidate.run()  # warms up; and weights that are mapped from a file come into memory when first used
                if torch.cuda.is_available():
                    candidate.run()  # a CUDA graph is captured in the second call
            free_cached_memory()
            found["loaded"] = used_memory() - before
            with _peak_memory() as peak:
                repetitions = job.repetitions - (job.part == "finish")
                seconds = [seconds_per_call(candidate.run) for _ in range(repetitions)]
            candidate.finish()
            found |= {"seconds": seconds, "peak": peak[0] - before, "whole": max(whole + peak) - before}
    found["total"] = time.time() - started
    if os.environ.get("RANK", "0") == "0":
        Path(result).write_text(json.dumps(found))


def seconds_per_call(function: Callable[[], None], calls: int = 1) -> float:
    """Seconds of one call, the mean over so many calls."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def used_memory() -> int:
    """Bytes in use: on CUDA those that torch has reserved, since a CUDA graph's count too; else the process's."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def free_cached_memory() -> None:
    """Returns memory that is free but kept for later to the system, because it would count as used."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(AttributeError, OSError, TypeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def _peak_memory():
    """Yields a list whose only item is, after the `with`, the most bytes in use during it."""
    peak, over, cuda = [used_memory()], threading.Event(), torch.cuda.is_available()

    def watch():
        while not over.wait(0.002):
            peak[0] = max(peak[0], used_memory())

    torch.cuda.reset_peak_memory_stats() if cuda else threading.Thread(target=watch, daemon=True).start()
    yield peak
    over.set()
    peak[0] = torch.cuda.max_memory_reserved() if cuda else peak[0]


@contextmanager
def _timed_parts(seconds: dict[str, float]):
    """Within the `with`, adds the seconds of reading, of loading the base, of encoding and of previews to `seconds`."""

    def timed(name, function, *args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    parts = {"reading": (dataset, "read_splits"), "base": (load, "load_base"), "encoding": (encoding, "encode"),
             "previews": (compare, "draw_cells")}  # fmt: skip
    with ExitStack() as stack:
        for name, function in parts.items():
            stack.enter_context(patch.object(*function, partial(timed, name, getattr(*function))))
        yield


def main() -> None:
    """Runs the candidate that the only argument describes in JSON."""
    with redirect_stdout(sys.stderr):  # stdout is for answers alone
        launch.start_quietly()
    spec = json.loads(sys.argv[1])
    job = Job(**spec.pop("job"))
    measure_alone(job, **spec) if spec else take_turns(job)


if __name__ == "__main__":
    main()
