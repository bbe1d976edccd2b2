"""The parts of a run that are made once, before the first step: encoded data, optimizer, previews, settings."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.optim.lr_scheduler import LambdaLR

from ..adapters import tuner_file
from ..bases import properties
from ..bases.text_encoding import check_clip_skip
from ..tuners.config import FULL, TunerConfig
from . import caption_variants, dataset, encoding, run_folder
from .buckets import AspectBuckets
from .config import TrainConfig
from .dataset import Pair
from .encoding import Encoded
from .errors import TrainError, shorten_list
from .images import crop_to_shape
from .loss import AttentionInFp32
from .memory import MemorySavingHooks
from .previews import Previews


def read_pairs(
    config: TrainConfig, buckets: AspectBuckets, log: Callable[[str], None]
) -> tuple[list[Pair], list[Pair]]:
    """The training pairs and the held-out pairs.

    Raises:
        DataError: with every problem of the data set.
        TrainError: if `stop_when` is set and there are no held-out pairs.
    """
    pairs, heldout = dataset.read_splits(config.data, buckets, log)
    if config.stop_when and not heldout:
        raise TrainError(
            f"--stop_when {config.stop_when} needs held-out pictures, and {config.data} has none; move some pairs, for "
            "example one of five, into a folder test/ next to train/"
        )
    return pairs, heldout


def encode_pairs(
    config: TrainConfig, pipe, pairs: list[Pair], heldout: list[Pair], buckets: AspectBuckets, device, dtype, log
) -> tuple[Encoded, Encoded | None]:
    """All pairs, encoded on a device; of the held-out ones without mirror images, or None if there are none.

    The VAE and the text encoder are moved to the CPU afterwards.
    """
    check_clip_skip(pipe.text_encoder, config.clip_skip)
    texts = caption_variants.training_texts(pairs, config)
    without = [p.name for p in pairs if not any("," in caption for caption in p.captions)]
    if without and (config.shuffle_tags or config.tag_dropout):
        log(f"{len(without)} images have captions without commas, so that no tags are found: {shorten_list(without)}")
    texts_heldout = [[caption_variants.first_text(pair, config.trigger_words)] for pair in heldout]
    names = [pair.name for pair in (*pairs, *heldout)]
    long = encoding.truncated_texts(names, texts + texts_heldout, pipe.tokenizer, config.max_tokens)
    if long:
        advice = "--max_tokens 150 or 225 reads more" if config.max_tokens < 225 else "shorten them"
        log(f"{len(long)} captions exceed {config.max_tokens} tokens and are cut: {shorten_list(long)}; {advice}")
    pipe.vae.to(device)
    pipe.text_encoder.to(device)
    models = (pipe.vae, pipe.tokenizer, pipe.text_encoder, buckets)
    more = (config.mask_weight, config.clip_skip, config.max_tokens)
    plain = [caption_variants.first_text(p, "") for p in pairs] if config.trigger_words else None
    encoded = encoding.encode(pairs, *models, config.flip, texts, *more, plain).to(device, dtype)
    encoded_heldout = None
    if heldout:
        encoded_heldout = encoding.encode(heldout, *models, False, texts_heldout, *more).to(device, dtype)
    pipe.vae.to("cpu")
    pipe.text_encoder.to("cpu")
    return encoded, encoded_heldout


def attention_precision(config: TrainConfig, unet) -> Callable[[], AbstractContextManager]:
    """A context for the forward and backward pass: attention in fp32 where a CPU trains in half precision."""
    is_half_on_cpu = unet.device.type == "cpu" and unet.dtype != torch.float32
    # a TorchFunctionMode has no effect on the forward pass that gradient checkpointing repeats
    return AttentionInFp32 if is_half_on_cpu and not config.gradient_checkpointing else nullcontext


def saved_tensor_hooks(unet, tuner: TunerConfig) -> AbstractContextManager:
    """A context for the forward pass in which fewer activations are saved, where that is possible and useful."""
    # the hooks make a step 1 % slower, and 2 % for a small UNet, which on a CPU has memory enough without them
    needs_no_hooks = unet.device.type == "cpu" and properties.is_small(unet)
    return nullcontext() if tuner.kind == FULL or needs_no_hooks else MemorySavingHooks(unet)


def continue_schedule(lr_scheduler: LambdaLR) -> None:
    """Sets the rate of the next step after a checkpoint was loaded.

    The checkpoint holds that of the schedule as it was then; with more steps it is another.
    """
    for group, base, factor in zip(lr_scheduler.optimizer.param_groups, lr_scheduler.base_lrs, lr_scheduler.lr_lambdas):
        group["lr"] = base * factor(lr_scheduler.last_epoch)
    lr_scheduler._last_lr = [group["lr"] for group in lr_scheduler.optimizer.param_groups]


def default_learning_rate(config: TrainConfig, unet, tuner: TunerConfig) -> float:
    """The rate of the paper; for a UNet as small as tiny-sd's a higher one, with which faces become whole in 300 steps.

    For Prodigy it is 1, a factor on the rate that it finds.
    """
    if config.optimizer == "prodigy":
        return 1.0
    if tuner.kind == FULL:
        return 3e-4 if properties.is_small(unet) else 1e-5
    return 6e-3 if properties.is_small(unet) else 1e-4


def create_optimizer(config: TrainConfig, weights: torch.nn.Parameter, learning_rate: float):
    """AdamW or Prodigy on the vector of all weights, and its learning rate schedule with warm-up."""
    if config.optimizer == "prodigy":
        optimizer = _create_prodigy(weights, learning_rate, config.weight_decay)
    else:
        optimizer = torch.optim.AdamW([weights], lr=learning_rate, weight_decay=config.weight_decay, fused=True)
    name = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
    schedule = get_scheduler(
        name, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=config.steps
    )  # fmt: skip
    return optimizer, schedule


def _create_prodigy(weights: torch.nn.Parameter, factor: float, weight_decay: float) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    with redirect_stdout(None):  # it prints that its weight decay is decoupled
        # with these two, as its authors advise for a schedule with warm-up and for diffusion models
        return Prodigy([weights], lr=factor, weight_decay=weight_decay, use_bias_correction=True, safeguard_warmup=True)


def create_average(config: TrainConfig, weights: torch.nn.Parameter) -> EMAModel | None:
    """The moving average of the weights, or None if it is off. Its decay rises from 0 as (1 + n) / (10 + n)."""
    return EMAModel([weights], decay=config.ema_decay) if config.ema_decay else None


def describe_preservation(config: TrainConfig) -> list[str]:
    """What a user should know about `preserve` with the other settings, a line each."""
    lines = []
    if config.preserve and not config.trigger_words:
        lines.append("--preserve keeps the base for the empty caption only, since there are no --trigger_words")
    if config.preserve and config.caption_dropout:
        lines.append(
            f"--preserve keeps the base for the empty caption, and --caption_dropout {config.caption_dropout:g} trains "
            "the empty caption on pictures; --caption_dropout 0 ends this contradiction"
        )
    return lines


def create_previews(
    config: TrainConfig, pipe, adapter_name: str, accelerator: Accelerator, pairs: list[Pair], buckets: AspectBuckets
) -> Previews:
    """Previews of the prompts in the settings, by default of the captions of the first four pairs in their shapes.

    Prompts in the settings are drawn in the shape that most of the pairs have.
    """
    shapes = [buckets.shape_for(pair.size) for pair in pairs]
    prompts, true_images = config.preview_prompts, []
    if prompts:
        shapes = [Counter(shapes).most_common(1)[0][0]] * len(prompts)
    else:
        prompts = [caption_variants.first_text(pair, config.trigger_words) for pair in pairs[:4]]
        true_images = [crop_to_shape(pair.open(), shape) for pair, shape in zip(pairs[:4], shapes)]
    guidance = config.guidance_scale
    if guidance is None:
        guidance = properties.default_guidance(pipe.unet)
    return Previews(
        pipe, adapter_name, accelerator, prompts, true_images,
        guidance=guidance, steps=config.preview_steps, shapes=shapes,
        clip_skip=config.clip_skip,
    )  # fmt: skip


def collect_settings(config: TrainConfig, resolution: int, learning_rate: float, accelerator: Accelerator) -> dict:
    """The settings as they are used, with the defaults that depend on the base and on the machine filled in."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("output", "resume", "push_to_hub")}
    settings |= {"resolution": resolution, "learning_rate": learning_rate}
    return settings | {"mixed_precision": accelerator.mixed_precision, "processes": accelerator.num_processes}


