"""The Weight tab: the base next to one adapter, redrawn whenever the weight slider moves."""

import gradio as gr

from . import html_parts
from .controls import EXAMPLE_PROMPTS, QUIET, Window, follow_job, size_fields, steps_slider, to_int
from .errors import plain_message
from .png_settings import Settings
from .style import LIGHTBOX

SLOW_SECONDS = 2.0  # if a drawing takes longer, a new weight stops the one that runs


def build_weight_tab(window: Window) -> None:
    """Lays out the tab and connects it."""
    backend = window.backend
    with gr.Row():
        adapter = gr.Dropdown([], label="Adapter", info="The tuner or LoRA of the second image.", min_width=200,
                              elem_id="weight-adapter")  # fmt: skip
        seed = gr.Number(1, label="Seed", precision=0, minimum=0, info="Of both images.", min_width=200)
        steps = steps_slider("weight-steps", 50, 12, "Fewer steps follow the slider faster.")
    prompt = gr.Textbox(EXAMPLE_PROMPTS[0], label="Prompt", info="What the images show.")
    with gr.Accordion("Size", open=False):
        size = size_fields(backend, "weight")
    weight = gr.Slider(0, 2, 1, step=0.05, label="Weight", elem_id="weight-slider",
                       info="0 is the base, 1 is as trained. The images are redrawn when you move it.")  # fmt: skip
    status = gr.HTML(elem_classes="status", elem_id="weight-status")
    drawn = gr.HTML(html_parts.empty_result("Move the weight slider. The base and the adapter appear here."),
                    js_on_load=LIGHTBOX, elem_id="weight-images")  # fmt: skip
    seconds = gr.State(0.0)  # how long the last drawing took

    async def on_change(adapter, weight, prompt, seed, steps, width, height, request: gr.Request):
        columns = [{}, {adapter: weight}] if adapter else [{}]
        sampler = backend.drawings.sampler
        try:
            settings = Settings(
                prompt or "", "", to_int(seed), to_int(steps), backend.guidance, to_int(width) or None,
                to_int(height) or None, 1, sampler, columns,
            )  # fmt: skip
            job = backend.drawings.draw_columns(request.session_hash, settings, "weight")
        except ValueError as error:
            yield html_parts.message(plain_message(error), error=True), gr.skip(), gr.skip()
            return
        async for text in follow_job(backend, job):
            yield text, gr.skip(), gr.skip()
        if job.state == "done":
            text = html_parts.message(f"Weight {weight:g}. {job.note}")
            yield text, html_parts.image_columns(job.result.columns, settings.seed), job.seconds
        elif job.state == "failed":
            yield html_parts.drawing_status(job), gr.skip(), gr.skip()

    def stop_if_slow(seconds, request: gr.Request):
        if seconds > SLOW_SECONDS:
            backend.queue.stop_slot(request.session_hash, "weight")

    def on_new_files(chosen):
        labels = backend.files.labels(checkpoints=True)
        return gr.update(choices=labels, value=chosen if chosen in labels else next(iter(labels), None))

    weight.input(stop_if_slow, seconds, queue=False, **QUIET)
    gr.on(
        [weight.input, adapter.input, prompt.submit, seed.submit, steps.release, *(s.change for s in size)], on_change,
        [adapter, weight, prompt, seed, steps, *size], [status, drawn, seconds],
        trigger_mode="always_last", concurrency_limit=None, **QUIET,
    )  # fmt: skip
    window.files_version.change(on_new_files, adapter, adapter, **QUIET)
