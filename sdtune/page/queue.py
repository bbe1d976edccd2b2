"""The queue of the page: all windows share one GPU or CPU, so jobs run one at a time, in a thread of their own.

Jobs run in the order in which they were submitted, with one exception: while a training runs, waiting drawings run
between two of its steps. An error in a job never ends the queue.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .errors import JobStopped, PageError, plain_message

MAX_WAITING = 20


@dataclass(eq=False)
class Job:
    """A drawing or a training. Its `state` is waiting, then running, then one of done, stopped, failed."""

    window: str | None  # the window that submitted it; None after that window was closed
    kind: str  # "drawing" or "training"
    slot: str  # a window has one job per slot; a new drawing replaces the old one of its slot
    work: Callable[["Job"], object]
    state: str = "waiting"
    done: int = 0
    total: int = 0
    note: str = ""
    result: object = None
    error: str = ""
    stop_requested: bool = False
    seconds: float = 0.0  # how long it ran
    losses: list[float] = field(default_factory=list)  # of a training, one per step
    run: object = None  # of a training: its `training_jobs.TrainingRun`
    resumable: bool = False  # a training that was stopped after a checkpoint

    @property
    def finished(self) -> bool:
        return self.state in ("done", "stopped", "failed")

    def report_progress(self, done: int, total: int) -> None:
        """Stores the progress; raises JobStopped if somebody has stopped the job."""
        self.done, self.total = done, total
        if self.stop_requested:
            raise JobStopped


class Queue:
    """Runs submitted jobs one at a time, except that drawings also run between the steps of a training."""

    def __init__(self):
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running: list[Job] = []  # at most a training, and a drawing between two of its steps
        self._closed = False
        self._thread = threading.Thread(target=self._run_jobs, name="page queue", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Job:
        """Adds a job; an older drawing of the same window and slot is stopped.

        Raises:
            PageError: if the queue is full, or this window already has a training.
        """
        with self._changed:
            for old in self.jobs():
                if old.window == job.window and old.slot == job.slot:
                    if job.kind == "training":
                        raise PageError("This window already has a training that runs or waits. Stop it first.")
                    self._stop(old)
            if len(self._waiting) >= MAX_WAITING:
                raise PageError(f"{MAX_WAITING} jobs are waiting already. Try again in a moment.")
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def jobs(self) -> list[Job]:
        """The running jobs, then the waiting ones in their order."""
        return [*self._running, *self._waiting]

    def count_before(self, job: Job) -> int:
        """The number of jobs that run before this one; a drawing does not wait for trainings."""
        with self._changed:
            before = self.jobs()[: self.jobs().index(job)] if job in self._waiting else []
        return sum(job.kind == "training" or other.kind == "drawing" for other in before)

    def stop(self, job: Job) -> None:
        """Ends a running job at its next step, or removes a waiting one."""
        with self._changed:
            self._stop(job)

    def _stop(self, job: Job) -> None:
        job.stop_requested = True
        if job in self._waiting:
            self._waiting.remove(job)
            job.state = "stopped"

    def stop_slot(self, window: str, slot: str) -> None:
        """Stops the jobs of one window and slot."""
        for job in self.jobs():
            if job.window == window and job.slot == slot:
                self.stop(job)

    def close_window(self, window: str) -> None:
        """Stops the drawings of a closed window; its training continues without a window."""
        for job in self.jobs():
            if job.window == window:
                job.window = None
                if job.kind == "drawing":
                    self.stop(job)

    def run_waiting_drawing(self) -> None:
        """Runs the first waiting drawing, if there is one. A training calls this between its steps."""
        with self._changed:
            job = next((j for j in self._waiting if j.kind == "drawing"), None)
            if job:
                self._waiting.remove(job)
                self._running.append(job)
        if job:
            with torch.random.fork_rng():  # a drawing must not change the random numbers of the training
                self._run(job)

    def close(self, timeout: float = 60.0) -> None:
        """Stops all jobs and waits for the running one; a training writes its checkpoint first."""
        with self._changed:
            self._closed = True
            for job in self.jobs():
                self._stop(job)
            self._changed.notify_all()
        self._thread.join(timeout)

    def _run_jobs(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._waiting.pop(0)
                self._running.append(job)
            self._run(job)

    def _run(self, job: Job) -> None:
        """Runs a job that is already listed as running, and stores its result or its error."""
        started, state = time.monotonic(), "done"
        job.state = "running"
        try:
            job.result = job.work(job)
        except JobStopped:
            state = "stopped"
        except BaseException as error:  # also an error that is no Exception must not end the thread of the queue
            job.error, state = plain_message(error), "failed"
        with self._changed:
            self._running.remove(job)
            job.seconds, job.state = time.monotonic() - started, state
