"""The Train tab: images and captions to train on, the form, and the progress, loss curve and previews of a training."""

import json
from functools import partial

import gradio as gr

from ..training.config import DEFAULT_KIND, TrainConfig
from ..tuners.config import BASELINES, KINDS
from . import html_parts
from .after_training import build_after_training
from .check_images import LOOK_THROUGH, look_through
from .controls import QUIET, Window
from .datasets import UploadedImages
from .errors import PageError, plain_message
from .files import kind_name
from .style import LIGHTBOX
from .train_form import build_more_fields
from .training_jobs import TrainingRun

# Sends the captions as they stand in the browser instead of what the server knows: the caption boxes are built again
# after each upload, and an event of the old boxes would be lost if a click came at that moment.
READ_CAPTIONS = """(uploaded, captions, ...fields) =>
    [uploaded, JSON.stringify([...document.querySelectorAll("#captions textarea")].map(box => box.value)), ...fields]"""


def build_train_tab(window: Window) -> tuple:
    """Lays out the tab and connects it.

    Returns:
        A function (shown, request) -> outputs that shows the training of a window and is called every second, the
        state `shown` that it takes, and the components of its outputs.
    """
    backend, default = window.backend, TrainConfig()
    uploaded = gr.State(None)
    with gr.Row():
        with gr.Column(scale=6, min_width=320):
            source = gr.Radio(
                [("My own images", "own"), ("The 30 bundled anime images", "bundled")], value="own",
                label="Training images", elem_id="source",
                info="5 to 50 images of one style or subject. Captions: .txt files, metadata.jsonl or metadata.csv.",
            )  # fmt: skip
            files = gr.File(label="Drop images and caption files here",
                            file_count="multiple", height=150, elem_id="train-files")  # fmt: skip
            problems = gr.HTML(elem_id="problems")
            look = gr.Button(LOOK_THROUGH, size="sm", elem_id="look-through")
            looked = gr.HTML(elem_id="looked-through")
            caption_column, captions = gr.Column(elem_id="captions"), gr.Textbox(visible=False)
            with gr.Row():
                name = gr.Textbox("my-style", label="Name", info="The tuner's name in Files.", min_width=200,
                                  elem_id="run-name")  # fmt: skip
                kind = gr.Dropdown([(kind_name(k), k) for k in (*KINDS, *BASELINES)], value=DEFAULT_KIND, label="Kind",
                                   info="What is trained.", min_width=200)  # fmt: skip
                steps = gr.Number(default.steps, label="Steps", precision=0, minimum=1, min_width=200,
                                  info="Too many steps overfit.", elem_id="train-steps")  # fmt: skip
            with gr.Accordion("More settings", open=False):
                more = build_more_fields(backend.base, kind, backend.files)
            with gr.Row():
                train = gr.Button("Train", variant="primary", elem_id="train")
                stop = gr.Button("Stop", interactive=False, elem_id="stop-train")
            with gr.Accordion("Train in a shell instead", open=False):
                command = gr.Textbox(label="Command", info="Run it in the folder where app.py was started.", lines=3,
                                     buttons=["copy"], interactive=False, elem_id="train-command")  # fmt: skip
                save = gr.Button("Save my images where this command reads them", size="sm", elem_id="save-data")
        with gr.Column(scale=5, min_width=300):
            status = gr.HTML(html_parts.empty_result("The progress, the loss and previews appear here."),
                             elem_id="train-status")  # fmt: skip
            curve = gr.HTML(elem_id="loss-curve")
            preview = gr.HTML(js_on_load=LIGHTBOX, elem_id="preview")
            with gr.Row():
                draw = gr.Button("Draw with it", variant="primary", visible=False, elem_id="draw-with-it")
                resume = gr.Button("Resume training", visible=False, elem_id="resume")
            others = gr.Dropdown([], label="Other stopped trainings", info="Choose one to see it and resume it.",
                                 visible=False, elem_id="other-trainings")  # fmt: skip
            after, sheet = build_after_training(window)
    sheet.render()  # below both columns, since it is wide
    fields = [source, name, kind, steps, *more.values()]

    def plan(uploaded, captions, values) -> TrainingRun:
        source, name, kind, steps, *rest = values
        return backend.trainings.plan(uploaded, captions, source, name or "", kind, steps, dict(zip(more, rest)))

    def check(uploaded, captions, config=None) -> tuple[list[str], list[str]]:
        if uploaded is None or not uploaded.pairs:
            return [*(uploaded.problems if uploaded else []), "there are no images yet; drop some above"], []
        return backend.datasets.check(uploaded, captions, config)

    def on_files(files):
        if not files:
            return None, ""
        try:
            uploaded = backend.datasets.receive(files)
        except ValueError as error:
            return None, html_parts.message(plain_message(error), error=True)
        return uploaded, _check_message(uploaded, *check(uploaded, [caption for _, caption in uploaded.pairs]))

    def make_handler(start: bool):
        """The handler of Train, or with start=False of the button that only saves the images."""

        def on_click(request: gr.Request, uploaded, captions, *values):
            own, text = values[0] == "own", ""
            try:
                captions = json.loads(captions)
                if own and uploaded is not None and len(captions) != len(uploaded.pairs):
                    raise PageError("The captions were still loading. Look at them and click again.")
                run = plan(uploaded, captions, values)
                if own:
                    problems, notes = check(uploaded, captions, run.config)
                    if problems:
                        return _check_message(uploaded, problems, notes), gr.skip(), gr.skip()
                    if run.heldout:
                        notes = [f"{run.heldout} of them are not trained on, to judge the steps", *notes]
                    backend.datasets.keep(uploaded, captions, run.config.data, run.heldout)
                    saved = html_parts.message(f"The images are saved in {run.config.data}.")
                    text = _check_message(uploaded, [], notes) if start else saved
                if start:
                    backend.trainings.start(request.session_hash, run)
            except (ValueError, OSError) as error:
                return html_parts.message(plain_message(error), error=True), gr.skip(), gr.skip()
            return text, run.shell_command(), gr.Button(interactive=False) if start else gr.skip()

        return on_click

    def on_change(uploaded, captions, *values):
        try:
            captions = json.loads(captions)
            if uploaded and len(captions) != len(uploaded.pairs):  # the fields are still loading
                captions = [caption for _, caption in uploaded.pairs]
            return plan(uploaded, captions, values).shell_command()
        except (ValueError, OSError) as error:
            return plain_message(error)

    def on_source(source):
        own = gr.update(visible=source == "own")
        return own, own, own, "", ""

    with caption_column:
        triggers = [window.blocks.load, uploaded.change, source.change]

        @gr.render([uploaded, source], triggers=triggers, show_progress="hidden")
        def caption_boxes(uploaded_now, source):
            boxes = []
            if source == "own" and uploaded_now is not None and uploaded_now.pairs:
                with gr.Column(elem_classes="caption-list"):
                    for file, caption in uploaded_now.pairs:
                        with gr.Row(equal_height=True):
                            gr.HTML(html_parts.caption_thumbnail(uploaded_now.folder / file),
                                    elem_classes="caption-thumbnail")  # fmt: skip
                            boxes.append(gr.Textbox(caption, label=f"Caption of {file[:80]}", lines=2, scale=1,
                                                    placeholder="what this image shows"))  # fmt: skip
            for box in boxes:
                box.blur(lambda u, *captions: _check_message(u, *check(u, captions)), [uploaded, *boxes], problems,
                         **QUIET)  # fmt: skip

    clicked = [uploaded, captions, *fields]
    train.click(make_handler(start=True), clicked, [problems, command, train], js=READ_CAPTIONS, **QUIET)
    save.click(make_handler(start=False), clicked, [problems, command, train], js=READ_CAPTIONS, **QUIET)
    looked_at = [uploaded, captions, *(more[name] for name in ("resolution", "square", "trigger_words"))]
    look.click(partial(look_through, backend), looked_at, looked, js=READ_CAPTIONS, **QUIET)
    files.change(on_files, files, [uploaded, problems], **QUIET)
    source.change(on_source, source, [files, save, look, problems, looked], **QUIET)
    gr.on([uploaded.change, *(field.change for field in fields)], on_change, clicked, command, js=READ_CAPTIONS,
          trigger_mode="always_last", **QUIET)  # fmt: skip
    return _connect_progress(window, problems, [status, curve, preview, train, stop, draw, resume, others, *after])


