"""The parts of the Train tab that look at each image: before a training, and after it."""

import json
from pathlib import Path

import gradio as gr

from ..check import after, words
from ..training.buckets import AspectBuckets
from . import html_parts
from .backend import Backend
from .controls import QUIET, Window, follow_job
from .errors import PageError, plain_message
from .queue import Job

LOOK_THROUGH = "Look through my images"
NO_IMAGES = "There are no images yet. Drop some above."


def look_through(backend: Backend, uploaded, captions: str, resolution, square: bool, trigger_words: str) -> str:
    """What is worth a look in the uploaded images, as HTML; problems and errors as a message.

    Args:
        captions: as they stand in the browser, a JSON list.
        resolution, square, trigger_words: of the form.
    """
    try:
        if uploaded is None or not uploaded.pairs:
            raise PageError(NO_IMAGES)
        texts = json.loads(captions)
        if len(texts) != len(uploaded.pairs):  # the fields are still loading
            texts = [caption for _, caption in uploaded.pairs]
        buckets = AspectBuckets(int(resolution or 0) or backend.side, bool(square))
        lines, cards = backend.datasets.look_through(uploaded, texts, buckets)
        return html_parts.picture_sheet([*lines, *words.describe_words(trigger_words or "")], cards)
    except (ValueError, OSError) as error:
        return html_parts.message(plain_message(error), error=True)


def build_after_training(window: Window) -> gr.Button:
    """Lays out the button that measures the images of the training that the window shows, and what it finds."""
    backend = window.backend
    measure = gr.Button("Which image is bad?", visible=False, elem_id="measure-images")
    status, found = gr.HTML(elem_id="measure-status"), gr.HTML(elem_id="measured-images")

    async def on_measure(request: gr.Request):
        training = backend.trainings.shown_in(request.session_hash)
        folder = Path(training.run.config.output) if training else None
        if folder is None or not after.is_run(folder):
            yield html_parts.message("There is no training with a checkpoint here.", error=True), gr.skip()
            return

        def work(job: Job) -> str:
            return html_parts.picture_sheet(*after.check_run(folder, lambda _: None, job.report_progress))

        try:
            job = backend.queue.submit(Job(request.session_hash, "drawing", "pictures", work))
        except PageError as error:
            yield html_parts.message(str(error), error=True), gr.skip()
            return
        async for text in follow_job(backend, job):
            yield text, gr.skip()
        yield (("", job.result) if job.state == "done" else (html_parts.drawing_status(job, 0), gr.skip()))

    measure.click(on_measure, None, [status, found], concurrency_limit=None, **QUIET)
    return measure
