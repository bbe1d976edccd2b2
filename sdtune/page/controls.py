"""What several tabs share: the state of a window, sliders, and how a running job is shown and stopped."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import gradio as gr

from . import html_parts
from .backend import Backend
from .queue import Job

# Options of all event handlers: no spinner over the outputs, and no entry in Gradio's public API.
QUIET = dict(show_progress="hidden", api_visibility="private")
EXAMPLE_PROMPTS = [
    "a girl with short blue hair and green eyes, smiling, wearing a red sweater, in falling snow, in anime style",
    "a boy with spiky black hair, smiling, in the city at sunset, in anime style",
    "a girl with pink twin tails and cat ears, laughing, in anime style",
]


@dataclass
class Window:
    """The components and states that more than one tab of a window uses. Made inside `gr.Blocks`."""

    backend: Backend
    blocks: gr.Blocks
    columns: gr.State = field(default_factory=lambda: gr.State([{}]))  # the columns to draw: label -> weight, for each
    cards_version: gr.State = field(default_factory=lambda: gr.State(0))  # increases when the cards must be rebuilt
    files_version: gr.State = field(default_factory=lambda: gr.State(0))  # of the adapter files that the window shows
    tabs: gr.Tabs | None = None
    prompt: gr.Textbox | None = None  # of the Draw tab


def to_int(value, default: int = 0) -> int:
    """The value of a number field as an int; an empty field gives the default."""
    return default if value is None else int(value)


def steps_slider(elem_id: str, largest: int = 100, value: int = 25, info: str = "More steps draw finer.") -> gr.Slider:
    return gr.Slider(1, largest, value, step=1, label="Steps", info=info, min_width=200, elem_id=elem_id)


def guidance_slider(backend: Backend, scale: int = 1) -> gr.Slider:
    info = "How strictly the prompt is followed."
    return gr.Slider(1, 15, backend.guidance, step=0.5, label="Guidance", info=info, min_width=200, scale=scale)


def size_fields(backend: Backend, name: str) -> tuple[gr.Number, gr.Number]:
    """The fields for width and height, with a list of usual sizes and a button that swaps the two.

    Args:
        name: of the tab, the beginning of the fields' ids.
    """
    side = backend.side
    with gr.Row(equal_height=True):
        width, height = (
            gr.Number(side, label=label, precision=0, step=8, min_width=110, elem_id=f"{name}-{label.lower()}",
                      info=info)
            for label, info in (("Width", "A multiple of 8."), ("Height", f"The base was trained at {side}."))
        )  # fmt: skip
        swap = gr.Button("⇄ Swap", scale=0, min_width=96, elem_id=f"{name}-swap")
        usual = gr.Dropdown(
            [(f"{title}, {w} × {h}", f"{w}x{h}") for title, (w, h) in _usual_sizes(side).items()],
            value=f"{side}x{side}", label="Usual sizes", info="Fills in width and height.", min_width=200,
            elem_id=f"{name}-sizes",
        )  # fmt: skip
    swap.click(lambda w, h: (h, w), [width, height], [width, height], **QUIET)
    usual.input(lambda size: [int(part) for part in size.split("x")], usual, [width, height], **QUIET)
    return width, height


def _usual_sizes(side: int) -> dict[str, tuple[int, int]]:
    """Sizes whose shorter side is about the base's, by their titles; all in multiples of 8."""
    five_fourths, three_halves = (8 * round(side * factor / 8) for factor in (1.25, 1.5))
    return {
        "Square": (side, side),
        "Portrait 4:5": (side, five_fourths),
        "Portrait 2:3": (side, three_halves),
        "Landscape 5:4": (five_fourths, side),
        "Landscape 3:2": (three_halves, side),
    }


async def follow_job(backend: Backend, job: Job) -> AsyncIterator[str]:
    """Yields the status of a drawing as HTML whenever it changes, until the job has finished."""
    shown = None
    while not job.finished:
        status = html_parts.drawing_status(job, backend.queue.count_before(job))
        if status != shown:
            shown = status
            yield status
        await asyncio.sleep(0.1)


def connect_stop(backend: Backend, button: gr.Button, slot: str) -> None:
    """Makes a button stop the drawing of this window in a slot, at its next step."""

    def on_stop(request: gr.Request):
        backend.queue.stop_slot(request.session_hash, slot)

    button.click(on_stop, queue=False, **QUIET)
