"""The Train tab of `app.py`: pictures and captions in, the run's curve and previews, the result to use."""

import json

import gradio as gr

from ..training.config import TrainConfig
from ..tuners.config import TunerConfig
from . import style
from .files import kind_name, kinds, matters, thumbnail
from .queue import PageError, plain_message
from .studio import Run, command

QUIET = dict(show_progress="hidden", api_visibility="private")
# The captions as they stand in the table, in place of what the server knows: the table is laid out anew for each drop,
# and a listener of its own boxes would be gone if a click came in that instant.
CAPTIONS = """(drop, captions, ...fields) =>
    [drop, JSON.stringify([...document.querySelectorAll("#pairs textarea")].map(box => box.value)), ...fields]"""


def train_tab(page) -> tuple:
    """Lays out the tab and connects it. `page` is the `Page` of app.py.

    Returns:
        What the page calls every second with (shown, request), the state `shown`, and the outputs of that.
    """
    studio, default = page.studio, TrainConfig()
    drop, shown = gr.State(None), gr.State([])  # the dropped files; what this window shows of the training
    with gr.Row():
        with gr.Column(scale=6, min_width=320):
            source = gr.Radio(
                [("my own", "own"), ("the 30 bundled anime pairs", "bundled")], value="own", label="Pictures",
                info="What to learn from; 5 to 50 pictures of one style or thing.", elem_id="source",
            )  # fmt: skip
            files = gr.File(
                label="Drop pictures here, and captions: .txt beside each, or metadata.jsonl / .csv",
                file_count="multiple", height=150, elem_id="pictures",
            )  # fmt: skip
            problems = gr.HTML(elem_id="problems")
            pairs, captions = gr.Column(elem_id="pairs"), gr.Textbox(visible=False)
            with gr.Row():
                name = gr.Textbox("my-style", label="Name", info="Of the tuner, in the library.", elem_id="run-name")
                kind = gr.Dropdown([(kind_name(k), k) for k in kinds()], value="res_attn", label="Tuner",
                                   info="What is trained beside the frozen base.")  # fmt: skip
                steps = gr.Number(default.steps, label="Steps", precision=0, minimum=1, elem_id="train-steps",
                                  info="More learn more, and at last by heart.")  # fmt: skip
            with gr.Accordion("More settings", open=False):
                form = _more(studio.base, default, kind)
            with gr.Row():
                start = gr.Button("Train", variant="primary", elem_id="train")
                stop = gr.Button("Stop and keep it", interactive=False, elem_id="stop-train")
            with gr.Accordion("The same from a shell", open=False):
                line = gr.Textbox(label="Command", lines=3, buttons=["copy"], interactive=False, elem_id="line",
                                  info="Run it in the folder of train_anime.py, now or later.")  # fmt: skip
                save = gr.Button("Put my pictures where this command finds them", size="sm", elem_id="save-data")
        with gr.Column(scale=5, min_width=300):
            status = gr.HTML(style.empty("Drop pictures, look at their captions, and train."), elem_id="train-status")
            chart = gr.HTML(elem_id="curve")
            preview = gr.HTML(js_on_load=style.LIGHTBOX, elem_id="preview")
            with gr.Row():
                use = gr.Button("Draw with it", variant="primary", visible=False, elem_id="use")
                go_on = gr.Button("Go on training", visible=False, elem_id="go-on")
    fields = [source, name, kind, steps, *form.values()]

    def plan(drop, captions, values) -> Run:
        """The training that the form asks for."""
        source, name, kind, steps, *more = values
        return studio.plan(drop, captions, source, name or "", kind, steps, dict(zip(form, more)))

    def checked(drop, captions, resolution=None) -> tuple[list[str], list[str]]:
        """Problems and notes, as `Studio.check` gives them."""
        if drop is None or not drop.pairs:
            return [*(drop.problems if drop else []), "no pictures yet; drop some above"], []
        return studio.check(drop, captions, resolution)

    def tell(drop, wrong, notes) -> str:
        if not wrong:
            return style.said(f"{len(drop.pairs)} pictures, each with a caption: ready.", points=notes)
        count = "1 thing" if len(wrong) == 1 else f"{len(wrong)} things"
        return style.said(f"{count} to put right before training:", bad=True, points=wrong)

    def on_files(files):
        if not files:
            return None, ""
        try:
            drop = studio.take(files)
        except ValueError as error:
            return None, style.said(plain_message(error), bad=True)
        return drop, tell(drop, *checked(drop, [caption for _, caption in drop.pairs]))

    def ready(start: bool):
        """What a click on Train does, or on the button that only keeps the pictures."""

        def on_click(request: gr.Request, drop, captions, *values):
            try:
                captions, told = json.loads(captions), ""
                if values[0] == "own" and drop is not None and len(captions) != len(drop.pairs):
                    raise PageError("the table of captions was still being laid out; look at it, and click again")
                run = plan(drop, captions, values)
                if values[0] == "own":
                    wrong, notes = checked(drop, captions, run.config.resolution)
                    if wrong:
                        return tell(drop, wrong, notes), gr.skip(), gr.skip()
                    studio.keep(drop, captions, run)
                    told = tell(drop, [], notes) if start else style.said(f"The pictures are in {run.config.data}.")
                if start:
                    studio.train(request.session_hash, run)
            except (ValueError, OSError) as error:
                return style.said(plain_message(error), bad=True), gr.skip(), gr.skip()
            return told, command(run), gr.Button(interactive=False) if start else gr.skip()

        return on_click

    def on_change(drop, *values):
        try:
            captions = [caption for _, caption in drop.pairs] if drop else []
            return command(plan(drop, captions, values))
        except (ValueError, OSError) as error:
            return plain_message(error)

    changes = [drop.change, *(field.change for field in fields)]
    gr.on(changes, on_change, [drop, *fields], line, trigger_mode="always_last", **QUIET)

    with pairs:

        @gr.render([drop, source], triggers=[page.blocks.load, drop.change, source.change], show_progress="hidden")
        def table(found, source):
            boxes = []
            if source == "own" and found is not None and found.pairs:
                with gr.Column(elem_classes="pairs"):
                    for file, caption in found.pairs:
                        with gr.Row(equal_height=True):
                            gr.HTML(style.thumb(thumbnail(found.folder / file, 144), file), elem_classes="thumb")
                            boxes.append(gr.Textbox(caption, label=f"Caption of {file[:80]}", lines=2, scale=1,
                                                    placeholder="what this picture shows"))  # fmt: skip
            for box in boxes:
                box.blur(lambda d, *captions: tell(d, *checked(d, captions)), [drop, *boxes], problems, **QUIET)

    everything = [drop, captions, *fields]
    start.click(ready(True), everything, [problems, line, start], js=CAPTIONS, **QUIET)
    save.click(ready(False), everything, [problems, line, start], js=CAPTIONS, **QUIET)
    files.change(on_files, files, [drop, problems], **QUIET)
    source.change(lambda s: (gr.update(visible=s == "own"), gr.update(visible=s == "own"), ""), source,
                  [files, save, problems], **QUIET)  # fmt: skip

    def on_stop(request: gr.Request):
        job = studio.training_of(request.session_hash)
        if job:
            studio.device.stop(job)

    stop.click(on_stop, queue=False, **QUIET)

    def on_tick(shown, request: gr.Request):
        job = studio.training_of(request.session_hash)
        if job is None:
            return [gr.skip()] * 8
        pictures = job.run.previews() if job.run else []
        new = [id(job), job.state, job.done, studio.device.ahead(job), len(pictures)]
        if new == shown:
            return [gr.skip()] * 8
        old_picture = shown[:1] == new[:1] and shown[4:] == new[4:]
        view = gr.skip() if old_picture else style.sheet([("preview", [studio.show(pictures[-1])])]) if pictures else ""
        return [
            new, style.training(job, job.run.name, studio.device.ahead(job)), style.curve(job.losses, job.total), view,
            gr.Button(interactive=job.over), gr.Button(interactive=not job.over),
            gr.Button(visible=job.over and job.result is not None and studio.label_of(job) is not None),
            gr.Button(visible=job.over and job.unfinished),
        ]  # fmt: skip

    def on_use(layout, request: gr.Request):
        job = studio.training_of(request.session_hash)
        label = studio.label_of(job) if job else None
        if label is None:
            return [gr.skip()] * 4
        return [[{}, {label: 1.0}], layout + 1, gr.Tabs(selected="generate"), studio.first_prompt(job) or gr.skip()]

    def on_go_on(request: gr.Request):
        try:
            studio.go_on(request.session_hash)
        except PageError as error:
            return style.said(str(error), bad=True), gr.skip()
        return "", gr.Button(visible=False)

    go_on.click(on_go_on, None, [problems, go_on], **QUIET)
    use.click(on_use, page.layout, [page.columns, page.layout, page.tabs, page.prompt], **QUIET)
    return on_tick, shown, [shown, status, chart, preview, start, stop, use, go_on]


