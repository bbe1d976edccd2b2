"""The page: generate side by side, compare, train, and the library. `python app.py`, then open what it prints.

Only layout and its wiring; the work is done by `sdtune.page.studio`, the looks are in `sdtune.page.look`.
"""

import argparse
import asyncio
import os
import secrets
import signal
import sys

from sdtune.bases.properties import default_guidance
from sdtune.kernels.cpu.heap import keep_freed_memory
from sdtune.page import style
from sdtune.page.png_settings import MOST_COLUMNS, Settings, read_png
from sdtune.page.queue import Job, PageError, plain_message
from sdtune.page.studio import SAMPLERS, Axis, Studio
from sdtune.page.train_tab import QUIET, train_tab

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # offline, and nobody's business

import diffusers
import gradio as gr
import transformers

from sdtune import BaseError

EXAMPLES = [
    "a girl with long blue hair, under a night sky with a full moon, in anime style",
    "a boy with spiky black hair, smiling, in the city at sunset, in anime style",
    "a girl with pink twin tails and cat ears, laughing, in anime style",
]
AXES = [("tuner or LoRA", "tuner"), ("weight", "weight"), ("seed", "seed"), ("prompt", "prompt"),
        ("guidance", "guidance"), ("training checkpoint", "checkpoint")]  # fmt: skip
AXIS_TEXTS = {  # what is typed for an axis: label, help, what it starts with
    "weight": ("Weights", "Numbers with commas between; 0 is the base alone.", "0, 0.5, 1"),
    "seed": ("Seeds", "Whole numbers with commas between.", "1, 2, 3"),
    "prompt": ("Prompts", "One on each line.", "\n".join(EXAMPLES)),
    "guidance": ("Guidances", "Numbers with commas between.", "2, 4, 7.5"),
}
LIVE_SECONDS = 2.0  # where a picture takes longer, a new weight ends the drawing of the old one


def whole(value, default: int = 0) -> int:
    """A number field's value; empty fields count as the default."""
    return default if value is None else int(value)


