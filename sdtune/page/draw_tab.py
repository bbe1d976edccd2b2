"""The Draw tab: one prompt, drawn in several columns, each with its own adapters, from the same noise."""

import secrets

import gradio as gr

from . import html_parts
from .column_cards import build_column_cards, rebuild_cards
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
from .errors import plain_message
from .png_settings import Settings, read_png
from .samplers import SAMPLERS
from .style import LIGHTBOX


def build_draw_tab(window: Window) -> None:
    """Lays out the tab and connects it."""
    backend = window.backend
    with gr.Row(equal_height=True):
        window.prompt = prompt = gr.Textbox(
            EXAMPLE_PROMPTS[0], label="Prompt", info="What the images show.", lines=2, scale=8, min_width=300,
            elem_id="prompt",
        )  # fmt: skip
        with gr.Column(scale=2, min_width=150):
            draw = gr.Button("Draw", variant="primary", elem_id="draw")
            stop = gr.Button("Stop", interactive=False, elem_id="stop")
    with gr.Row(equal_height=True):
        seed = gr.Number(1, label="Seed", precision=0, minimum=0, scale=2, min_width=180, elem_id="seed",
                         info="Of the first image of each column.")  # fmt: skip
        new_seed = gr.Button("New seed", scale=0, min_width=112, elem_id="new-seed")
        images = gr.Slider(1, 8, 1, step=1, label="Images", info="Per column, each with the next seed.", scale=3,
                           min_width=200, elem_id="images")  # fmt: skip
        guidance = guidance_slider(backend, scale=3)
    with gr.Accordion("Negative prompt, steps, sampler, clip skip, size", open=False, elem_id="more-draw"):
        negative = gr.Textbox(label="Negative prompt", info="What the images should not show.", lines=1)
        with gr.Row():
            steps = steps_slider("steps")
            sampler = gr.Dropdown(list(SAMPLERS), value=backend.drawings.sampler, label="Sampler", min_width=200,
                                  info="How the noise is removed, step by step.")  # fmt: skip
            layers = backend.pipe.text_encoder.config.num_hidden_layers
            clip_skip = gr.Dropdown([("as the tuners were trained", 0), *((str(i), i) for i in range(1, layers + 1))],
                                    value=0, label="Clip skip", min_width=200, elem_id="clip-skip",
                                    info="1 is the last layer, 2 is usual for anime.")  # fmt: skip
        width, height = size_fields(backend, "draw")
    build_column_cards(window)
    status = gr.HTML(elem_classes="status", elem_id="draw-status")
    drawn = gr.HTML(html_parts.empty_result("The images appear here. All columns start from the same noise."),
                    js_on_load=LIGHTBOX, elem_id="drawn-images")  # fmt: skip
    restore = gr.File(label="Drop a PNG from this page to restore its settings", file_types=[".png"], height=104,
                      elem_id="restore")  # fmt: skip
    fields = [prompt, negative, seed, images, steps, guidance, width, height, clip_skip, sampler]

    async def on_draw(
        prompt, negative, seed, images, steps, guidance, width, height, clip_skip, sampler, columns,
        request: gr.Request,
    ):  # fmt: skip
        try:
            settings = Settings(
                prompt or "", negative or "", to_int(seed), to_int(steps), float(guidance), to_int(width) or None,
                to_int(height) or None, to_int(images), sampler, columns, to_int(clip_skip) or None,
            )  # fmt: skip
            job = backend.drawings.draw_columns(request.session_hash, settings)
        except ValueError as error:
            yield html_parts.message(plain_message(error), error=True), gr.skip(), gr.skip(), gr.skip()
            return
        async for text in follow_job(backend, job):
            yield text, gr.skip(), gr.Button(interactive=False), gr.Button(interactive=True)
        result = html_parts.image_columns(job.result.columns, settings.seed) if job.state == "done" else gr.skip()
        yield html_parts.drawing_status(job), result, gr.Button(interactive=True), gr.Button(interactive=False)

    def on_restore(file):
        if file is None:
            return [gr.skip()] * 13
        try:
            found = read_png(file)
        except ValueError as error:
            return [html_parts.message(str(error), error=True), *[gr.skip()] * 11, None]
        note = "The settings are restored."
        labels = backend.files.labels(checkpoints=True)
        missing = dict.fromkeys(label for column in found.columns for label in column if label not in labels)
        columns = [{k: weight for k, weight in column.items() if k in labels} for column in found.columns]
        if missing:
            note += f" These adapters are not in Files, so they are left out: {', '.join(missing)}."
        wanted = {images: found.images, steps: found.steps, guidance: found.guidance}
        allowed = {slider: min(max(value, slider.minimum), slider.maximum) for slider, value in wanted.items()}
        changed = [slider.label.lower() for slider in wanted if allowed[slider] != wanted[slider]]
        if changed:
            note += f" These settings were out of this page's range and are changed: {', '.join(changed)}."
        texts = (found.prompt, found.negative_prompt)
        size = found.width or backend.side, found.height or backend.side
        skip = min(found.clip_skip or 0, layers)
        sampler = found.sampler if found.sampler in SAMPLERS else backend.drawings.sampler
        return [html_parts.message(note), *texts, found.seed, *allowed.values(), *size, skip, sampler, columns, None]

    gr.on([draw.click, prompt.submit], on_draw, [*fields, window.columns], [status, drawn, draw, stop],
          concurrency_limit=None, **QUIET)  # fmt: skip
    connect_stop(backend, stop, "columns")
    new_seed.click(lambda: secrets.randbelow(2**32), outputs=seed, **QUIET)
    restored = restore.upload(on_restore, restore, [status, *fields, window.columns, restore], **QUIET)
    rebuild_cards(restored, window)
