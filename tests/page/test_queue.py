"""The queue runs one job at a time, lets drawings run between training steps, and survives every error."""

import threading
import time

import pytest
import torch

from sdtune.page import html_parts
from sdtune.page.errors import PageError
from sdtune.page.queue import Job, Queue


@pytest.fixture
def queue():
    queue = Queue()
    yield queue
    queue.close()


def test_jobs_run_one_at_a_time_and_an_error_does_not_end_the_queue(queue, wait_for):
    order, go = [], threading.Event()

    def work(name, error=None):
        def run(job):
            go.wait(20)
            order.append(name)
            if error:
                raise error
            return name

        return run

    first = queue.submit(Job("a", "drawing", "columns", work("first", KeyError("boom"))))
    second = queue.submit(Job("b", "drawing", "columns", work("second", ValueError("a <b>wrong</b> value"))))
    third = queue.submit(Job("c", "drawing", "columns", work("third")))
    old = queue.submit(Job("d", "drawing", "weight", work("old")))
    new = queue.submit(Job("d", "drawing", "weight", work("new")))
    assert old.state == "stopped" and queue.count_before(new) == 3 and queue.count_before(third) == 2
    go.set()
    assert wait_for(new).result == "new" and order == ["first", "second", "third", "new"]
    assert first.state == second.state == "failed" and "KeyError" in first.error
    assert second.error == "a <b>wrong</b> value" and "<b>" not in html_parts.drawing_status(second)


def test_an_error_does_not_end_the_queue_where_the_terminal_is_gone(queue, wait_for, monkeypatch):
    def fail(job):
        raise KeyError("boom")

    class Gone:
        def write(self, text):
            raise OSError(5, "Input/output error")

        flush = write

    monkeypatch.setattr("sys.stderr", Gone())
    assert "KeyError: 'boom'" in wait_for(queue.submit(Job("a", "drawing", "columns", fail))).error
    assert wait_for(queue.submit(Job("b", "drawing", "columns", lambda job: "drawn"))).result == "drawn"


def test_a_drawing_runs_between_training_steps_and_does_not_change_the_random_numbers(queue, wait_for):
    drawn, numbers = [], []

    def train(job):
        torch.manual_seed(0)
        while len(numbers) < 3:
            queue.run_waiting_drawing()
            numbers.append(torch.rand(1).item())
            time.sleep(0.05)
            if not drawn:
                numbers.clear()
                torch.manual_seed(0)

    training = queue.submit(Job("a", "training", "training", train))
    drawing = queue.submit(Job("b", "drawing", "columns", lambda job: drawn.append(torch.rand(5))))
    assert queue.count_before(drawing) == 0
    with pytest.raises(PageError, match="already has a training"):
        queue.submit(Job("a", "training", "training", train))
    assert wait_for(drawing).state == "done" and wait_for(training).state == "done"
    assert numbers == torch.rand(3, generator=torch.Generator().manual_seed(0)).tolist()


def test_closing_a_window_stops_its_drawing_and_keeps_its_training(queue, wait_for):
    started = threading.Event()

    def work(job):
        for i in range(2000):
            job.report_progress(i, 2000)
            started.set()
            time.sleep(0.005)

    drawing = queue.submit(Job("a", "drawing", "columns", work))
    training = queue.submit(Job("a", "training", "training", lambda job: "kept"))
    assert started.wait(20)
    queue.close_window("a")
    assert wait_for(drawing).state == "stopped" and 0 < drawing.done < 2000
    assert wait_for(training).result == "kept" and training.window is None