class Page:
    """The page for one studio. Each method that makes a tab also connects it."""

    def __init__(self, studio: Studio):
        self.studio = studio
        self.guidance = default_guidance(studio.pipe)
        with gr.Blocks(title="sdtune", delete_cache=(3600, 24 * 3600)) as self.blocks:
            self.columns = gr.State([{}])  # what Generate sets side by side: label -> weight, for each column
            self.layout = gr.State(0)  # grows when the cards of the columns must be laid out anew
            self.version = gr.State(0)  # of the library, as this window knows it
            self.top = gr.HTML(style.top(studio.base_name, studio.side, "device free", False), elem_id="top")
            with gr.Tabs(selected="generate", overflow_behavior="wrap") as self.tabs:
                with gr.Tab("Generate", id="generate"):
                    self._generate()
                with gr.Tab("Compare", id="compare"):
                    self._compare()
                with gr.Tab("Train", id="train"):
                    self.on_tick = train_tab(self)
                with gr.Tab("Library", id="library"):
                    self._library()
            self._tick()

    # ------------------------------------------------------------------------------------- generate

    def _generate(self) -> None:
        studio = self.studio
        with gr.Row(equal_height=True):
            self.prompt = gr.Textbox(
                EXAMPLES[0], label="Prompt", info="What the pictures show.", lines=2, scale=8, min_width=300,
                elem_id="prompt",
            )  # fmt: skip
            with gr.Column(scale=2, min_width=150):
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                stop = gr.Button("Stop", interactive=False, elem_id="stop")
        with gr.Row(equal_height=True):
            seed = gr.Number(
                1, label="Seed", precision=0, minimum=0, scale=2, min_width=120, elem_id="seed",
                info="The same noise in every column.",
            )  # fmt: skip
            dice = gr.Button("🎲 New seed", elem_classes="dice", scale=0, min_width=112, elem_id="dice")
            images = gr.Slider(1, 8, 1, step=1, label="Pictures", scale=3, min_width=160, elem_id="images",
                               info="In each column, on the next seeds.")  # fmt: skip
            guidance = self._guidance_slider(scale=3)
        with gr.Accordion("More: negative prompt, steps, size, sampler", open=False):
            negative = gr.Textbox(label="Negative prompt", lines=1, info="What the pictures should not show.")
            with gr.Row():
                steps = self._steps_slider("steps")
                size = self._size_slider()
                sampler = gr.Dropdown(list(SAMPLERS), value=studio.sampler, label="Sampler", min_width=160,
                                      info="How noise becomes a picture.")  # fmt: skip
        self._cards()
        status = gr.HTML(elem_classes="status", elem_id="generate-status")
        sheet = gr.HTML(style.empty("Draw: every column starts from the same noise."), js_on_load=style.LIGHTBOX,
                        elem_id="sheet")  # fmt: skip
        restore = gr.File(
            label="Drop a picture to restore its settings", file_types=[".png"], height=104,
            elem_id="restore",
        )  # fmt: skip
        fields = [self.prompt, negative, seed, images, steps, guidance, size, sampler]

        async def on_draw(prompt, negative, seed, images, steps, guidance, size, sampler, columns, request: gr.Request):
            try:
                settings = Settings(
                    prompt or "", negative or "", whole(seed), whole(steps), float(guidance), whole(size) or None,
                    whole(images), sampler, columns,
                )  # fmt: skip
                job = studio.draw(request.session_hash, settings)
            except ValueError as error:
                yield style.said(plain_message(error), bad=True), gr.skip(), gr.skip(), gr.skip()
                return
            async for text in self._follow(job):
                yield text, gr.skip(), gr.Button(interactive=False), gr.Button(interactive=True)
            sheet = style.sheet(job.result.columns, settings.seed) if job.state == "done" else gr.skip()
            yield style.drawing(job, 0), sheet, gr.Button(interactive=True), gr.Button(interactive=False)

        def on_restore(file, current):
            if file is None:
                return [gr.skip()] * 11
            try:
                found = read_png(file)
            except ValueError as error:
                return [style.said(str(error), bad=True), *[gr.skip()] * 9, None]
            here, lost, columns = studio.library.offered(checkpoints=True), [], []
            for column in found.columns:
                lost += [label for label in column if label not in here]
                columns.append({label: weight for label, weight in column.items() if label in here})
            note = "Restored."
            if lost:
                note += f" Not in the library, so left out: {', '.join(dict.fromkeys(lost))}."
            sampler = found.sampler if found.sampler in SAMPLERS else studio.sampler
            wanted = {images: found.images, steps: found.steps, guidance: found.guidance}
            wanted[size] = found.size or studio.side
            fitted = {slider: min(max(value, slider.minimum), slider.maximum) for slider, value in wanted.items()}
            cut = [s.label.lower() for s in wanted if fitted[s] != wanted[s]]
            if cut:
                note += f" Beyond what this page draws, so changed: {', '.join(cut)}."
            texts = (found.prompt, found.negative_prompt)
            return [style.said(note), *texts, found.seed, *fitted.values(), sampler, columns, None]

        again = dict(fn=lambda n: n + 1, inputs=self.layout, outputs=self.layout, **QUIET)
        gr.on([draw.click, self.prompt.submit], on_draw, [*fields, self.columns], [status, sheet, draw, stop],
              concurrency_limit=None, **QUIET)  # fmt: skip
        self._stops(stop, "columns")
        dice.click(lambda: secrets.randbelow(2**32), outputs=seed, **QUIET)
        restore.upload(on_restore, [restore, self.columns], [status, *fields, self.columns, restore], **QUIET).then(
            **again
        )

    def _cards(self) -> None:
        """The columns to draw, as cards: what is in each, with which weight."""
        studio, again = self.studio, (lambda n: n + 1, self.layout, self.layout)

        @gr.render([self.columns], triggers=[self.layout.change], show_progress="hidden")
        def cards(columns):
            offered = studio.library.offered(checkpoints=True)
            with gr.Row(elem_id="cards"):
                for at, column in enumerate(columns):
                    column = {label: weight for label, weight in column.items() if label in offered}
                    with gr.Column(min_width=200, elem_classes="card"):
                        card(at, column, offered, len(columns) > 1)
                if len(columns) < MOST_COLUMNS and offered:
                    gr.Button("+ Add a column", size="sm", scale=0, min_width=84, elem_id="add-column").click(
                        lambda columns: [*columns, {}], self.columns, self.columns, **QUIET
                    ).then(*again, **QUIET)

        self.version.change(*again, **QUIET)

        def card(at, column, offered, can_go):
            def on_pick(labels, columns):
                return [*columns[:at], {n: columns[at].get(n, 1.0) for n in labels or []}, *columns[at + 1 :]]

            pick = gr.Dropdown(
                offered, value=list(column), multiselect=True, label=f"Column {at + 1}", interactive=True,
                info="Several are mixed." if column else "The base alone; choose what to add.",
            )  # fmt: skip
            pick.input(on_pick, [pick, self.columns], self.columns, **QUIET).then(*again, **QUIET)
            for label, weight in column.items():

                def on_slide(weight, columns, label=label):
                    changed = {n: weight if n == label else w for n, w in columns[at].items()}
                    return [*columns[:at], changed, *columns[at + 1 :]]

                slide = gr.Slider(
                    min(0, weight), max(2, weight), weight, step=0.05, label=f"Weight of {label}", interactive=True,
                    info="0: the base. 1: as trained.", buttons=[],
                )  # fmt: skip
                slide.change(on_slide, [slide, self.columns], self.columns, queue=False, **QUIET)
            if can_go:
                gr.Button("✕ Remove", size="sm", elem_classes="away").click(
                    lambda columns: columns[:at] + columns[at + 1 :], self.columns, self.columns, **QUIET
                ).then(*again, **QUIET)

    def _steps_slider(self, name: str) -> gr.Slider:
        return gr.Slider(1, 100, 25, step=1, label="Steps", info="More take longer and draw finer.", min_width=160,
                         elem_id=name)  # fmt: skip

    def _guidance_slider(self, **options) -> gr.Slider:
        return gr.Slider(1, 15, self.guidance, step=0.5, label="Guidance", min_width=160,
                         info="How strictly the prompt is followed.", **options)  # fmt: skip

    def _size_slider(self) -> gr.Slider:
        side = self.studio.side
        return gr.Slider(max(64, side // 2), 2 * side, side, step=32, label="Size", min_width=160,
                         info=f"Side in pixels; this base was trained at {side}.")  # fmt: skip

    async def _follow(self, job: Job):
        """HTML that says how far a job is, each time that changes, until it is over."""
        shown = None
        while not job.over:
            text = style.drawing(job, self.studio.device.ahead(job))
            if text != shown:
                shown = text
                yield text
            await asyncio.sleep(0.1)

    def _stops(self, button: gr.Button, slot: str) -> None:
        """A click ends this window's job of a slot, at the next step."""

        def on_stop(request: gr.Request):
            self._stop(request.session_hash, slot)

        button.click(on_stop, queue=False, **QUIET)

    def _stop(self, owner: str, slot: str) -> None:
        for job in self.studio.device.jobs():
            if job.owner == owner and job.slot == slot:
                self.studio.device.stop(job)

    # -------------------------------------------------------------------------------------- compare

    def _compare(self) -> None:
        with gr.Tabs():
            with gr.Tab("Grid"):
                self._grid()
            with gr.Tab("Weight slider"):
                self._slider()

    def _grid(self) -> None:
        studio = self.studio
        with gr.Row():
            parts = [self._axis("Across", "weight", AXES), self._axis("Down", "seed", [("nothing", ""), *AXES])]
        with gr.Row():
            tuner = gr.Dropdown(
                [], label="Tuner or LoRA", info="What all pictures are drawn with.", elem_id="grid-tuner"
            )
            weight = gr.Slider(0, 2, 1, step=0.05, label="Weight", info="0 is the base.", visible=False)
            seed = gr.Number(1, label="Seed", precision=0, minimum=0, info="The starting noise.", visible=False)
            guidance = self._guidance_slider()
            steps = self._steps_slider("grid-steps")
        prompt = gr.Textbox(EXAMPLES[0], label="Prompt", info="What all pictures show.", lines=2)
        with gr.Row():
            draw = gr.Button("Draw the grid", variant="primary", elem_id="draw-grid")
            stop = gr.Button("Stop", interactive=False)
        status = gr.HTML(elem_classes="status", elem_id="grid-status")
        sheet = gr.HTML(style.empty("Two axes make a grid of labelled pictures, to be downloaded as one."),
                        js_on_load=style.LIGHTBOX, elem_id="grid")  # fmt: skip
        (across, across_text, across_pick), (down, down_text, down_pick) = parts
        fixed = [tuner, weight, seed, guidance, prompt]

        def on_axes(x, y):
            """Shows a control only where it has an effect: not what an axis decides."""
            taken = {x, y}
            both = bool(taken & {"tuner", "checkpoint"})
            return (gr.update(visible=not both), gr.update(visible="weight" not in taken),
                    *(gr.update(visible=name not in taken) for name in ("seed", "guidance", "prompt")))  # fmt: skip

        def on_axis(name):
            label, info, start = AXIS_TEXTS.get(name, ("", "", ""))
            choices = self._labels(name)
            lines = 3 if name == "prompt" else 1
            return (gr.update(visible=name in AXIS_TEXTS, label=label, info=info, value=start, lines=lines),
                    gr.update(visible=name in ("tuner", "checkpoint"), choices=choices, value=choices))  # fmt: skip

        async def on_draw(
            x, x_text, x_pick, y, y_text, y_pick, tuner, weight, seed, guidance, prompt, steps, request: gr.Request
        ):
            try:
                if x == y or {x, y} == {"tuner", "checkpoint"}:
                    raise PageError("both axes change the same thing; choose another one for one of them")
                axes = Axis.parse(x, x_text or "", x_pick), Axis.parse(y, y_text or "", y_pick)
                if not tuner and not {x, y} & {"tuner", "checkpoint"} and "weight" in {x, y}:
                    raise PageError("a weight needs a tuner or LoRA; choose one")
                column = {tuner or "": weight} if tuner or {x, y} & {"tuner", "checkpoint"} else {}
                settings = Settings(
                    prompt or "", "", whole(seed), whole(steps), guidance, None, 1, studio.sampler, [column]
                )
                job = studio.draw_grid(request.session_hash, settings, *axes)
            except ValueError as error:
                yield style.said(plain_message(error), bad=True), gr.skip(), gr.skip(), gr.skip()
                return
            async for text in self._follow(job):
                yield text, gr.skip(), gr.Button(interactive=False), gr.Button(interactive=True)
            sheet = style.sheet(job.result.columns) if job.state == "done" else gr.skip()
            yield style.drawing(job, 0), sheet, gr.Button(interactive=True), gr.Button(interactive=False)

        for axis, text, pick in parts:
            axis.change(on_axis, axis, [text, pick], **QUIET)
            gr.on([axis.change], on_axes, [across, down], fixed, **QUIET)
        draw.click(on_draw, [across, across_text, across_pick, down, down_text, down_pick, *fixed, steps],
                   [status, sheet, draw, stop], concurrency_limit=None, **QUIET)  # fmt: skip
        self._stops(stop, "grid")

        def on_version(x, y, chosen, x_pick, y_pick):
            offered = studio.library.offered(checkpoints=True)
            kept = chosen if chosen in offered else next(iter(offered), None)
            picks = [gr.update(choices=self._labels(name), value=[v for v in value or [] if v in self._labels(name)])
                     for name, value in ((x, x_pick), (y, y_pick))]  # fmt: skip
            return gr.update(choices=offered, value=kept), *picks

        self.version.change(
            on_version, [across, down, tuner, across_pick, down_pick], [tuner, across_pick, down_pick], **QUIET
        )

    def _axis(self, label: str, start: str, choices) -> tuple:
        with gr.Column(elem_classes="card", min_width=260):
            axis = gr.Dropdown(choices, value=start, label=f"{label}: what changes", elem_id=f"axis-{label.lower()}",
                               info=f"From picture to picture, {label.lower()}.")  # fmt: skip
            title, info, value = AXIS_TEXTS[start]
            text = gr.Textbox(value, label=title, info=info, elem_id=f"values-{label.lower()}")
            pick = gr.Dropdown([], multiselect=True, label="Which", info="In this order.", visible=False,
                               elem_id=f"which-{label.lower()}")  # fmt: skip
        return axis, text, pick

    def _labels(self, axis: str) -> list[str]:
        """What can be chosen for an axis of tuners or of checkpoints."""
        if axis == "tuner":
            return ["base", *self.studio.library.offered()]
        runs = self.studio.library.runs()
        return [label for labels in runs.values() for label in labels] if axis == "checkpoint" else []

    def _slider(self) -> None:
        studio = self.studio
        with gr.Row():
            tuner = gr.Dropdown([], label="Tuner or LoRA", info="What the slider weighs.", elem_id="live-tuner")
            seed = gr.Number(1, label="Seed", precision=0, minimum=0, info="The starting noise.")
            steps = gr.Slider(1, 50, 12, step=1, label="Steps", info="Few, so that it follows the slider.")
        prompt = gr.Textbox(EXAMPLES[0], label="Prompt", info="What the picture shows.")
        weight = gr.Slider(0, 2, 1, step=0.05, label="Weight", elem_id="live-weight",
                           info="Move it, and the picture is drawn again from the same noise.")  # fmt: skip
        status = gr.HTML(elem_classes="status", elem_id="live-status")
        sheet = gr.HTML(style.empty("Move the slider."), js_on_load=style.LIGHTBOX, elem_id="live")
        seconds = gr.State(0.0)  # how long the last picture took

        async def on_move(tuner, weight, prompt, seed, steps, request: gr.Request):
            try:
                columns = [{}, {tuner: weight}] if tuner else [{}]
                sampler, guidance = studio.sampler, self.guidance
                settings = Settings(prompt or "", "", whole(seed), whole(steps), guidance, None, 1, sampler, columns)
                job = studio.draw(request.session_hash, settings, "live")
            except ValueError as error:
                yield style.said(plain_message(error), bad=True), gr.skip(), gr.skip()
                return
            async for text in self._follow(job):
                yield text, gr.skip(), gr.skip()
            if job.state == "done":
                told = style.said(f"weight {weight:g}. {job.note}")
                yield told, style.sheet(job.result.columns, settings.seed), job.seconds
            elif job.state == "failed":
                yield style.drawing(job, 0), gr.skip(), gr.skip()

        def hurry(seconds, request: gr.Request):
            """Where a picture takes long, a new weight does not wait for the end of the old one's."""
            if seconds > LIVE_SECONDS:
                self._stop(request.session_hash, "live")

        weight.input(hurry, seconds, queue=False, **QUIET)
        gr.on(
            [weight.input, tuner.input, prompt.submit, seed.submit, steps.release], on_move,
            [tuner, weight, prompt, seed, steps], [status, sheet, seconds],
            trigger_mode="always_last", concurrency_limit=None, **QUIET,
        )  # fmt: skip

        def on_version(chosen):
            offered = studio.library.offered(checkpoints=True)
            return gr.update(choices=offered, value=chosen if chosen in offered else next(iter(offered), None))

        self.version.change(on_version, tuner, tuner, **QUIET)

    # -------------------------------------------------------------------------------------- library

    def _library(self) -> None:
        studio = self.studio
        with gr.Row(equal_height=True):
            hub = gr.Textbox(label="From the hub", placeholder="owner/name", scale=3, min_width=200, elem_id="hub",
                             info="A repository with a tuner or LoRA; Enter fetches it.")  # fmt: skip
            file = gr.File(label="Drop a .safetensors file to add it", file_types=[".safetensors"], height=104, scale=4,
                           min_width=220, elem_id="add-file")  # fmt: skip
            refresh = gr.Button("Look again", scale=1, min_width=110, elem_id="refresh")
        status = gr.HTML(elem_id="library-status")
        shelf = gr.HTML(elem_id="shelf")

        def show():
            studio.library.scan()
            return style.shelf(list(studio.library.items.values()))

        def add(fetch):
            def on_add(source):
                if not source:
                    return gr.skip(), gr.skip(), None
                try:
                    return style.said(f"Added {fetch(source)}."), show(), None
                except (ValueError, OSError) as error:
                    return style.said(plain_message(error), bad=True), gr.skip(), None

            return on_add

        hub.submit(add(studio.add_from_hub), hub, [status, shelf, hub], **QUIET)
        file.upload(add(studio.add_file), file, [status, shelf, file], **QUIET)
        gr.on([refresh.click, self.version.change], show, None, shelf, **QUIET)

    # ----------------------------------------------------------------------------------- every second

    def _tick(self) -> None:
        studio = self.studio
        on_train, shown, train_outputs = self.on_tick

        def on_load():
            return studio.default_columns(), studio.library.scan()

        def on_tick(shown, version, request: gr.Request):
            new = studio.library.scan_sometimes()
            return [
                style.top(studio.base_name, studio.side, *studio.doing(request.session_hash)),
                new if new != version else gr.skip(), *on_train(shown, request),
            ]  # fmt: skip

        self.blocks.load(on_load, None, [self.columns, self.version], **QUIET)
        gr.Timer(1.0).tick(on_tick, [shown, self.version], [self.top, self.version, *train_outputs], **QUIET)

        def on_unload(request: gr.Request):
            studio.forget(request.session_hash)

        self.blocks.unload(on_unload)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--base", default="tiny-sd", help="tiny-sd, a diffusers folder, a .safetensors checkpoint, or a hub id"
    )
    parser.add_argument(
        "--output", default="output", help="folder for trainings, pictures and uploads; nothing else is written"
    )
    parser.add_argument("--server-name", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others in")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on")
    parser.add_argument("--share", action="store_true", help="also make a public link through Gradio's servers")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask for a name and password")
    args = parser.parse_args()
    if args.auth and not all(args.auth.partition(":")):
        parser.error(f"--auth is {args.auth!r}; expected user:password")
    for logging in (transformers.utils.logging, diffusers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    keep_freed_memory()
    try:
        studio = Studio(args.base, args.output)
    except BaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    os.environ["GRADIO_TEMP_DIR"] = str(studio.private.resolve() / "uploads")  # where Gradio puts what is uploaded
    return serve(studio, args)


def theme() -> gr.themes.Base:
    """Fonts of the system's only, so that the page is whole offline."""
    look = gr.themes.Default(
        primary_hue="violet", neutral_hue="slate", radius_size="lg", spacing_size="sm",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    return look.set(body_background_fill="#fbfbfd", block_border_width="0px", block_shadow="none")


def serve(studio: Studio, args) -> int:
    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        Page(studio).blocks.queue(max_size=200, default_concurrency_limit=8).launch(
            server_name=args.server_name, server_port=args.port, share=args.share,
            auth=tuple(args.auth.split(":", 1)) if args.auth else None, theme=theme(), css=style.CSS,
            allowed_paths=[str((studio.private / "pictures").resolve())], max_file_size="200mb", show_error=True,
            footer_links=[], ssr_mode=False,
        )  # fmt: skip
    except OSError as error:
        print(f"error: {error}; choose another --port", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    finally:
        studio.device.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
