"""What the tests of the page share: waiting for a job, and a backend whose trainings do no work."""

import signal
import threading
import time
from pathlib import Path

import pytest

from sdtune.adapters import tuner_file
from sdtune.page.backend import Backend
from sdtune.page.queue import Job
from sdtune.training import errors, trainer
from sdtune.training import fit as fit_module


@pytest.fixture
def wait_for():
    """A function that waits until a job has finished and returns it."""

    def wait_for(job: Job, seconds: float = 20) -> Job:
        end = time.monotonic() + seconds
        while not job.finished:
            assert time.monotonic() < end
            time.sleep(0.01)
        return job

    return wait_for


@pytest.fixture
def backend(tmp_path, monkeypatch):
    """A backend whose trainings take two steps, set `training_started`, and wait for `may_finish` before the third."""
    may_finish, training_started = threading.Event(), threading.Event()

    def fit(config, tuner, on_step):
        folder = Path(config.output)
        for done in (1, 2):
            stop = on_step(done, 0.1 * done)
            training_started.set()
        may_finish.wait(20)
        if stop or on_step(3, 0.3):
            (folder / "checkpoints" / "step-000003").mkdir(parents=True, exist_ok=True)
            (folder / "checkpoints" / "step-000003" / tuner_file.FILE_NAME).touch()
            raise errors.Stopped("stopped", signal.SIGTERM)
        return trainer.Result(True, folder / tuner_file.FILE_NAME, *[folder] * 3, [], {}, 3)

    monkeypatch.setattr(fit_module, "fit", fit)
    backend = Backend("tiny-sd", tmp_path / "output")
    backend.may_finish, backend.training_started = may_finish, training_started
    yield backend
    may_finish.set()
    backend.queue.close()
