"""Puts the tabs of the page together, keeps every window up to date, and serves the page."""

import os

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from ..check import sheet
from . import html_parts
from .backend import Backend
from .controls import QUIET, Window
from .draw_tab import build_draw_tab
from .errors import PageError
from .files_tab import build_files_tab
from .grid_tab import build_grid_tab
from .output_folder import OutputFolder
from .style import CSS
from .train_tab import build_train_tab
from .weight_tab import build_weight_tab

UPDATE_SECONDS = 1.0


def build_page(backend: Backend) -> gr.Blocks:
    """The page for a backend."""
    with gr.Blocks(title="sdtune", delete_cache=(3600, 24 * 3600)) as blocks:
        window = Window(backend, blocks)
        header = gr.HTML(_header(backend, "ready", False), elem_id="header")
        with gr.Tabs(selected="draw", overflow_behavior="wrap") as window.tabs:
            with gr.Tab("Draw", id="draw"):
                build_draw_tab(window)
            with gr.Tab("Grid", id="grid"):
                build_grid_tab(window)
            with gr.Tab("Weight", id="weight"):
                build_weight_tab(window)
            with gr.Tab("Train", id="train"):
                show_training, shown, training_outputs = build_train_tab(window)
            with gr.Tab("Files", id="files"):
                build_files_tab(window)

        def on_load():
            return backend.drawings.default_columns(), backend.files.scan()

        def update(shown, version, request: gr.Request):
            new_version = backend.files.scan_if_old()
            return [
                _header(backend, *backend.describe_activity(request.session_hash)),
                new_version if new_version != version else gr.skip(),
                *show_training(shown, request),
            ]

        def on_unload(request: gr.Request):
            backend.close_window(request.session_hash)

        blocks.load(on_load, None, [window.columns, window.files_version], **QUIET)
        gr.Timer(UPDATE_SECONDS).tick(
            update, [shown, window.files_version], [header, window.files_version, *training_outputs], **QUIET
        )
        blocks.unload(on_unload)
    return blocks


def launch(
    backend: Backend, server_name: str, port: int, share: bool = False, login: tuple[str, str] | None = None
) -> tuple[gr.Blocks, list[str]]:
    """Starts the web server in threads of its own.

    Returns:
        The running page, which `close()` ends, and its addresses.

    Raises:
        OSError: if the port is in use.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(backend.output.private.resolve() / "uploads")  # where Gradio puts uploads
    blocks = build_page(backend)
    _, local_url, share_url = blocks.queue(max_size=200, default_concurrency_limit=8).launch(
        server_name=server_name, server_port=port, share=share, auth=login, theme=_theme(), css=CSS + sheet.STYLE,
        allowed_paths=[str(backend.output.images.resolve())], max_file_size="200mb", show_error=True,
        footer_links=[], ssr_mode=False, quiet=True, prevent_thread_lock=True,
        app_kwargs={"middleware": [Middleware(UploadLimit, output=backend.output)]},
    )  # fmt: skip
    return blocks, [url for url in (local_url, share_url) if url]


class UploadLimit:
    """Refuses uploads that say no size or do not fit on the disk, before the server writes them to it."""

    def __init__(self, app, output: OutputFolder):
        self.app, self.output = app, output

    async def __call__(self, scope, receive, send):
        answer = self.app
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/upload"):
            length = dict(scope["headers"]).get(b"content-length", b"")
            if not length.isdigit():
                answer = PlainTextResponse("An upload must say its length.", 411)
            else:
                try:
                    self.output.require_space(int(length), "This upload")
                except PageError as error:
                    answer = PlainTextResponse(str(error), 507)
        await answer(scope, receive, send)


def _header(backend: Backend, activity: str, busy: bool) -> str:
    return html_parts.header(backend.base_name, backend.side, activity, busy)


def _theme() -> gr.themes.Base:
    """A theme that uses the fonts of the system only, so that the page needs no internet."""
    theme = gr.themes.Default(
        primary_hue="violet", neutral_hue="slate", radius_size="lg", spacing_size="sm",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    return theme.set(body_background_fill="#fbfbfd", block_border_width="0px", block_shadow="none")
