"""One device shared by many windows of the page: `Device` runs one piece of work at a time, in a thread of its own.

First come, first served, except that a drawing may pass between two steps of a training. Whatever happens in a
piece of work, the device goes on.
"""

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..training.errors import DataError, TrainError

MOST_WAITING = 20


class PageError(ValueError):
    """Something that the user of the page can put right; the message says what."""


class Halted(Exception):
    """Raised inside a piece of work that was told to stop."""


@dataclass(eq=False)
class Job:
    """A piece of work for the device. `state` goes waiting, running, then one of done, stopped, failed."""

    owner: str | None  # the window that asked for it; None once that is closed
    kind: str  # "drawing" or "training"
    slot: str  # a window has one drawing per slot; a new one takes the place of the old
    work: Callable[["Job"], object]
    state: str = "waiting"
    done: int = 0
    total: int = 0
    note: str = ""
    result: object = None
    error: str = ""
    stopping: bool = False
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # of a training
    run: object = None  # the `studio.Run` of a training
    unfinished: bool = False  # a training that was stopped after a step, and can go on

    @property
    def over(self) -> bool:
        return self.state in ("done", "stopped", "failed")

    def step(self, done: int, total: int) -> None:
        """Notes the progress; raises Halted if the job was told to stop."""
        self.done, self.total = done, total
        if self.stopping:
            raise Halted


class Queue:
    """First come, first served, one at a time; but a drawing may pass between two steps of a training."""

    def __init__(self):
        self._wake = threading.Condition()
        self._waiting: list[Job] = []
        self.running: list[Job] = []  # a training, and the drawing that passes it
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="device", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Job:
        """Puts a job into the queue; an older drawing of the same window and slot is stopped.

        Raises:
            StudioError: if the queue is full, or this window has a training already.
        """
        with self._wake:
            for old in self.jobs():
                if old.owner == job.owner and old.slot == job.slot:
                    if job.kind == "training":
                        raise PageError("a training of this window is under way or waits; stop it first")
                    self._stop(old)
            if len(self._waiting) >= MOST_WAITING:
                raise PageError(f"{MOST_WAITING} are waiting for the device already; try again in a moment")
            self._waiting.append(job)
            self._wake.notify_all()
        return job

    def jobs(self) -> list[Job]:
        """All that run or wait, in this order."""
        return [*self.running, *self._waiting]

    def ahead(self, job: Job) -> int:
        """How many jobs come before this one; a drawing does not wait for trainings."""
        with self._wake:
            before = self.jobs()[: self.jobs().index(job)] if job in self._waiting else []
        return sum(job.kind == "training" or other.kind == "drawing" for other in before)

    def stop(self, job: Job) -> None:
        """Ends a job at its next step, or takes it out of the queue."""
        with self._wake:
            self._stop(job)

    def _stop(self, job: Job) -> None:
        job.stopping = True
        if job in self._waiting:
            self._waiting.remove(job)
            job.state = "stopped"

    def forget(self, owner: str) -> None:
        """A window was closed: its drawings end, its training goes on and belongs to nobody."""
        for job in self.jobs():
            if job.owner == owner:
                job.owner = None
                if job.kind == "drawing":
                    self.stop(job)

    def let_pass(self) -> None:
        """Runs the first drawing that waits, if there is one. A training calls this between its steps."""
        with self._wake:
            job = next((j for j in self._waiting if j.kind == "drawing"), None)
            if job:
                self._waiting.remove(job)
                self.running.append(job)
        if job:
            with torch.random.fork_rng():  # the training's random numbers go on as if nothing had happened
                self._run(job)

    def close(self, timeout: float = 60.0) -> None:
        """Stops everything; a training writes its checkpoint first."""
        with self._wake:
            self._closed = True
            for job in self.jobs():
                self._stop(job)
            self._wake.notify_all()
        self._thread.join(timeout)

    def _serve(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._waiting.pop(0)
                self.running.append(job)
            self._run(job)

    def _run(self, job: Job) -> None:
        """Runs a job that is in `running`; whatever happens in it, the device goes on."""
        started, end = time.monotonic(), "done"
        job.state = "running"
        try:
            job.result = job.work(job)
        except Halted:
            end = "stopped"
        except BaseException as error:  # also what is no Exception must not end the device's thread
            job.error, end = plain_message(error), "failed"
        with self._wake:
            self.running.remove(job)
            job.seconds, job.state = time.monotonic() - started, end


def plain_message(error: BaseException) -> str:
    """An error as a sentence for the page; what nobody foresaw goes to the terminal in full."""
    if isinstance(error, DataError):
        return "the data cannot be used: " + "; ".join(error.problems)
    if isinstance(error, (ValueError, *_trainer_errors())):
        return " ".join(str(error).split())
    traceback.print_exception(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "the device's memory is full; try a smaller size, fewer pictures or a smaller batch"
    return f"something went wrong ({type(error).__name__}: {' '.join(str(error).split())[:300]}); the terminal has more"


def _trainer_errors() -> tuple:
    return (TrainError,)