def _check_message(uploaded: UploadedImages | None, problems: list[str], notes: list[str]) -> str:
    """The result of a check as HTML."""
    if not problems:
        return html_parts.message(f"{len(uploaded.pairs)} images with captions are ready to train on.", points=notes)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return html_parts.message(f"{count} to solve before training:", error=True, points=problems)


def _connect_progress(window: Window, problems: gr.HTML, outputs: list) -> tuple:
    """Connects the right half of the tab, which shows a training; returns what `build_train_tab` returns."""
    trainings, queue, files, output = (getattr(window.backend, n) for n in ("trainings", "queue", "files", "output"))
    _status, _curve, _preview, _train, stop, draw, resume, others, *_after = outputs
    # what this window shows: the job, its state, step, jobs before it, number of previews, other stopped trainings
    shown = gr.State([])
    unchanged = [gr.skip()] * (1 + len(outputs))

    def show_training(shown, request: gr.Request):
        job = trainings.shown_in(request.session_hash)
        if job is None:
            return unchanged
        previews, before = job.run.previews(), queue.count_before(job)
        names = list(trainings.unfinished(request.session_hash))
        now = [id(job), job.state, job.done, before, len(previews), names]
        if now == shown:
            return unchanged
        preview = gr.skip()
        if shown[:1] != now[:1] or shown[4:5] != now[4:5]:
            preview = html_parts.image_columns([("preview", [output.publish(previews[-1])])]) if previews else ""
        has_file = job.finished and job.result is not None and files.label_of(job.result) is not None
        return [
            now, html_parts.training_status(job, job.run.name, before), html_parts.loss_curve(job.losses, job.total),
            preview, gr.Button(interactive=job.finished), gr.Button(interactive=not job.finished),
            gr.Button(visible=has_file), gr.Button(visible=job.finished and job.resumable),
            gr.Dropdown(names, value=None, visible=bool(names)),
            *[gr.Button(visible=job.finished and job.result is not None)] * len(_after),
        ]  # fmt: skip

    def on_stop(request: gr.Request):
        job = trainings.shown_in(request.session_hash)
        if job:
            queue.stop(job)

    def on_draw(cards_version, request: gr.Request):
        job = trainings.shown_in(request.session_hash)
        label = files.label_of(job.result) if job and job.result else None
        if label is None:
            return [gr.skip()] * 4
        prompt = trainings.first_prompt(job) or gr.skip()
        return [[{}, {label: 1.0}], cards_version + 1, gr.Tabs(selected="draw"), prompt]

    def on_resume(request: gr.Request):
        try:
            trainings.resume(request.session_hash)
        except PageError as error:
            return html_parts.message(str(error), error=True), gr.skip()
        return "", gr.Button(visible=False)

    def on_choose(name, request: gr.Request):
        try:
            trainings.choose(request.session_hash, name)
        except PageError as error:
            return html_parts.message(str(error), error=True)
        return ""

    others.input(on_choose, others, problems, **QUIET)
    stop.click(on_stop, queue=False, **QUIET)
    resume.click(on_resume, None, [problems, resume], **QUIET)
    draw.click(on_draw, window.cards_version, [window.columns, window.cards_version, window.tabs, window.prompt],
               **QUIET)  # fmt: skip
    return show_training, shown, [shown, *outputs]
