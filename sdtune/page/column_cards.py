"""The cards of the Draw tab, one for each column: which adapters it has, with which weights."""

import gradio as gr

from .controls import QUIET, Window
from .png_settings import MAX_COLUMNS


def rebuild_cards(event, window: Window) -> None:
    """Builds the cards of a window again after an event."""
    event.then(lambda version: version + 1, window.cards_version, window.cards_version, **QUIET)


def build_column_cards(window: Window) -> None:
    """Lays out the cards, and again whenever columns are added or removed or the adapter files change."""

    @gr.render([window.columns], triggers=[window.cards_version.change], show_progress="hidden")
    def cards(columns):
        labels = window.backend.files.labels(checkpoints=True)
        with gr.Row(elem_id="cards"):
            for index, column in enumerate(columns):
                column = {label: weight for label, weight in column.items() if label in labels}
                with gr.Column(min_width=200, elem_classes="card"):
                    _build_card(window, index, column, labels, removable=len(columns) > 1)
            if len(columns) < MAX_COLUMNS and labels:
                add = gr.Button("+ Add a column", size="sm", scale=0, min_width=84, elem_id="add-column")
                added = add.click(lambda columns: [*columns, {}], window.columns, window.columns, **QUIET)
                rebuild_cards(added, window)

    def on_files(version, columns):
        labels = window.backend.files.labels(checkpoints=True)
        gone = dict.fromkeys(label for column in columns for label in column if label not in labels)
        if gone:
            gr.Info(f"These adapters are not in Files any more, so they are left out: {', '.join(gone)}.")
        return version + 1, [{k: weight for k, weight in column.items() if k in labels} for column in columns]

    state = [window.cards_version, window.columns]
    window.files_version.change(on_files, state, state, **QUIET)


def _build_card(window: Window, index: int, column: dict[str, float], labels: list[str], removable: bool) -> None:
    def on_adapters(chosen, columns):
        adapters = {label: columns[index].get(label, 1.0) for label in chosen or []}
        return [*columns[:index], adapters, *columns[index + 1 :]]

    adapters = gr.Dropdown(
        labels, value=list(column), multiselect=True, label=f"Column {index + 1}", interactive=True,
        info="Choose several adapters to mix them." if column else "The base alone. Choose adapters to add.",
    )  # fmt: skip
    rebuild_cards(adapters.input(on_adapters, [adapters, window.columns], window.columns, **QUIET), window)
    for label, weight in column.items():

        def on_weight(weight, columns, label=label):
            changed = {other: weight if other == label else w for other, w in columns[index].items()}
            return [*columns[:index], changed, *columns[index + 1 :]]

        slider = gr.Slider(
            min(0, weight), max(2, weight), weight, step=0.05, label=f"Weight of {label}", interactive=True,
            info="0 is the base, 1 is as trained.", buttons=[],
        )  # fmt: skip
        slider.change(on_weight, [slider, window.columns], window.columns, queue=False, **QUIET)
    if removable:
        remove = gr.Button("✕ Remove", size="sm", elem_classes="remove")
        removed = remove.click(
            lambda columns: columns[:index] + columns[index + 1 :], window.columns, window.columns, **QUIET
        )
        rebuild_cards(removed, window)