def _more(base: str, default: TrainConfig, kind) -> dict:
    """The folded fields of the training form, by the name that they have in the configurations."""
    tuner, form = TunerConfig(), {}
    with gr.Row():
        form["base"] = gr.Dropdown(
            list(dict.fromkeys([base, "tiny-sd"])), value=base, allow_custom_value=True, label="Base",
            info="The frozen model: one of these, or a hub id (owner/name).",
        )  # fmt: skip
        form["trigger_words"] = gr.Textbox(
            label="Trigger words", info="Put before every caption; type them to call the style."
        )
    with gr.Row():
        form["rank"] = gr.Number(tuner.rank, label="Rank", precision=0, minimum=1, info="Width of the tuner.")
        form["num_heads"] = gr.Number(tuner.num_heads, label="Heads", precision=0, minimum=1, info="Of its attention.")
        form["length"] = gr.Number(tuner.length, label="Length", precision=0, minimum=1, visible=False,
                                   info="Tokens of a prefix or prompt; width of an adapter.")  # fmt: skip
        form["ops"] = gr.CheckboxGroup(
            [("self-attention", "attn1"), ("cross-attention", "attn2"), ("feed-forward", "ff")], value=tuner.ops,
            label="Where", info="The operations that get a tuner beside them.",
        )  # fmt: skip
    with gr.Row():
        form["learning_rate"] = gr.Number(0, label="Learning rate", info="0: what suits the base.", minimum=0)
        form["batch_size"] = gr.Number(
            default.batch_size, label="Batch", precision=0, minimum=1, info="Pictures per step."
        )
        form["resolution"] = gr.Number(None, label="Resolution", precision=0, info="Side in pixels; 0: the base's own.")
        form["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, info="The same seed trains the same.")
    form["flip"] = gr.Checkbox(False, label="Mirror the pictures, too", info="Not if left and right matter.")
    with gr.Row():
        form["preview_every"] = gr.Number(
            100, label="Preview every", precision=0, minimum=0, info="Steps; 0 only at the end."
        )
        form["checkpoint_every"] = gr.Number(default.checkpoint_every, label="Checkpoint every", precision=0, minimum=1,
                                             info="Steps; Compare can set them side by side.")  # fmt: skip
    form["preview_prompts"] = gr.Textbox(
        label="Preview prompts", lines=2, info="One on each line; empty: the first captions."
    )
    some = ("rank", "num_heads", "length", "ops")  # without effect for some kinds
    kind.change(lambda k: [gr.update(visible=matters(k, n)) for n in some], kind, [form[n] for n in some], **QUIET)
    return form
