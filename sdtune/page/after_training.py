"""The part of the Train tab that looks back at a training: which image is bad, and which step is best."""

from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import gradio as gr

from .. import extras
from ..check import after
from ..training import dataset, run_folder
from ..training.buckets import AspectBuckets
from ..training.config import TrainConfig
from ..training.errors import TrainError
from . import html_parts
from .controls import QUIET, Window, connect_stop, follow_job
from .errors import PageError, plain_message
from .queue import Job
from .style import LIGHTBOX

FEWEST_HELDOUT = 2  # pictures, to choose a step by


def build_after_training(window: Window) -> tuple[list[gr.Button], gr.HTML]:
    """Lays out what is shown once a training has ended.

    Returns:
        The two buttons, and the sheet of all steps, which is still to be rendered.
    """
    with gr.Row():
        measure = gr.Button("Which image is bad?", visible=False, elem_id="measure-images")
        choose = gr.Button("Which step is best?", visible=False, elem_id="choose-step")
    status, found = gr.HTML(elem_id="measure-status"), gr.HTML(elem_id="measured-images")
    step_status = gr.HTML(elem_id="step-status")
    stop = gr.Button("Stop", visible=False, size="sm", elem_id="stop-choosing")
    sheet = gr.HTML(elem_id="steps-sheet", js_on_load=LIGHTBOX, render=False)

    async def on_measure(request: gr.Request):
        def work(job: Job, folder: Path) -> str:
            return html_parts.picture_sheet(*after.check_run(folder, lambda _: None, job.report_progress))

        async for text, result in _look_back(window, request.session_hash, "pictures", work):
            yield ("", result) if result else (text, gr.skip())

    async def on_choose(request: gr.Request):
        running = False
        async for text, result in _look_back(
            window, request.session_hash, "steps", partial(_choose_step, window), _check_heldout
        ):
            yield *(result or (text, gr.skip())), gr.Button(visible=True)
            running = True
        if running:
            yield gr.skip(), gr.skip(), gr.Button(visible=False)

    measure.click(on_measure, None, [status, found], concurrency_limit=None, **QUIET)
    choose.click(on_choose, None, [step_status, sheet, stop], concurrency_limit=None, **QUIET)
    connect_stop(window.backend, stop, "steps")
    return [measure, choose], sheet


def _choose_step(window: Window, job: Job, folder: Path) -> tuple[str, str]:
    """Draws the held-out prompts of a training with every checkpoint: the recommendation and the sheet, as HTML."""
    from ..evaluation import checkpoint_scores  # heavy, and only needed here

    files, output = window.backend.files, window.backend.output
    chosen = checkpoint_scores.choose(folder, log=lambda _: None, on_progress=job.report_progress)
    files.scan()
    label = files.label_of(chosen.tuner()) if chosen.step else None
    titles, *rows = checkpoint_scores.score_rows(chosen.scored)
    meanings = checkpoint_scores.meanings(chosen.scored)
    sheet = html_parts.steps_sheet(output.publish(chosen.sheet), titles, rows, meanings)
    return html_parts.recommended_step(folder.name, chosen.reason, label), sheet


def _check_heldout(config: TrainConfig) -> None:
    """Raises MissingPackages or a PageError unless the steps of a training with these settings can be scored."""
    extras.check("evaluate")
    count = len(dataset.read_pairs(config.data, AspectBuckets(config.resolution), "test", lambda _: None))
    if count < FEWEST_HELDOUT:
        raise PageError(
            f"Choosing a step needs {FEWEST_HELDOUT} or more images that were not trained on, and this training held "
            f"out {count}. Set “Held-out images” under More settings before the next one."
        )


async def _look_back(
    window: Window, session: str, slot: str, work: Callable[[Job, Path], object],
    check: Callable[[TrainConfig], None] = lambda config: None,
) -> AsyncIterator[tuple]:  # fmt: skip
    """Runs `work` on the training that a window shows, as a job of the queue.

    Args:
        work: gets the job and the folder of the training.
        check: called with the settings of the training first; its error is shown.

    Yields:
        The status as HTML and None; at the end, if all went well, the result of `work` in the place of None.
    """
    backend, training = window.backend, window.backend.trainings.shown_in(session)
    folder = Path(training.run.config.output) if training else None
    try:
        if folder is None or not after.is_run(folder):
            raise PageError("There is no training with a checkpoint here.")
        check(run_folder.read_config(folder))
        job = backend.queue.submit(Job(session, "drawing", slot, lambda job: work(job, folder)))
    except extras.MissingPackages as error:
        yield html_parts.message(str(error), error=True), None
        return
    except (ValueError, TrainError, OSError) as error:
        yield html_parts.message(plain_message(error), error=True), None
        return
    async for text in follow_job(backend, job):
        yield text, None
    yield html_parts.drawing_status(job), job.result if job.state == "done" else None
