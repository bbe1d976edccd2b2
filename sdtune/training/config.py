"""`TrainConfig`: the settings of a training run, each with its default, its help text and its range.

Imports nothing heavy, so that `--help` and wrong flags are answered at once.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

DEFAULT_OUTPUT = "output/anime"
DEFAULT_KIND = "res_attn_layer"  # of train_anime.py and the page; see assets/results/forms.md


def _option(default, help: str, **more):
    """A dataclass field with a help text, which `HfArgumentParser` shows; `more` is for `add_argument`."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help, **more})


@dataclass
class TrainConfig:
    """The settings of a training run. `train_anime.py` has a flag for each.

    Raises:
        ValueError: listing every setting that is out of range.
    """

    data: str = _option("assets/anime", "folder of images and captions, or a hub data set")
    base: str = _option("tiny-sd", "tiny-sd, a diffusers folder, a .safetensors checkpoint, or a hub id")
    output: str | None = _option(None, "folder for the tuner, previews, loss curve and checkpoints; default: "
                                 "output/anime, or where that is taken output/anime-2 and so on")  # fmt: skip
    steps: int = _option(300, "optimizer steps")
    batch_size: int = _option(10, "images per step and process")
    gradient_accumulation_steps: int = _option(1, "batches per optimizer step")
    init: str | None = _option(None, "a tuner file to start from; its kind, rank and layers are taken over, or the "
                               "rank is made greater with --rank")  # fmt: skip
    gradient_start: bool | None = _option(
        None, "start the first projection of each tuner in the directions on which the loss of the first batches "
        "depends most, which takes about as long as eight steps; possible for res_attn_layer, lora and dora; default: "
        "for res_attn_layer", nargs="?", const=True,
    )  # fmt: skip
    optimizer: Literal["adamw", "prodigy"] = _option(
        "adamw", "prodigy chooses the learning rate by itself (arXiv 2306.06101); learning_rate then multiplies it"
    )
    learning_rate: float | None = _option(None, "default: 1e-4, as published; 1e-5 for full fine-tuning; for a UNet as "
                                          "small as tiny-sd's 6e-3 and 3e-4; 1 for prodigy")  # fmt: skip
    lr_scheduler: Literal["constant", "cosine", "linear"] = _option("cosine", "shape of the rate after warm-up")
    lr_warmup_steps: int = _option(0, "steps over which the rate rises from 0")
    weight_decay: float = _option(1e-2, "weight decay, decoupled as in AdamW")
    ema_decay: float = _option(0.0, "keep the exponential moving average of the weights with this decay, such as "
                               "0.99, instead of the last ones; 0 is off")  # fmt: skip
    max_grad_norm: float = _option(1.0, "gradients are clipped to this norm; 0 is off")
    min_snr_gamma: float = _option(5.0, "min-SNR loss weights (arXiv 2303.09556); 0 is off")
    caption_dropout: float = _option(0.1, "share of captions that are replaced by the empty caption")
    shuffle_tags: bool = _option(False, "put the tags of a caption, its parts between commas, into another order")
    keep_tokens: int = _option(0, "how many tags at a caption's start stay in place, with shuffle_tags or tag_dropout")
    tag_dropout: float = _option(0.0, "share of the other tags that are left out")
    caption_variants: int = _option(20, "texts of each image that are encoded, of which a step takes one, where "
                                    "tags are shuffled or left out or captions have choices {red|blue}")  # fmt: skip
    preserve: float = _option(0.0, "weight of a loss that keeps the base's predictions for captions without trigger "
                              "words and for the empty one; 0 is off")  # fmt: skip
    noise_offset: float = _option(0.0, "strength of a random offset of each noise channel; 0 is off")
    clip_skip: int = _option(1, "the text encoder's layer, as AUTOMATIC1111 counts: 1 is the last, 2 the one before, "
                             "on which nearly all anime checkpoints of Stable Diffusion 1.5 were trained; diffusers' "
                             "own clip_skip counts one less, ComfyUI's CLIP Set Last Layer says -2 for 2")  # fmt: skip
    max_tokens: Literal[75, 150, 225] = _option(75, "how many tokens of a caption are read, in chunks of 75")
    trigger_words: str = _option("", "words put before every caption, and written into the file")
    author: str = _option("", "who made the tuner; written into the file and the model card")
    license: str = _option("", "license of the tuner, as the hub writes it (mit, cc-by-4.0, creativeml-openrail-m, "
                           "other, ...); written there, too")  # fmt: skip
    flip: bool = _option(False, "train on mirror images too")
    resolution: int | None = _option(None, "side in px of the square whose area all training pictures have, about; "
                                     "default: the base's own")  # fmt: skip
    square: bool = _option(False, "train on the square in the middle of each picture; default: each keeps its shape, "
                           "in sides of multiples of 64 px (32, 16 or 8 below 512, 256 or 128 px)")  # fmt: skip
    mask_weight: float = _option(0.0, "how much the masked parts of a picture count in the loss, from 0 to 1: what "
                                 "is black in name-mask.png, or transparent; 1 trains on all of it")  # fmt: skip
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _option(
        None, "default: what is chosen for Accelerate, else fp16 on a GPU and fp32 on a CPU"
    )
    gradient_checkpointing: bool = _option(False, "less memory, more time")
    seed: int = _option(0, "seed of the tuner's initial weights, the order of the images, and all noise")
    checkpoint_every: int = _option(200, "steps between checkpoints")
    keep_last: int | None = _option(None, "how many checkpoints are kept, the last ones; default: all")
    preview_every: int = _option(200, "steps between previews and held-out losses; 0: only at the end")
    stop_when: Literal["memorising"] | None = _option(
        None,
        "memorising: stop when the loss on the held-out pictures rises, and keep the tuner from before that; this loss "
        "tells when pictures are learnt by heart, not when drawings look best: sdtune.evaluation.choose_step does",
    )
    preview_prompts: list[str] = _option([], "prompts to preview; default: the first held-out captions")
    preview_steps: int = _option(30, "sampling steps of a preview")
    guidance_scale: float | None = _option(None, "guidance of a preview; default: 7.5, or 3 for a small UNet")
    report_to: str | None = _option(None, "an Accelerate tracker, such as tensorboard")
    push_to_hub: str | None = _option(None, "owner/name: upload the result to this model repository of the hub")
    resume: bool = _option(False, "continue the run that stopped in the output folder")

    def __post_init__(self):
        self.preview_prompts = [prompt.strip() for prompt in self.preview_prompts]
        minimum = dict(
            steps=1, batch_size=1, gradient_accumulation_steps=1, lr_warmup_steps=0, weight_decay=0, max_grad_norm=0,
            min_snr_gamma=0, noise_offset=0, preserve=0, seed=0, checkpoint_every=1, preview_every=0, preview_steps=1,
            keep_tokens=0, caption_variants=1,
        )  # fmt: skip
        # PyTorch, NumPy and the noise scheduler take no more
        maximum = dict(steps=10**9, batch_size=10**5, gradient_accumulation_steps=10**5, lr_warmup_steps=10**9,
                       checkpoint_every=10**9, preview_every=10**9, preview_steps=1000, seed=2**32 - 1)  # fmt: skip
        endless = [n for n in minimum if getattr(self, n) == float("inf")]
        low = [n for n, m in minimum.items() if not getattr(self, n) >= m]
        wrong = [f"{n} is {getattr(self, n)}; it must be at least {minimum[n]}" for n in low]
        wrong += [f"{n} is {getattr(self, n)}; it must be finite" for n in endless if n not in maximum]
        wrong += [
            f"{n} is {getattr(self, n)}; it must be at most {m}" for n, m in maximum.items() if getattr(self, n) > m
        ]
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            wrong.append(f"learning_rate is {self.learning_rate}; it must be above 0")
        if not 0 <= self.ema_decay < 1:
            wrong.append(f"ema_decay is {self.ema_decay}; it must be at least 0 and below 1")
        if self.keep_last is not None and self.keep_last < 1:
            wrong.append(f"keep_last is {self.keep_last}; it must be at least 1")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < float("inf"):
            wrong.append(f"guidance_scale is {self.guidance_scale}; it must be at least 0 and finite")
        if not isinstance(self.clip_skip, int) or not 1 <= self.clip_skip <= 12:
            wrong.append(f"clip_skip is {self.clip_skip!r}; it must be a whole number from 1, the last layer, to 12")
        for name in ("caption_dropout", "tag_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                wrong.append(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        if self.keep_tokens and not (self.shuffle_tags or self.tag_dropout):
            wrong.append(f"keep_tokens is {self.keep_tokens}; it has an effect only with shuffle_tags or tag_dropout")
        if self.caption_variants > 1000:
            wrong.append(f"caption_variants is {self.caption_variants}; it must be at most 1000")
        if not 0 <= self.mask_weight <= 1:
            wrong.append(f"mask_weight is {self.mask_weight}; it must be from 0 to 1")
        if self.resolution is not None and (not 64 <= self.resolution <= 8192 or self.resolution % 8):
            wrong.append(f"resolution is {self.resolution}; it must be from 64 to 8192 and a multiple of 8")
        if not re.fullmatch(r"[a-z0-9.-]*", self.license):
            wrong.append(f"license is {self.license!r}; expected an identifier of the hub, such as mit or cc-by-4.0")
        for name, choices in (("max_tokens", (75, 150, 225)),
                              ("lr_scheduler", ("constant", "cosine", "linear")), ("optimizer", ("adamw", "prodigy")),
                              ("stop_when", (None, "memorising")),
                              ("mixed_precision", (None, "no", "fp16", "bf16"))):  # fmt: skip
            if getattr(self, name) not in choices:
                wrong.append(f"{name} is {getattr(self, name)!r}; possible: {', '.join(map(str, choices))}")
        if wrong:
            raise ValueError("this training configuration cannot be used: " + "; ".join(wrong))
