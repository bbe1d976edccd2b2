"""Which tuner is better, by how much, and how sure is that? `python -m sdtune.evaluate --help`

    python assets/tasks.py                                            # once: prepares two of the three tasks
    python -m sdtune.evaluate                                         # all of it
    accelerate launch --num_processes 4 -m sdtune.evaluate            # the same, shared out
    python -m sdtune.evaluate --methods ablation --tasks openmoji --output output/ablation

Every method trains on the same pairs with the same data order, noise and steps, at matched parameter counts. Its
learning rate is the one of --rates with the lowest denoising error on a quarter of the *training* pairs; then it
trains on all of them with several seeds and draws held-out prompts, whose true pictures are known. Written into the
output folder: table.md, table.csv, results.json, grid.png, curves.png. What is finished is kept there and skipped by
the next start, what was interrupted goes on; processes and machines that share the folder share the work.
"""

import argparse
import csv
import ctypes
import gc
import hashlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import sys
import time
import uuid
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import diffusers
import psutil
import torch
import transformers
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from . import attach, baselines, bases, data, drawing, measures, pictures, pipeline, store
from .config import TrainConfig
from .measures import COLUMNS, Column, Estimate, Statistic
from .train import Stopped, TrainError, fit, training_loss
from .tuners import BASELINES, TunerConfig

ROOT = Path(__file__).parent.parent
TASKS = {
    "anime": ROOT / "assets/anime",
    "openmoji": ROOT / ".cache/tasks/openmoji",
    "fluent3d": ROOT / ".cache/tasks/fluent3d",
}
GROUPS = {
    "paper": ["res_attn", "res_adapter", "res_prefix", "res_prompt"],
    "baselines": ["lora", "lora_ff", "dora"],
    "dual": ["res_attn", "dual", "dual_swapped"],
    "ablation": ["res_attn", "2x4", "8x4", "8x8", "mha", "ffn", "block"],
}
BASE, SHUFFLED = "base", "shuffled"
# Prompts outside every task's style: what the small base was trained on, and what a large one is asked for.
OUTSIDE = {
    "small": [
        "noto emoji of grinning face", "twemoji of cat face", "fluent emoji of red heart", "twemoji of penguin",
        "noto emoji of woman red hair", "twemoji of rocket", "noto emoji of rose", "fluent emoji of octopus",
        "twemoji of hamburger", "noto emoji of fox", "fluent emoji of guitar", "fluent emoji of pizza",
    ],
    "large": [
        "a bowl of ramen, food photography", "a photo of a cat on a sofa", "a lighthouse on a cliff at sunset",
        "portrait photo of an old fisherman", "an oil painting of a vase of sunflowers", "a red sports car on a road",
        "a snowy mountain behind a lake", "a cup of coffee on a wooden table", "a watercolor of a village",
        "a black and white photo of a city street", "a dog running on a beach", "a bookshelf full of old books",
    ],
}  # fmt: skip


class EvaluationError(RuntimeError):
    """An evaluation that cannot start; the message says what was found and what to do."""


# ---------------------------------------------------------------------------------------------- methods


def parameter_count(unet, config: TunerConfig) -> int:
    """How many trainable parameters a tuner of this configuration has on this UNet."""
    home = baselines if config.kind in BASELINES else attach
    return sum(math.prod(shape) for shape in home.expected_shapes(unet, config).values())


def methods(unet) -> dict[str, TunerConfig]:
    """Every method by its name, for this UNet.

    All have about the parameter count of Res-Attn 4x4 on attn1, attn2 and ff, as nearly as a whole rank or length
    allows; only the ablation's own rank, heads and operations are what their names say.
    """
    target = parameter_count(unet, TunerConfig())

    def matched(setting: str, **others) -> TunerConfig:
        one, two = (parameter_count(unet, TunerConfig(**others, **{setting: n})) for n in (1, 2))  # it grows linearly
        return TunerConfig(**others, **{setting: min(1024, max(1, round(1 + (target - one) / (two - one))))})

    attention = ["attn1", "attn2"]
    return {
        "res_attn": TunerConfig(),
        "res_attn_text": matched("rank", kind="res_attn_text"),
        "res_adapter": matched("length", kind="res_adapter"),
        "res_prefix": matched("length", kind="res_prefix"),
        "res_prompt": matched("length", kind="res_prompt"),
        "dual": matched("length", kind="res_attn", ffn_kind="res_adapter"),
        "dual_swapped": matched("length", kind="res_adapter", ffn_kind="res_attn"),
        "lora": matched("rank", kind="lora", ops=attention),
        "lora_ff": matched("rank", kind="lora"),
        "dora": matched("rank", kind="dora", ops=attention),
        "2x4": TunerConfig(rank=2),
        "8x4": TunerConfig(rank=8),
        "8x8": TunerConfig(rank=8, num_heads=8),
        "mha": TunerConfig(ops=attention),
        "ffn": TunerConfig(ops=["ff"]),
        "block": TunerConfig(ops=["block"]),
    }


# ------------------------------------------------------------------------------------------------ tasks