def collect_digests(pipe, pairs: list[Pair], heldout: list[Pair]) -> dict:
    """Short digests of what a run is about: of the base's weights, and of each picture with its caption.

    Of each weight tensor only its shape and 16 values spread over it count, so that this takes no time.
    """
    digest = hashlib.sha256()
    for model in (pipe.unet, pipe.text_encoder, pipe.vae):
        for name, tensor in model.state_dict().items():
            values = tensor.flatten()[:: max(1, tensor.numel() // 16)][:16]
            digest.update(f"{name} {tuple(tensor.shape)} {values.tolist()}".encode())

    def of_pairs(chosen: list[Pair]) -> dict[str, str]:
        texts = {p.name: " ".join([p.digest, *p.captions]) + f" x {p.repeats}" * (p.repeats > 1) for p in chosen}
        return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}

    return {"base": digest.hexdigest()[:16], "train": of_pairs(pairs), "test": of_pairs(heldout)}


def checkpoint_bytes(weights: torch.Tensor, config: TrainConfig) -> int:
    """About how many bytes a checkpoint takes: the tuner and two moments of Adam in fp32, and some for the rest."""
    copies = 3 + bool(config.stop_when) + 2 * bool(config.ema_decay) + 2 * (config.optimizer == "prodigy")
    return weights.numel() * 4 * copies + 300_000


def describe_run(weights: torch.Tensor, accelerator: Accelerator, scheduler) -> str:
    """What is trained, where and in which precision, as a line."""
    precision = accelerator.mixed_precision.replace("no", "fp32")
    return (
        f"{weights.numel():,} trainable parameters on {accelerator.device} in {precision}; "
        f"the base predicts {scheduler.config.prediction_type}"
    )


def prepare_output(output: Path, config: TrainConfig, settings: dict, tuner: TunerConfig, step: int | None) -> None:
    """Writes config.json, and removes what is left of a run that did not get to its first checkpoint.

    Args:
        settings: from `collect_settings`. What depends on the base, the tuner and the optimizer is written as it was
            given, too, so that who repeats the run with another of these gets the default that suits that one.
        step: from which the run continues, or None for a new run.
    """
    run_folder.remove_leftovers(output, step)
    given = {name: getattr(config, name) for name in ("learning_rate", "resolution")}
    text = {"train": settings | given, "resolved": {name: settings[name] for name in given}, "tuner": asdict(tuner),
            "versions": tuner_file.library_versions()}  # fmt: skip
    tuner_file.write_text(output / "config.json", json.dumps(text, indent=2) + "\n")


def log_preview(accelerator: Accelerator, path: Path, step: int) -> None:
    """Gives a preview to TensorBoard and to W&B, where they track the run."""
    for tracker in accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            with Image.open(path) as picture:
                tracker.log_images({"preview": np.asarray(picture.convert("RGB"))[None]}, step=step, **options)


def start_trackers(accelerator: Accelerator, settings: dict, tuner: TunerConfig) -> None:
    """Starts the experiment trackers of `report_to`, which accept only plain values as settings."""
    plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in settings.items()}
    accelerator.init_trackers("sdtune", {**plain, **{k: str(v) for k, v in asdict(tuner).items()}})
