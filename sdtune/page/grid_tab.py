"""The Grid tab: a grid of labelled images in which one setting changes across and another one down."""

import gradio as gr

from . import html_parts
from .controls import (
    EXAMPLE_PROMPTS,
    QUIET,
    Window,
    connect_stop,
    follow_job,
    guidance_slider,
    size_fields,
    steps_slider,
    to_int,
)
from .errors import PageError, plain_message
from .files import AdapterFiles
from .grid_axes import parse_axis
from .png_settings import Settings
from .style import LIGHTBOX

AXIS_CHOICES = [("adapter", "adapter"), ("weight", "weight"), ("seed", "seed"), ("prompt", "prompt"),
                ("guidance", "guidance"), ("training checkpoint", "checkpoint")]  # fmt: skip
ADAPTER_AXES = {"adapter", "checkpoint"}
AXIS_VALUES = {  # for each axis whose values are typed: label, info, first content
    "weight": ("Weights", "Numbers separated by commas; 0 is the base alone.", "0, 0.5, 1"),
    "seed": ("Seeds", "Whole numbers separated by commas.", "1, 2, 3"),
    "prompt": ("Prompts", "One per line.", "\n".join(EXAMPLE_PROMPTS)),
    "guidance": ("Guidance values", "Numbers separated by commas.", "2, 4, 7.5"),
}


def build_grid_tab(window: Window) -> None:
    """Lays out the tab and connects it."""
    backend = window.backend
    with gr.Row():
        axes = [_build_axis("Across", "weight", AXIS_CHOICES),
                _build_axis("Down", "seed", [("nothing", ""), *AXIS_CHOICES])]  # fmt: skip
    with gr.Row():
        adapter = gr.Dropdown([], label="Adapter", info="The tuner or LoRA of all images.", elem_id="grid-adapter",
                              min_width=200)  # fmt: skip
        weight = gr.Slider(0, 2, 1, step=0.05, label="Weight", info="0 is the base, 1 is as trained.", visible=False)
        seed = gr.Number(1, label="Seed", precision=0, minimum=0, info="Of all images.", visible=False)
        guidance = guidance_slider(backend)
        steps = steps_slider("grid-steps")
    prompt = gr.Textbox(EXAMPLE_PROMPTS[0], label="Prompt", info="What all images show.", lines=2)
    with gr.Accordion("Size of each image", open=False, elem_id="grid-size"):
        size = size_fields(backend, "grid")
    with gr.Row():
        draw = gr.Button("Draw the grid", variant="primary", elem_id="draw-grid")
        stop = gr.Button("Stop", interactive=False)
    status = gr.HTML(elem_classes="status", elem_id="grid-status")
    drawn = gr.HTML(html_parts.empty_result("The grid appears here, as one image with labels."),
                    js_on_load=LIGHTBOX, elem_id="drawn-grid")  # fmt: skip
    (across, across_text, across_labels), (down, down_text, down_labels) = axes
    common = [adapter, weight, seed, guidance, prompt]

    def show_common(across, down):
        """Hides each common setting that an axis decides."""
        chosen = {across, down}
        return (gr.update(visible=not chosen & ADAPTER_AXES),
                *(gr.update(visible=n not in chosen) for n in ("weight", "seed", "guidance", "prompt")))  # fmt: skip

    def show_values(name):
        """Shows the field for the values of an axis."""
        label, info, value = AXIS_VALUES.get(name, ("", "", ""))
        choices = _axis_labels(backend.files, name)
        lines = 3 if name == "prompt" else 1
        return (gr.update(visible=name in AXIS_VALUES, label=label, info=info, value=value, lines=lines),
                gr.update(visible=name in ADAPTER_AXES, choices=choices, value=choices))  # fmt: skip

    async def on_draw(
        x,
        x_text,
        x_labels,
        y,
        y_text,
        y_labels,
        adapter,
        weight,
        seed,
        guidance,
        prompt,
        steps,
        width,
        height,
        request: gr.Request,
    ):
        try:
            chooses_adapter = bool({x, y} & ADAPTER_AXES)
            if x == y or {x, y} == ADAPTER_AXES:
                raise PageError("Both axes change the same setting. Choose another one for one of them.")
            if "weight" in {x, y} and not adapter and not chooses_adapter:
                raise PageError("A weight needs an adapter. Choose one.")
            column = {adapter or "": weight} if adapter or chooses_adapter else {}
            sampler = backend.drawings.sampler
            settings = Settings(prompt or "", "", to_int(seed), to_int(steps), guidance, to_int(width) or None,
                                to_int(height) or None, 1, sampler, [column])  # fmt: skip
            grid_axes = parse_axis(x, x_text or "", x_labels), parse_axis(y, y_text or "", y_labels)
            job = backend.drawings.draw_grid(request.session_hash, settings, *grid_axes)
        except ValueError as error:
            yield html_parts.message(plain_message(error), error=True), gr.skip(), gr.skip(), gr.skip()
            return
        async for text in follow_job(backend, job):
            yield text, gr.skip(), gr.Button(interactive=False), gr.Button(interactive=True)
        result = html_parts.image_columns(job.result.columns) if job.state == "done" else gr.skip()
        yield html_parts.drawing_status(job), result, gr.Button(interactive=True), gr.Button(interactive=False)

    def on_new_files(x, y, chosen, x_labels, y_labels):
        labels = backend.files.labels(checkpoints=True)
        updates = [gr.update(choices=labels, value=chosen if chosen in labels else next(iter(labels), None))]
        for name, value in ((x, x_labels), (y, y_labels)):
            choices = _axis_labels(backend.files, name)
            updates.append(gr.update(choices=choices, value=[label for label in value or [] if label in choices]))
        return updates

    for axis, text, labels in axes:
        axis.change(show_values, axis, [text, labels], **QUIET)
        axis.change(show_common, [across, down], common, **QUIET)
    draw.click(on_draw, [across, across_text, across_labels, down, down_text, down_labels, *common, steps, *size],
               [status, drawn, draw, stop], concurrency_limit=None, **QUIET)  # fmt: skip
    connect_stop(backend, stop, "grid")
    window.files_version.change(on_new_files, [across, down, adapter, across_labels, down_labels],
                                [adapter, across_labels, down_labels], **QUIET)  # fmt: skip


def _build_axis(title: str, name: str, choices) -> tuple[gr.Dropdown, gr.Textbox, gr.Dropdown]:
    """The card of one axis: the setting that changes, and its values as a text or as a choice of adapters."""
    elem_id = title.lower()
    with gr.Column(elem_classes="card", min_width=260):
        axis = gr.Dropdown(choices, value=name, label=title, info=f"The setting that changes {elem_id} the grid.",
                           elem_id=f"axis-{elem_id}")  # fmt: skip
        label, info, value = AXIS_VALUES[name]
        text = gr.Textbox(value, label=label, info=info, elem_id=f"values-{elem_id}")
        labels = gr.Dropdown([], multiselect=True, label="Adapters", info="In this order.", visible=False,
                             elem_id=f"adapters-{elem_id}")  # fmt: skip
    return axis, text, labels


def _axis_labels(files: AdapterFiles, axis: str) -> list[str]:
    """The labels that can be chosen for an axis of adapters or of checkpoints; none for another axis."""
    if axis == "adapter":
        return ["base", *files.labels()]
    return files.checkpoint_labels() if axis == "checkpoint" else []