@dataclass
class Task:
    """Pairs to train on and held-out ones. A quarter of the former chooses the learning rate."""

    name: str
    folder: Path  # of this task's results
    train: list[data.Pair]
    test: list[data.Pair]
    encoded: data.Encoded | None = None  # the held-out ones, once they are

    @property
    def part(self) -> list[data.Pair]:
        return [p for i, p in enumerate(self.train) if i % 4 != 3]

    @property
    def validation(self) -> list[data.Pair]:
        return self.train[3::4]


def read_task(source: str, output: Path, resolution: int, prompts: int) -> Task:
    """A task of ours by its name, or any folder (or hub data set) with the splits train and test.

    Raises:
        EvaluationError, DataError: if it is not there, lacks enough pairs, or cannot be used.
    """
    where = TASKS.get(source, source)
    if source in TASKS and not Path(where).is_dir():
        raise EvaluationError(f"the task {source} is not prepared yet; run: python assets/tasks.py")
    train, test = data.read_splits(where, resolution, log=lambda text: None)
    if len(train) < 4 or len(test) < 2:
        raise EvaluationError(
            f"{where} has {len(train)} pairs to train on and {len(test)} held-out ones (in its folder test); at least "
            "4 and 2 are needed"
        )
    name = source if source in TASKS else Path(source).name
    return Task(name, output / name, train, test[:prompts])


def _write_pairs(folder: Path, pairs: list[data.Pair], captions: list[str], resolution: int) -> None:
    """An imagefolder for the trainer, whole or not at all, also when several processes write it."""
    if folder.exists():
        return
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    part.mkdir(parents=True)
    lines = []
    for i, (pair, caption) in enumerate(zip(pairs, captions)):
        data.to_square(pair.open(), resolution).save(part / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": caption}) + "\n")
    (part / "metadata.jsonl").write_text("".join(lines))
    try:
        part.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(part)


# ------------------------------------------------------------------------------------------- evaluation


@dataclass
class Settings:
    """What the numbers depend on besides the code."""

    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    methods: list[str] = field(default_factory=lambda: ["paper", "baselines"])
    seeds: int = 3
    steps: int = 300
    rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3, 1e-2])
    prompts: int = 100
    batch_size: int = 10
    drawing_steps: int = 25
    base: str = "tiny-sd"
    output: str = "output/evaluation"


