"""The Files tab: the adapter files that the page offers, and how to add one."""

import gradio as gr

from . import html_parts
from .controls import QUIET, Window
from .errors import plain_message


def build_files_tab(window: Window) -> None:
    """Lays out the tab and connects it."""
    backend = window.backend
    with gr.Row(equal_height=True):
        hub = gr.Textbox(label="Download from the Hugging Face Hub", placeholder="owner/name", scale=3, min_width=240,
                         info="A repository with a tuner or LoRA. Press Enter.", elem_id="hub")  # fmt: skip
        upload = gr.File(label="Drop a .safetensors file to add it", file_types=[".safetensors"], height=104, scale=4,
                         min_width=240, elem_id="add-file")  # fmt: skip
    status = gr.HTML(elem_id="files-status")
    cards = gr.HTML(elem_id="file-cards")

    def show_files():
        backend.files.scan()
        return html_parts.file_cards(list(backend.files.by_label.values()))

    def make_handler(add):
        """A handler that adds a file with `add`, a function from the field's value to the added file's label."""

        def on_add(source):
            if not source:
                return gr.skip(), gr.skip(), None
            try:
                return html_parts.message(f"Added {add(source)}."), show_files(), None
            except (ValueError, OSError) as error:
                return html_parts.message(plain_message(error), error=True), gr.skip(), None

        return on_add

    hub.submit(make_handler(backend.add_from_hub), hub, [status, cards, hub], **QUIET)
    upload.upload(make_handler(backend.add_upload), upload, [status, cards, upload], **QUIET)
    window.files_version.change(show_files, None, cards, **QUIET)
