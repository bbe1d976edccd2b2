"""Candidates in processes of their own: by turns, or one alone. The other end of each process is `child`."""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from ..kernels.cpu import heap
from .candidates import REFERENCE, Job


def log(text: str) -> None:
    """Prints progress to stderr, because stdout has the report alone."""
    print(text, file=sys.stderr, flush=True)


def alternate(turns: Mapping[str, Callable[[int], float]], rounds: int) -> tuple[dict[str, list[float]], bool]:
    """Gives each candidate a turn in every round, after a round to warm up.

    A turn lasts about a second (with a single round a tenth of one), or a unit of work (a step, or drawing a batch)
    where that takes longer.

    Args:
        turns: name -> a function that does so many units of work and returns the seconds of one.

    Returns:
        name -> seconds per unit in each round, and whether the measurement was stopped early: after Ctrl-C or SIGTERM
        it returns the rounds that all candidates have finished.

    Raises:
        KeyboardInterrupt: if it was stopped before the end of the first round.
    """
    seconds, order = {name: [] for name in turns}, list(turns)
    units, stopped = dict.fromkeys(order, 1), False
    try:
        for number in range(rounds + 1):
            for name in order:
                seconds[name].append(turns[name](units[name]))
            if not number:  # measured again, since the first unit is slower than the others
                length = 1 if rounds > 1 else 0.1
                units = {name: math.ceil(length / turns[name](1)) for name in order}
            order.append(order.pop(0))  # so that no candidate always follows the same one
            shown = ", ".join(f"{name} {spent[-1]:.3g} s" for name, spent in seconds.items())
            log(f"  {f'round {number} of {rounds}' if number else 'warm-up'}: {shown}")
    except KeyboardInterrupt:
        stopped = True
    finished = min(map(len, seconds.values()))
    if finished < 2:
        raise KeyboardInterrupt
    return {name: spent[1:finished] for name, spent in seconds.items()}, stopped


class CandidateProcess:
    """A candidate in a process of its own that rests between its turns."""

    def __init__(self, job: Job):
        log(f"  preparing {job.label}")
        self.label, self.output = job.label, Path(tempfile.mkdtemp(dir=job.work_folder)) / "output.txt"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                child_command({"job": asdict(job)}), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output,
                text=True, bufsize=1, env=child_environment(job),
                start_new_session=True,  # a signal that stops this process must not reach its children first
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def wait_until_ready(self) -> None:
        """Waits until the candidate is prepared.

        Raises:
            RuntimeError: with the end of its output, if it has failed.
        """
        self._read_answer()

    def turn(self, units: int, kernels_off: tuple[str, ...] = ()) -> float:
        """Seconds of one unit of work; raises as `wait_until_ready` does.

        Args:
            units: how many to do.
            kernels_off: names in `kernel_switches.SWITCHES` to do without.
        """
        with suppress(BrokenPipeError):
            print(json.dumps({"units": units, "kernels_off": kernels_off}), file=self.process.stdin)
        return float(self._read_answer())

    def _read_answer(self) -> str:
        answer = self.process.stdout.readline()
        if not answer:
            words = self.output.read_text(errors="replace").split()
            raise RuntimeError(f"{self.label}: {' '.join(words)[-400:] or 'ended without any output'}")
        return answer


def run_alone(job: Job, processes: int = 1) -> dict:
    """What `child.measure_alone` finds for a job in a new process, or in several that train together.

    Returns:
        Seconds and bytes by name, or the end of the output as `error`.
    """
    log(f"  {job.label}, batch {job.batch}, alone" + (f" in {processes} processes" if processes > 1 else ""))
    result = Path(tempfile.mkdtemp(dir=job.work_folder)) / "result.json"
    job = replace(job, work_folder=str(result.parent))
    spec = {"job": asdict(job), "result": str(result), "started": time.time()}
    done = subprocess.run(
        child_command(spec, processes), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env=child_environment(job), start_new_session=True,
    )  # fmt: skip
    if result.exists():
        return json.loads(result.read_text())
    log(f"  failed with exit status {done.returncode}:\n{done.stdout[-2000:]}")
    return {"error": " ".join(done.stdout.split())[-200:]}


def child_command(spec: dict, processes: int = 1) -> list[str]:
    """The command that starts `child` with this specification."""
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *many, "-m", "sdtune.benchmark.child", json.dumps(spec)]


def child_environment(job: Job) -> dict[str, str]:
    """The environment of a candidate's process: for our trainer that of train_anime.py, and so for the floor."""
    ours = job.part != "draw" and job.name != REFERENCE
    return os.environ | (heap.heap_environment() if ours else {})