class Evaluation:
    """The base, the tasks and the methods of one evaluation, and what is done with them, in order of doing."""

    def __init__(self, settings: Settings, rank: int = 0, world: int = 1, precision: str | None = None):
        self.settings, self.output = settings, Path(settings.output)
        self.rank, self.world, self.precision = rank, world, precision
        self.device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
        measures.feature_network(self.device)  # tells at once if its packages are missing
        self.resolution = bases.native_resolution(settings.base)
        self.tasks = [read_task(t, self.output, self.resolution, settings.prompts) for t in settings.tasks]
        if len({task.folder for task in self.tasks}) < len(self.tasks):
            raise EvaluationError(f"two of the tasks {', '.join(settings.tasks)} have one name; rename a folder")
        self.pipe = bases.load_base(settings.base).to(self.device)
        for part in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            part.requires_grad_(False).eval()
        small = self.pipe.unet.num_parameters() < 1e8  # as in the trainer's previews
        self.guidance = 4.0 if small else 7.5
        self.outside_prompts = OUTSIDE["small" if small else "large"][: settings.prompts]
        self.methods = self._choose(settings.methods)
        self.reference = next(iter(self.methods))
        self._keep_apart()

    def _choose(self, names: list[str]) -> dict[str, TunerConfig]:
        every = methods(self.pipe.unet)
        flat = [n for name in names for n in GROUPS.get(name, [name])]
        unknown = [n for n in flat if n not in every]
        if unknown:
            raise EvaluationError(
                f"there is no method {', '.join(unknown)}; possible: {', '.join(every)}, and the groups "
                f"{', '.join(GROUPS)}"
            )
        return {n: every[n] for n in flat}

    def _keep_apart(self) -> None:
        """Refuses an output folder whose numbers were made from another base, other data or other settings."""
        marks = hashlib.sha256()
        for p in self.pipe.unet.parameters():
            marks.update(p.flatten()[:1000].cpu().numpy().tobytes())
        now = {"base": f"{self.settings.base} {marks.hexdigest()[:12]}"}
        now |= {k: getattr(self.settings, k) for k in ("steps", "batch_size", "prompts", "drawing_steps")}
        for task in self.tasks:
            marks = hashlib.sha256()
            for pair in task.train + task.test:
                marks.update(pair.caption.encode() + pair.open().tobytes())
            now[f"task {task.name}"] = marks.hexdigest()[:12]
        now |= {f"method {name}": asdict(config) for name, config in self.methods.items()}
        path = self.output / "settings.json"
        then = json.loads(path.read_text()) if path.exists() else {}
        changed = [f"{k} was {then[k]} and is {now[k]}" for k in now if k in then and then[k] != now[k]]
        if changed:
            raise EvaluationError(
                f"{self.output} holds results that cannot be compared with these: {'; '.join(changed)}. Give another "
                "--output, or delete the folder"
            )
        if self.rank == 0:
            _write(path, json.dumps(then | now, indent=2))

    def run(self) -> None:
        """This process's share of the work; the first one waits for all and writes the report."""
        for name, config in self.methods.items():
            self._say(f"{name}: {parameter_count(self.pipe.unet, config):,} trainable parameters")
        units = [(task, name) for task in self.tasks for name in (BASE, *self.methods)]
        own = units[self.rank :: self.world]
        for i, (task, name) in enumerate(own):
            self._say(f"[{i + 1} of {len(own)}] {task.name}: {name}")
            self.unit(task, name)
        if self.rank == 0:
            waiting = [task.folder / name / "done.json" for task, name in units]
            while any(_read(path).get("asked") != self.asked for path in waiting):
                time.sleep(2)  # other processes are still at it
            Report(self).write()

    def _say(self, text: str) -> None:
        print(text if self.world == 1 else f"process {self.rank}: {text}", flush=True)

    @property
    def asked(self) -> dict:
        return {"rates": self.settings.rates, "seeds": self.settings.seeds}

    def unit(self, task: Task, name: str) -> None:
        """All of one method on one task: the rate, the seeds, the pictures; for the first method the floor, too."""
        found = {"asked": self.asked, "rates": {}, "runs": {}}
        if name == BASE:
            for seed in range(self.settings.seeds):
                self.measure(task, task.folder / BASE / f"seed-{seed}", None, seed)
        else:
            found |= self.choose_rate(task, name)
            labels = [name, SHUFFLED] if name == self.reference else [name]
            for label in labels if found["rate"] else []:
                found["runs"][label] = [self.train(task, label, self.methods[name], found["rate"], seed)
                                        for seed in range(self.settings.seeds)]  # fmt: skip
                for seed, run in enumerate(found["runs"][label]):
                    file = self.folder(task, label, found["rate"], seed) / store.FILE_NAME
                    if file.exists() and not run["failed"]:
                        self.measure(task, file.parent, file, seed)
        _write(task.folder / name / "done.json", json.dumps(found, indent=1))

    def choose_rate(self, task: Task, name: str) -> dict:
        """Trains on three quarters of the training pairs at every rate, and measures on the rest.

        Returns:
            `rate`, the best (None if the loss was not finite at any), and `rates`: for each its run. A single rate
            is taken as it is.
        """
        rates = self.settings.rates
        if len(rates) == 1:
            return {"rate": rates[0], "rates": {}}
        runs = {rate: self.train(task, name, self.methods[name], rate, None) for rate in rates}
        errors = {rate: _final_error(run) for rate, run in runs.items()}
        best = min(errors, key=errors.get)
        found = ", ".join(f"{rate:g}: {error:.4f}" for rate, error in errors.items())
        self._say(f"{task.name}, {name}: validation error by learning rate {found}")
        rate = best if math.isfinite(errors[best]) else None
        return {"rate": rate, "rates": {f"{r:g}": run for r, run in runs.items()}}

    def folder(self, task: Task, label: str, rate: float, seed: int | None) -> Path:
        label = f"{SHUFFLED}-{self.reference}" if label == SHUFFLED else label
        return task.folder / label / (f"validation-rate-{rate:g}" if seed is None else f"seed-{seed}-rate-{rate:g}")

    def train(self, task: Task, label: str, config: TunerConfig, rate: float, seed: int | None) -> dict:
        """One run of the trainer, or what it left when it was finished before; without a seed, a validation run.

        Returns:
            `failed` (why, if its loss was not finite), `step_seconds` (median), `peak_memory` and `file_bytes`; of a
            validation run `validation`: step -> denoising error of each validation pair.
        """
        folder, pairs = self.folder(task, label, rate, seed), task.train if seed is not None else task.part
        if (folder / "run.json").exists():
            return _read(folder / "run.json")
        captions = [p.caption for p in pairs]
        if label == SHUFFLED:  # every picture gets the caption of another
            captions = captions[len(captions) // 2 :] + captions[: len(captions) // 2]
        source = task.folder / "data" / (SHUFFLED if label == SHUFFLED else "part" if seed is None else "all")
        _write_pairs(source, pairs, captions, self.resolution)
        steps = self.settings.steps
        settings = TrainConfig(
            data=str(source), base=self.settings.base, output=str(folder), steps=steps, learning_rate=rate,
            batch_size=self.settings.batch_size, seed=seed or 0, mixed_precision=self.precision, preview_every=0,
            preview_steps=1, preview_prompts=captions[:1], checkpoint_every=max(1, steps // 6),
            resume=any((folder / "checkpoints").glob("step-*/state.json")),
        )  # fmt: skip
        run, memory, times = {"failed": None, "rate": rate, "seed": seed, "peak_memory": None}, _Memory(), []

        def on_step(done: int, _loss: float) -> None:
            times.append(time.perf_counter())
            if done == steps:
                run["peak_memory"] = memory.peak()

        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(folder / "log.txt", "a") as log, redirect_stdout(log):
                fit(settings, config, on_step)
        except Stopped:
            raise
        except (TrainError, ValueError) as error:
            if not re.search("not finite|NaN", str(error)):
                raise
            run["failed"] = str(error)
            self._say(f"{task.name}, {label}, rate {rate:g}: {error}")
        gaps = [b - a for a, b in zip(times, times[1:])]
        run["step_seconds"] = statistics.median(gaps) if gaps else None
        if (folder / store.FILE_NAME).exists():
            run["file_bytes"] = (folder / store.FILE_NAME).stat().st_size
        if seed is None and not run["failed"]:
            encoded, run["validation"] = self.encode(task.validation), {}
            for checkpoint in [None, *sorted((folder / "checkpoints").glob("step-*"))]:
                with self._tuned(checkpoint):
                    errors = denoising_errors(self.pipe, encoded, noises=2)
                run["validation"][int(checkpoint.name[5:]) if checkpoint else 0] = errors.tolist()
        _write(folder / "run.json", json.dumps(run))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return _read(folder / "run.json")

    @contextmanager
    def _tuned(self, source: Path | None):
        """The base with a tuner file, or without; gives the adapters that a `Cell` names."""
        if source is None:
            yield {}
            return
        name = pipeline.load_tuner(self.pipe, source, "evaluated")
        try:
            yield {name: 1.0}
        finally:
            pipeline.unload_tuner(self.pipe, name)

    def encode(self, pairs: list[data.Pair]) -> data.Encoded:
        pipe = self.pipe
        encoded = data.encode(pairs, pipe.vae, pipe.tokenizer, pipe.text_encoder, self.resolution)
        return encoded.to(self.device, torch.float32)

    def encoded(self, task: Task) -> data.Encoded:
        """The held-out pairs of a task, encoded once."""
        task.encoded = task.encoded or self.encode(task.test)
        return task.encoded

    @torch.no_grad()
    def decode(self, encoded: data.Encoded) -> list[Image.Image]:
        """The pictures as the VAE gives them back."""
        vae, latents = self.pipe.vae, encoded.mean[:, 0] / self.pipe.vae.config.scaling_factor
        decoded = torch.cat([vae.decode(part).sample.cpu() for part in latents.split(16)])
        return self.pipe.image_processor.postprocess(decoded, output_type="pil")

    def _draw(self, prompts: list[str], first_seed: int, adapters: dict) -> list[Image.Image]:
        """Prompt i from the noise of first_seed + i."""
        cells = [drawing.Cell(p, first_seed + i, adapters, self.guidance) for i, p in enumerate(prompts)]
        passes = tqdm(desc="drawing", unit="pass", leave=False, disable=self.rank > 0)
        with passes:
            return drawing.draw_cells(
                self.pipe, cells, steps=self.settings.drawing_steps, size=self.resolution,
                on_step=lambda done, total: (setattr(passes, "total", total), passes.update()),
            )  # fmt: skip

    @cached_property
    def outside(self) -> tuple[data.Encoded, dict[str, torch.Tensor]]:
        """The base's own pictures of the prompts outside: encoded, and their features and the base's errors on them."""
        images = self._draw(self.outside_prompts, 0, {})
        pairs = [data.Pair(p, p, lambda image=image: image) for p, image in zip(self.outside_prompts, images)]
        encoded = self.encode(pairs)
        features = measures.features(images, self.device)
        return encoded, {"outside": features, "outside_errors": denoising_errors(self.pipe, encoded)}

    def measure(self, task: Task, folder: Path, file: Path | None, seed: int) -> None:
        """Draws the held-out prompts and those outside the style; leaves pictures, features and errors in `folder`.

        Every method starts from the same noise: that of seed * prompts + i for held-out prompt i, and of i outside.
        """
        if (folder / "measured.safetensors").exists():
            return
        (outside, _), prompts, device = self.outside, [p.caption for p in task.test], self.device
        with self._tuned(file) as adapters:
            start = time.perf_counter()
            drawn = self._draw(prompts, seed * len(prompts), adapters)
            seconds = (time.perf_counter() - start) / len(prompts)
            others = self._draw(self.outside_prompts, 0, adapters)
            found = {
                "errors": denoising_errors(self.pipe, self.encoded(task)),
                "outside_errors": denoising_errors(self.pipe, outside),
            }
        found |= {"features": measures.features(drawn, device), "colours": measures.colours(drawn),
                  "outside": measures.features(others, device), "seconds": torch.tensor([seconds])}  # fmt: skip
        (folder / "drawn").mkdir(parents=True, exist_ok=True)
        for prefix, images in (("", drawn), ("outside-", others)):
            for i, image in enumerate(images):
                image.save(folder / "drawn" / f"{prefix}{i:03d}.png")
        part = folder / ".measured.part"
        save_file(found, part)
        part.replace(folder / "measured.safetensors")


@torch.no_grad()
def denoising_errors(pipe, encoded: data.Encoded, noises: int = 1) -> torch.Tensor:
    """The mean squared error of the predicted noise (or velocity) on each picture (n,), as `train`'s held-out loss.

    The mean over 8 timesteps, each with the same `noises` draws of noise at every call; on the CPU.
    """
    scheduler, device = DDPMScheduler.from_config(pipe.scheduler.config), encoded.mean.device
    latents, total = encoded.mean[:, 0], torch.zeros(len(encoded.names))
    for draw in range(noises):
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(draw)).to(device)
        for t in range(60, 1000, 125):
            for part in torch.arange(len(latents)).split(64):
                at = torch.full((len(part),), t, device=device)
                loss = training_loss(pipe.unet, scheduler, latents[part], noise[part], at, encoded.text[part])
                total[part] += loss.cpu() / (8 * noises)
    return total


def _final_error(run: dict) -> float:
    """The mean validation error at the end of a validation run."""
    curve = run.get("validation")
    return math.inf if run["failed"] or not curve else statistics.mean(curve[max(curve, key=int)])


class _Memory:
    """Peak memory in bytes since it was made, beyond what was in use then: of tensors on a GPU, else of the process."""

    def __init__(self):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self.before = psutil.Process().memory_info().rss
        except (OSError, AttributeError):
            self.before = None

    def peak(self) -> int | None:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() - self.before
        if self.before is None:
            return None
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 - self.before


# ---------------------------------------------------------------------------------------------- report


@dataclass
class Row:
    """A row of a task's tables: its statistics by measure and seed, and what it cost."""

    label: str
    measured: dict[str, dict[int, Statistic]]
    cost: dict = field(default_factory=dict)

    def estimate(self, key: str) -> Estimate | None:
        return measures.estimate(list(self.measured[key].values())) if self.measured.get(key) else None

    def against(self, other: "Row", key: str) -> Estimate | None:
        """The difference to another row, over the seeds and prompts that both have."""
        own, theirs = self.measured.get(key, {}), other.measured.get(key, {})
        both = [own[s] - theirs[s] for s in own if s in theirs and own[s].size == theirs[s].size]
        return measures.estimate(both) if both else None


class Report:
    """Reads what the runs have left, and writes tables, grid and curves."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation, self.reference, self.settings = evaluation, evaluation.reference, evaluation.settings
        self.done = {
            task.name: {name: _read(task.folder / name / "done.json") for name in evaluation.methods}
            for task in evaluation.tasks
        }
        self.rows = {task.name: self._rows(task) for task in evaluation.tasks}

    def write(self) -> None:
        output = self.evaluation.output
        _write(output / "results.json", json.dumps(self._results(), indent=2) + "\n")
        self._write_csv(output / "table.csv")
        self._grid().save(output / "grid.png")
        self._curves(output / "curves.png")
        _write(output / "table.md", self._markdown())
        print(self._markdown())
        print(*(output / n for n in ("table.md", "table.csv", "results.json", "grid.png", "curves.png")), sep="\n")

    # ------------------------------------------------------------------------------- what was found

    def _seed_folders(self, task: Task, label: str) -> dict[int, Path]:
        """The folders of the measured seeds of a method, of the base, or of the floor with shuffled captions."""
        evaluation, seeds = self.evaluation, range(self.settings.seeds)
        rate = None if label == BASE else self._done(task, label).get("rate")
        folders = {
            s: task.folder / BASE / f"seed-{s}" if label == BASE else evaluation.folder(task, label, rate, s)
            for s in (seeds if rate or label == BASE else [])
        }
        return {s: f for s, f in folders.items() if (f / "measured.safetensors").exists()}

    def _done(self, task: Task, label: str) -> dict:
        return self.done[task.name].get(self.reference if label == SHUFFLED else label, {})

    def _rows(self, task: Task) -> list[Row]:
        evaluation, device = self.evaluation, self.evaluation.device
        test, train = ([data.to_square(p.open(), evaluation.resolution) for p in ps] for ps in (task.test, task.train))
        decoded = evaluation.decode(evaluation.encoded(task))
        decoded_train = evaluation.decode(evaluation.encode(task.train))
        true = {
            "features": measures.features(test, device), "colours": measures.colours(test),
            "decoded": measures.features(decoded, device), "decoded_train": measures.features(decoded_train, device),
            **evaluation.outside[1],
        }  # fmt: skip
        rows = []
        for label in (BASE, SHUFFLED, *evaluation.methods):
            folders = self._seed_folders(task, label)
            drawn = {seed: load_file(folder / "measured.safetensors") for seed, folder in folders.items()}
            found = {seed: measures.all_of(d, true) for seed, d in drawn.items()}
            by_measure = {c.key: {seed: of[c.key] for seed, of in found.items()} for c in COLUMNS}
            cost = {"drawing_seconds": statistics.median(d["seconds"].item() for d in drawn.values())} if drawn else {}
            rows.append(Row(label, by_measure, cost | (self._cost(task, label) if label != BASE else {})))

        through = {"features": true["decoded"], "colours": measures.colours(decoded)}
        rows.append(Row("true, through the VAE", {k: {0: s} for k, s in measures.all_of(through, true).items()}))
        itself, mean_colours = measures.all_of(true, true), true["colours"].mean(0).expand(len(train), -1, -1)
        itself["kid"] = measures.kid(measures.features(train, device), true["features"], paired=False)
        itself["colour"] = measures.colour_distance(measures.colours(train), mean_colours)
        del itself["novelty"]  # compares what the VAE gives back
        rows.append(Row("true pictures", {k: {0: s} for k, s in itself.items()}))
        return rows

    def _cost(self, task: Task, label: str) -> dict:
        done, evaluation = self._done(task, label), self.evaluation
        config = evaluation.methods[self.reference if label == SHUFFLED else label]
        runs = done["runs"].get(label, [])
        rate, rates = done["rate"], self.settings.rates
        known = {key: [r[key] for r in runs if r.get(key)] for key in ("step_seconds", "peak_memory", "file_bytes")}
        curve = done["rates"].get(f"{rate:g}", {}).get("validation") if rate else None
        curve = {int(step): errors for step, errors in curve.items()} if curve else None
        return {
            "rate": rate,
            "rate_at_edge": len(rates) > 1 and rate in (min(rates), max(rates)),
            "parameters": parameter_count(evaluation.pipe.unet, config),
            "file_bytes": max(known["file_bytes"], default=None),
            "peak_memory": max(known["peak_memory"], default=None),
            "step_seconds": statistics.median(known["step_seconds"]) if known["step_seconds"] else None,
            "failed": sum(bool(r["failed"]) for r in runs),
            "best_step": curve and min(curve, key=lambda step: statistics.mean(curve[step])),
            "memorises_after": curve and measures.memorising(curve),
        }

    # ---------------------------------------------------------------------------------------- tables

    def _results(self) -> dict:
        settings, tasks = asdict(self.settings), {}
        for task, rows in self.rows.items():
            first = next(r for r in rows if r.label == self.reference)
            tasks[task] = {
                "rows": {
                    row.label: row.cost
                    | {c.key: _as_dict(row.estimate(c.key)) for c in COLUMNS}
                    | {"against_" + self.reference: {c.key: _as_dict(row.against(first, c.key)) for c in COLUMNS}}
                    for row in rows
                },
                "runs": self.done[task],
            }
        return {
            "settings": settings, "base": _read(self.evaluation.output / "settings.json")["base"],
            "methods": {n: asdict(c) for n, c in self.evaluation.methods.items()},
            "versions": store.library_versions(), "machine": self._machine(), "tasks": tasks,
        }  # fmt: skip

    def _machine(self) -> str:
        if torch.cuda.is_available():
            return f"one {torch.cuda.get_device_name()} per process, {self.evaluation.world} processes"
        return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads, {self.evaluation.world} processes"

    def _write_csv(self, path: Path) -> None:
        costs = ["rate", "parameters", "file_bytes", "peak_memory", "step_seconds", "drawing_seconds", "failed"]
        with open(path, "w", newline="") as file:
            out = csv.writer(file)
            measured = [f"{c.key}{end}" for c in COLUMNS for end in ("", "_low", "_high")]
            out.writerow(["task", "method", *costs, *measured])
            for task, rows in self.rows.items():
                for row in rows:
                    numbers = [n for c in COLUMNS for n in row.estimate(c.key) or ("", "", "")]
                    out.writerow([task, row.label, *(row.cost.get(k, "") for k in costs), *numbers])

    def _markdown(self) -> str:
        s, lines = self.settings, []
        lines += [
            f"Base {s.base}; {s.steps} steps of batch {s.batch_size}, {s.seeds} seeds, one picture per seed and "
            f"prompt, {s.drawing_steps} drawing steps, guidance {self.evaluation.guidance:g}. {self._machine()}.",
            "In brackets: 95 % bootstrap interval over prompts and seeds.", "",
            *(f"- **{c.title}**: {c.meaning}{('', '; more is better', '; less is better')[c.better]}" for c in COLUMNS),
            f"- **{SHUFFLED}**: {self.reference} trained with every picture's caption exchanged for another's; a floor",
            "- **true pictures**: the ceiling; KID and colours compare the training pictures with the held-out ones",
            "- **true, through the VAE**: held-out pictures as the base's VAE gives them back; no tuner can do better",
            "- **lowest validation error**, **memorises** (`measures.memorising`): on a quarter of the training pairs, "
            "in the run at the chosen rate that left these out",
        ]  # fmt: skip
        for task, rows in self.rows.items():
            own = next(t for t in self.evaluation.tasks if t.name == task)
            first = next(r for r in rows if r.label == self.reference)
            chance = f"{1 / len(own.test):.1%}"
            head = f"{len(own.train)} pairs, {len(own.test)} held-out prompts (nearest by chance: {chance})"
            lines += ["", f"## {task}: {head}", "", *self._cost_table(rows), ""]
            lines += _table(
                ["method", *(c.title for c in COLUMNS)],
                [[r.label, *(_shown(r.estimate(c.key), c.form) for c in COLUMNS)] for r in rows],
            )
            others = [r for r in rows if r.label in (BASE, SHUFFLED, *self.evaluation.methods) and r is not first]
            if others:
                lines += ["", f"Difference to {self.reference}, same prompts and seeds:", ""]
                lines += _table(
                    ["method", *(c.title for c in COLUMNS)],
                    [[r.label, *(_verdict(r.against(first, c.key), c) for c in COLUMNS)] for r in others],
                )
                lines += ["", *self._sentences(others, first)]
            failed = [f"{r.label} ({r.cost['failed']} seeds)" for r in rows if r.cost.get("failed")]
            failed += [f"{r.label} (at every rate)" for r in rows if r.cost.get("rate", 0) is None]
            if failed:
                lines += ["", f"The loss was not finite in runs of: {', '.join(failed)}; they are left out."]
        return "\n".join(lines) + "\n"

    def _cost_table(self, rows: list[Row]) -> list[str]:
        titles = ["method", "learning rate", "trainable parameters", "file (KB)", "peak training memory (MB)",
                  "step (s)", "drawing (s)", "lowest validation error at step", "memorises after step"]  # fmt: skip
        cells = []
        for row in (r for r in rows if r.label in (BASE, *self.evaluation.methods)):
            c = row.cost
            rate = f"{c['rate']:g}" + (" (edge of the grid)" if c["rate_at_edge"] else "") if c.get("rate") else "–"
            cells.append([
                row.label, rate, _number(c.get("parameters"), "{:,}"), _number(c.get("file_bytes"), "{:,.0f}", 1e3),
                _number(c.get("peak_memory"), "{:,.0f}", 1e6), _number(c.get("step_seconds"), "{:.3f}"),
                _number(c.get("drawing_seconds"), "{:.3f}"), _number(c.get("best_step"), "{}"),
                _number(c.get("memorises_after"), "{}"),
            ])  # fmt: skip
        return _table(titles, cells)

    def _sentences(self, others: list[Row], first: Row) -> list[str]:
        """In words, where the reference method wins and where it loses, by intervals that exclude 0."""
        lines = []
        for column in (c for c in COLUMNS if c.better):
            verdicts = {"wins against": [], "loses to": [], "cannot be told from": []}
            for row in others:
                difference = row.against(first, column.key)
                if difference:
                    verdicts[measures.outcome(difference, column.better)].append(row.label)
            told = "; ".join(f"{how} {', '.join(labels)}" for how, labels in verdicts.items() if labels)
            lines += [f"- {column.title}: {self.reference} {told}"] if told else []
        return lines

    # -------------------------------------------------------------------------------------- pictures

    def _grid(self) -> Image.Image:
        """Prompts down, methods across, the true picture last, as Figure 2 of the paper; seed 0."""
        evaluation, labels, rows = self.evaluation, [], []
        columns = [BASE, *evaluation.methods]
        nothing = Image.new("RGB", (evaluation.resolution, evaluation.resolution), "white")

        def drawn(task: Task, label: str, name: str) -> Image.Image:
            folder = self._seed_folders(task, label).get(0)
            return Image.open(folder / "drawn" / name) if folder else nothing

        for task in evaluation.tasks:
            count = len(task.test)
            for i in dict.fromkeys(count * part // 4 for part in range(4)):
                labels.append(task.test[i].caption)
                true = data.to_square(task.test[i].open(), evaluation.resolution)
                rows.append([*(drawn(task, label, f"{i:03d}.png") for label in columns), true])
            labels.append(f"{evaluation.outside_prompts[1]} (outside the style)")
            rows.append([*(drawn(task, label, "outside-001.png") for label in columns), nothing])
        return pictures.grid(rows, [*columns, "true picture"], labels, cell=128)

    def _curves(self, path: Path) -> None:
        """Per task: validation error by learning rate, and by step at the chosen one; held-out error, compared."""
        from matplotlib.figure import Figure  # no pyplot: no global state

        figure = Figure(figsize=(14, 4.2 * len(self.rows)), dpi=100, layout="constrained")
        grid = figure.subplots(len(self.rows), 3, squeeze=False)
        for (task, rows), (by_rate, by_step, heldout) in zip(self.rows.items(), grid):
            for i, (name, done) in enumerate(self.done[task].items()):
                style = {"color": f"C{i % 10}", "label": name, "linestyle": "-" if i < 10 else "--"}
                errors = {float(rate): _final_error(run) for rate, run in done["rates"].items()}
                by_rate.plot(list(errors), list(errors.values()), "o", **style)
                curve = done["rates"].get(f"{done['rate']:g}", {}).get("validation", {}) if done["rate"] else {}
                by_step.plot([int(s) for s in curve], [statistics.mean(e) for e in curve.values()], **style)
            first = next(r for r in rows if r.label == self.reference)
            others = [r for r in rows if r.label in (SHUFFLED, *self.evaluation.methods) and r.against(first, "error")]
            for i, e in enumerate(r.against(first, "error") for r in others):
                heldout.plot([e.low, e.high], [i, i], color="#2f6db3")
                heldout.plot([e.value], [i], "o", color="#2f6db3")
            heldout.axvline(0, color="#999999", linewidth=1)
            heldout.set_yticks(range(len(others)), [r.label for r in others])
            heldout.invert_yaxis()
            by_rate.set(xlabel="learning rate", ylabel="validation error at the end", title=task, xscale="log")
            by_step.set(xlabel="step", ylabel="validation error", title="at the chosen rate")
            heldout.set(xlabel="held-out error, 95 % interval", title=f"difference to {self.reference}")
            by_rate.legend(frameon=False, fontsize=8)
            for axes in (by_rate, by_step, heldout):
                axes.spines[["top", "right"]].set_visible(False)
                axes.grid(alpha=0.3)
        figure.savefig(path)


def _verdict(difference: Estimate | None, column: Column) -> str:
    if difference is None:
        return "–"
    sign = column.form.replace(":", ":+")
    words = {"loses to": " better", "wins against": " worse", "cannot be told from": ""}
    word = words[measures.outcome(difference, column.better)] if column.better else ""
    return f"{sign.format(difference.value)} ({sign.format(difference.low)} to {sign.format(difference.high)}){word}"


def _shown(found: Estimate | None, form: str) -> str:
    if found is None:
        return "–"
    return f"{form.format(found.value)} ({form.format(found.low)} to {form.format(found.high)})"


def _number(value, form: str, unit: float | None = None) -> str:
    return "–" if value is None else form.format(value / unit if unit else value)


def _table(titles: list[str], cells: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *cells)]


def _as_dict(found: Estimate | None) -> dict | None:
    return found and found._asdict()


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


# ---------------------------------------------------------------------------------------- command line


def _share(argv: list[str]) -> tuple[int, int, str | None]:
    """This process's number, how many there are, and --mixed_precision; all taken out of the environment.

    Each run of the trainer belongs to one process, so the trainer must not see the others; every process gets a GPU
    of its own. On a machine without a GPU, Accelerate (1.15) starts one process whatever --num_processes says, so
    the number asked for is started from here.
    """
    asked = _processes_asked()
    if asked > 1:
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(asked), "-m", "sdtune.evaluate"]
        os.execv(sys.executable, [sys.executable, *run, *argv])
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1, None
    local = int(os.environ.get("LOCAL_RANK", 0))
    visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[local % len(visible)] if visible else str(local)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
    for name in list(os.environ):
        if re.match("(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$|MASTER_|TORCHELASTIC_|ACCELERATE_", name):
            del os.environ[name]
    return rank, world, precision


def _processes_asked() -> int:
    parent = psutil.Process().parent()
    command = parent.cmdline() if parent else []
    launched = "sdtune.evaluate" in command and any("accelerate" in part for part in command)
    if not launched or "WORLD_SIZE" in os.environ or torch.accelerator.is_available():
        return 1
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int, default=1)
    return parser.parse_known_args(command[: command.index("sdtune.evaluate")])[0].num_processes


def _settings(argv: list[str]) -> Settings:
    default = Settings()
    quick = replace(default, seeds=1, steps=2, rates=[1e-3, 3e-3], prompts=2, batch_size=2, drawing_steps=2)
    groups = "; ".join(f"{name}: {' '.join(of)}" for name, of in GROUPS.items())
    parser = argparse.ArgumentParser(
        prog="python -m sdtune.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = lambda name, help, **more: parser.add_argument(f"--{name}", help=help, **more)  # noqa: E731
    add("tasks", f"{', '.join(TASKS)}, or folders with train and test", nargs="+")
    add("methods", f"methods, or groups of them ({groups}); the first is what the others are compared with", nargs="+")
    add("seeds", "training seeds of each method", type=int)
    add("steps", "steps of every run", type=int)
    add("rates", "learning rates to choose from; a single one is taken as it is", type=float, nargs="+")
    add("prompts", "most held-out prompts of each task", type=int)
    add("base", "as in train_anime.py")
    add("output", "folder for the results, and for what is finished so far")
    parser.add_argument("--quick", action="store_true", help="a few steps of each, to see that all of it works")
    given = vars(parser.parse_args(argv))
    start = quick if given.pop("quick") else default
    settings = replace(start, **{k: v for k, v in given.items() if v is not None})
    low = [n for n in ("seeds", "steps") if getattr(settings, n) < 1] + ["prompts"] * (settings.prompts < 2)
    if low:
        parser.error(f"{', '.join(low)}: too few")
    return settings


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    settings = _settings(argv)
    place = _share(argv)
    for logging in (transformers.utils.logging, diffusers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        Evaluation(settings, *place).run()
    except Stopped as stop:
        print(f"\n{str(stop).split('. Continue')[0]}. The same command goes on from there", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("\nstopped; what is finished stays, and the same command goes on from there", file=sys.stderr)
        return 130
    except (EvaluationError, measures.MissingPackages, TrainError, ValueError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
