"""The pictures of a run after it: the loss of each over the run, which were never learnt, and which by heart first."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from PIL import Image

from ..adapters import api, tuner_file
from ..bases import load
from ..training import checkpoints, run_folder, setup
from ..training.buckets import AspectBuckets
from ..training.images import crop_to_shape
from ..training.loss import denoising_errors
from .sheet import THUMBNAIL_SIDE, Card

MOST_STEPS = 6  # of a run that are measured, besides the base
NEVER, FIRST = 0.25, 1.75  # falls of a picture's loss, relative to the median fall, up to and from which it is noted
SMALLEST_FALL = 0.01  # a median fall below it is no learning that could be compared


@dataclass(frozen=True)
class PictureLosses:
    """The loss of each picture at some steps of a run, each measured with the same noise; step 0 is the base.

    Attributes:
        train, test: step -> loss of each training picture, and of each held-out one.
    """

    train: dict[int, list[float]]
    test: dict[int, list[float]]

    def falls(self, losses: dict[int, list[float]]) -> dict[int, list[float]]:
        """Step -> by which share of the base's the loss of each picture has fallen."""
        return {step: [1 - now / base for now, base in zip(values, losses[0])] for step, values in losses.items()}


def is_run(folder: Path) -> bool:
    """Whether a folder is the output of a training."""
    return (folder / "config.json").is_file() and bool(_tuners(folder))


def check_run(
    folder: Path, log: Callable[[str], None], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[str], list[Card]]:
    """Sentences about a run, and a card for each of its pictures.

    Args:
        log, on_progress: as of `measure_run`.

    Raises:
        TrainError, DataError, BaseError: if its settings, pictures or base are not there any more.
    """
    run = _Run(folder)
    pairs, heldout, buckets, losses = run.pairs, run.heldout, run.buckets, run.measure(log, on_progress)
    texts = describe_training(losses)
    cards = [
        _card(pair, buckets, pair.name, text, noted, [values[i] for _, values in sorted(losses.train.items())])
        for i, (pair, (text, noted)) in enumerate(zip(pairs, texts))
    ]
    cards += [
        _card(pair, buckets, f"test/{pair.name}", text, False, [values[i] for _, values in sorted(losses.test.items())])
        for i, (pair, text) in enumerate(zip(heldout, describe_heldout(losses)))
    ]
    last, counts = max(losses.train), [sum(text.startswith(start) for text, _ in texts) for start in ("Never", "By")]
    lines = [
        f"measured at steps {', '.join(map(str, sorted(losses.train)))}; each curve is the loss of a picture over them",
        f"the median loss of the {len(pairs)} pictures fell by "
        f"{statistics.median(losses.falls(losses.train)[last]):.1%}",
        f"{counts[0]} pictures were never learnt, {counts[1]} by heart first",
    ]
    return lines, cards


def measure_run(
    folder: Path, log: Callable[[str], None], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> PictureLosses:
    """The losses at the checkpoints of a run, in fp32, with the noise and timesteps of the held-out loss.

    Args:
        log: called with a line about what is measured.
        on_progress: called with (steps of the run that are measured, all that will be); an exception of it ends it.
    """
    return _Run(folder).measure(log, on_progress)


class _Run:
    """A run as its output folder describes it, and the pictures that it trained on."""

    def __init__(self, folder: Path):
        self.folder, self.config = folder, run_folder.read_config(folder)
        self.buckets = AspectBuckets(self.config.resolution, self.config.square)
        self.pairs, self.heldout = setup.read_pairs(self.config, self.buckets, lambda _: None)

    def measure(self, log: Callable[[str], None], on_progress: Callable[[int, int], None]) -> PictureLosses:
        tuners, count = _tuners(self.folder), len(self.pairs) + len(self.heldout)
        steps = ", ".join(map(str, tuners))
        log(f"measuring {count} pictures at steps 0, {steps}: {8 * count * (len(tuners) + 1)} predictions of the UNet")
        pipe = load.load_base(self.config.base)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        for model in (pipe.vae, pipe.text_encoder, pipe.unet):
            model.requires_grad_(False).eval()
        encoded = setup.encode_pairs(
            self.config, pipe, self.pairs, self.heldout, self.buckets, device, torch.float32, log
        )  # fmt: skip
        pipe.unet.to(device)
        scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        found: tuple[dict, dict] = {}, {}

        def measure_at(step: int) -> None:
            for losses, split in zip(found, encoded):
                if split is not None:
                    losses[step] = denoising_errors(pipe.unet, scheduler, split).tolist()
            on_progress(len(found[0]), len(tuners) + 1)

        measure_at(0)
        for step, path in tuners.items():
            name = api.attach_file(pipe, path, "measured")
            measure_at(step)
            api.unload_tuner(pipe, name)
        return PictureLosses(*found)


def _card(pair, buckets: AspectBuckets, title: str, text: str, noted: bool, curve: list[float]) -> Card:
    image = crop_to_shape(pair.open(), buckets.shape_for(pair.size))
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    return Card(image, title, text, noted, curve)


def _tuners(folder: Path) -> dict[int, Path]:
    """Step -> tuner, of the checkpoints of a run, and of the finished tuner where its last checkpoint is gone."""
    found = {checkpoints.step_of(path): path for path in checkpoints.list_checkpoints(folder)}
    if not found and (folder / tuner_file.FILE_NAME).is_file():
        found[int(tuner_file.load(folder).training.get("steps_done", 1))] = folder
    steps = sorted(found)
    if len(steps) > MOST_STEPS:  # spread evenly, the last one among them
        steps = [steps[round((i + 1) * len(steps) / MOST_STEPS) - 1] for i in range(MOST_STEPS)]
    return {step: found[step] for step in steps}


def describe_training(losses: PictureLosses) -> list[tuple[str, bool]]:
    """A sentence about each training picture, and whether it is noted."""
    falls = losses.falls(losses.train)
    steps = sorted(falls)
    last = steps[-1]
    median = statistics.median(falls[last])
    texts = []
    for i, fall in enumerate(falls[last]):
        change = f"its loss {'fell' if fall > 0 else 'rose'} by {abs(fall):.1%}, the median fell by {median:.1%}"
        if median >= SMALLEST_FALL and fall <= NEVER * median:
            texts.append((f"Never learnt: {change}.", True))
        elif median >= SMALLEST_FALL and fall >= FIRST * median:
            since = next(step for step in steps if falls[step][i] >= median)
            texts.append((f"By heart first: {change}; it was there at step {since}.", True))
        else:
            texts.append((change[:1].upper() + change[1:] + ".", False))
    return texts


def describe_heldout(losses: PictureLosses) -> list[str]:
    """A sentence about each held-out picture."""
    if not losses.test:
        return []
    steps, texts = sorted(losses.test), []
    for i in range(len(losses.test[0])):
        curve = [losses.test[step][i] for step in steps]
        best = min(range(len(curve)), key=curve.__getitem__)
        rise = curve[-1] / curve[best] - 1
        text = f"Held out: its loss was lowest at step {steps[best]}"
        texts.append(text + (f" and has risen by {rise:.1%} since." if rise > 0 else "."))
    return texts
