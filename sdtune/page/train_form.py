"""The folded fields of the training form."""

import gradio as gr

from ..training.config import DEFAULT_KIND, TrainConfig
from ..tuners.config import CONV_KINDS, TunerConfig, default_ops, fields_of
from .controls import QUIET
from .files import LAYER_NAMES, AdapterFiles

FRESH = "a fresh tuner"


def build_more_fields(base: str, kind: gr.Dropdown, files: AdapterFiles) -> dict[str, gr.components.Component]:
    """Lays out the fields, by their names in `Trainings.plan`; those without effect are hidden.

    Args:
        base: the loaded base.
        kind: the field with the kind of tuner, on which it depends which fields have an effect.
        files: of which a training can start from a tuner.
    """
    default, tuner, form = TrainConfig(), TunerConfig(DEFAULT_KIND), {}
    with gr.Row():
        form["base"] = gr.Dropdown(
            list(dict.fromkeys([base, "tiny-sd"])), value=base, allow_custom_value=True, label="Base", min_width=200,
            info="One of these, or a hub id such as owner/name.",
        )  # fmt: skip
        form["trigger_words"] = gr.Textbox(label="Trigger words", info="Put before every caption.", min_width=200)
        form["clip_skip"] = gr.Number(default.clip_skip, label="Clip skip", precision=0, minimum=1, maximum=12,
                                      info="2 for anime checkpoints of SD 1.5.", min_width=122)  # fmt: skip
    with gr.Row():
        form["shuffle_tags"] = gr.Checkbox(
            False, label="Shuffle tags", info="The parts of captions between commas.", min_width=122
        )
        form["keep_tokens"] = gr.Number(0, label="Keep tags", precision=0, minimum=0, info="First ones, in place.",
                                        min_width=122)  # fmt: skip
        form["tag_dropout"] = gr.Number(0, label="Tag dropout", minimum=0, maximum=1, info="Share left out.",
                                        min_width=122)  # fmt: skip
        form["max_tokens"] = gr.Dropdown([75, 150, 225], value=default.max_tokens, label="Tokens",
                                         info="Read of a caption.", min_width=122)  # fmt: skip
    with gr.Row():
        form["rank"] = gr.Number(tuner.rank, label="Rank", precision=0, minimum=1, info="Width of the tuner.")
        form["num_heads"] = gr.Number(tuner.num_heads, label="Heads", precision=0, minimum=1,
                                      info="Attention heads.")  # fmt: skip
        form["length"] = gr.Number(tuner.length, label="Length", precision=0, minimum=1, visible=False,
                                   info="Tokens of a prefix or prompt, or width of an adapter.")  # fmt: skip
        form["ops"] = gr.CheckboxGroup(
            _layer_choices(tuner.kind), value=tuner.ops, label="Layers",
            info="The layers that get a tuner.",
        )  # fmt: skip
    with gr.Row():
        form["learning_rate"] = gr.Number(0, label="Learning rate", info="0: the default.", minimum=0, min_width=122)
        form["batch_size"] = gr.Number(default.batch_size, label="Batch size", precision=0, minimum=1,
                                       info="Images per step.", min_width=122)  # fmt: skip
        form["resolution"] = gr.Number(None, label="Resolution", precision=0, info="Side of the area. 0: the base's.",
                                       min_width=122)  # fmt: skip
        form["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, info="Of all noise.", min_width=122)
    with gr.Row():
        form["optimizer"] = gr.Dropdown([("AdamW", "adamw"), ("Prodigy, finds the learning rate", "prodigy")],
                                        value=default.optimizer, label="Optimizer", min_width=200)  # fmt: skip
        form["ema_decay"] = gr.Number(0, label="Averaged weights", minimum=0, maximum=0.9999, min_width=122,
                                      info="Decay, as 0.99. 0: off.")  # fmt: skip
        form["preserve"] = gr.Number(0, label="Preserve the base", minimum=0, min_width=122,
                                     info="Without trigger words. 0: off.")  # fmt: skip
        form["init"] = gr.Dropdown([(FRESH, ""), *files.labels()], value="", label="Start from", min_width=200,
                                   info="Kind and size are then that tuner's.")  # fmt: skip
        form["heldout"] = gr.Number(0, label="Held-out images", precision=0, minimum=0, min_width=200,
                                    info="Of your own; they judge the steps.", elem_id="heldout")  # fmt: skip
        # the list is read again when it is opened, since files come and go
        form["init"].focus(lambda: gr.update(choices=[(FRESH, ""), *files.labels()]), None, form["init"], **QUIET)
    with gr.Row():
        form["flip"] = gr.Checkbox(
            False, label="Also train on mirrored images", info="Leave it off if left and right matter."
        )
        form["square"] = gr.Checkbox(
            False, label="Crop to squares", info="Off: each image keeps its shape.", elem_id="square"
        )
        form["mask_weight"] = gr.Slider(
            0, 1, default.mask_weight, step=0.05, label="Weight of what is masked", min_width=200,
            info="Of transparent parts, and of what is black in name-mask.png. 1: masks do not count.",
        )  # fmt: skip
    with gr.Row():
        form["preview_every"] = gr.Number(100, label="Preview every", precision=0, minimum=0, min_width=200,
                                          info="Steps. 0: only at the end.")  # fmt: skip
        form["checkpoint_every"] = gr.Number(default.checkpoint_every, label="Checkpoint every", precision=0, minimum=1,
                                             info="Steps. Compare them in Grid.", min_width=200)  # fmt: skip
        form["keep_last"] = gr.Number(None, label="Keep checkpoints", precision=0, minimum=0, min_width=200,
                                      info="The last ones. 0: all.")  # fmt: skip
    form["preview_prompts"] = gr.Textbox(
        label="Preview prompts", lines=2, info="One per line. Empty: the first captions."
    )
    depend_on_kind = ("rank", "num_heads", "length", "ops")

    def update_fields(kind: str) -> list:
        layers = dict(choices=_layer_choices(kind), value=default_ops(kind))
        return [
            gr.update(visible=name in fields_of(kind), **(layers if name == "ops" else {})) for name in depend_on_kind
        ]

    kind.change(update_fields, kind, [form[name] for name in depend_on_kind], **QUIET)
    return form


def _layer_choices(kind: str) -> list[tuple[str, str]]:
    """The layers that this kind of tuner can be on, with their names."""
    return [(name, op) for op, name in LAYER_NAMES.items() if op != "conv" or kind in CONV_KINDS]
