"""The runs behind `evaluate`: methods at matched parameter counts, tasks, and what is trained, drawn and measured.

Every finished run leaves a file in the output folder and is skipped by the next start; an interrupted one goes on.
"""

import hashlib
import json
import math
import re
import shutil
import statistics
import time
import uuid
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import save_file

from . import bases, data, drawing, measures, pipeline, store
from .config import TrainConfig
from .objective import denoising_errors
from .train import Stopped, TrainError, fit
from .tuners import FULL, TunerConfig

ROOT = Path(__file__).parent.parent
TASKS = {
    "anime": ROOT / "assets/anime",
    "openmoji": ROOT / ".cache/tasks/openmoji",
    "fluent3d": ROOT / ".cache/tasks/fluent3d",
}
GROUPS = {
    "paper": ["res_attn", "res_adapter", "res_prefix", "res_prompt"],
    "baselines": ["lora", "lora_ff", "dora", "full"],
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
    return sum(math.prod(shape) for shape in pipeline.expected_shapes(unet, config).values())


def methods(unet) -> dict[str, TunerConfig]:
    """Every method by its name, for this UNet.

    All have about the parameter count of Res-Attn 4x4 on attn1, attn2 and ff, as nearly as a whole rank or length
    allows; but full fine-tuning has all of them, and the ablation's ranks, heads and operations are as named.
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
        "full": TunerConfig(kind="full"),
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
    rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
    prompts: int = 100
    batch_size: int = 4
    drawing_steps: int = 20
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
        self.guidance = pipeline.usual_guidance(self.pipe)
        self.outside_prompts = OUTSIDE["small" if pipeline.is_small(self.pipe) else "large"][: settings.prompts]
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
        now["mixed precision"] = self.precision or "no"
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
            store.write_text(path, json.dumps(then | now, indent=2))

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
            while any(read_json(path).get("asked") != self.asked for path in waiting):
                time.sleep(2)  # other processes are still at it

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
        store.write_text(task.folder / name / "done.json", json.dumps(found, indent=1))

    def rates(self, name: str) -> list[float]:
        """The learning rates that a method may have; for full fine-tuning a tenth, as is its trainer's default."""
        return sorted(r / 10 if self.methods[name].kind == FULL else r for r in self.settings.rates)

    def choose_rate(self, task: Task, name: str) -> dict:
        """Trains on three quarters of the training pairs at several rates, and measures on the rest.

        It starts with the two in the middle and goes on where the error falls, until both neighbours of the best have
        been tried, or it is the last: the best of all, if the error has one valley.

        Returns:
            `rate`, the best (None if the loss was not finite at any), and `rates`: for each its run. A single rate
            is taken as it is.
        """
        rates, errors, runs = self.rates(name), {}, {}
        if len(rates) == 1:
            return {"rate": rates[0], "rates": {}}
        middle = len(rates) // 2
        wanted = {middle - 1, middle}
        while wanted:
            for i in sorted(wanted):
                runs[i] = self.train(task, name, self.methods[name], rates[i], None)
                errors[i] = final_error(runs[i])
            best = min(errors, key=errors.get)
            wanted = {best - 1, best + 1} & set(range(len(rates))) - errors.keys()
        found = ", ".join(f"{rates[i]:g}: {errors[i]:.4f}" for i in sorted(errors))
        self._say(f"{task.name}, {name}: validation error by learning rate {found}")
        rate = rates[best] if math.isfinite(errors[best]) else None
        return {"rate": rate, "rates": {f"{rates[i]:g}": runs[i] for i in sorted(runs)}}

    def folder(self, task: Task, label: str, rate: float, seed: int | None) -> Path:
        label = f"{SHUFFLED}-{self.reference}" if label == SHUFFLED else label
        return task.folder / label / (f"validation-rate-{rate:g}" if seed is None else f"seed-{seed}-rate-{rate:g}")

    def train(self, task: Task, label: str, config: TunerConfig, rate: float, seed: int | None) -> dict:
        """One run of the trainer, or what it left when it was finished before; without a seed, a validation run.

        Returns:
            `failed` (why, if its loss was not finite) and `file_bytes`; of a validation run `validation`: step ->
            denoising error of each validation pair.
        """
        folder, pairs = self.folder(task, label, rate, seed), task.train if seed is not None else task.part
        if (folder / "run.json").exists():
            return read_json(folder / "run.json")
        captions = [p.caption for p in pairs]
        if label == SHUFFLED:  # every picture gets the caption of another
            captions = captions[len(captions) // 2 :] + captions[: len(captions) // 2]
        source = task.folder / "data" / (SHUFFLED if label == SHUFFLED else "part" if seed is None else "all")
        _write_pairs(source, pairs, captions, self.resolution)
        steps = self.settings.steps
        settings = TrainConfig(
            data=str(source), base=self.settings.base, output=str(folder), steps=steps, learning_rate=rate,
            batch_size=self.settings.batch_size, seed=seed or 0, mixed_precision=self.precision, preview_every=0,
            preview_steps=1, preview_prompts=captions[:1], checkpoint_every=-(-steps // 5),
            resume=any((folder / "checkpoints").glob("step-*/state.json")),
        )  # fmt: skip
        run = {"failed": None, "rate": rate, "seed": seed}
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(folder / "log.txt", "a") as log, redirect_stdout(log):
                fit(settings, config)
        except Stopped:
            raise
        except (TrainError, ValueError) as error:
            if not re.search("not finite|NaN", str(error)):
                raise
            run["failed"] = str(error)
            self._say(f"{task.name}, {label}, rate {rate:g}: {error}")
        if (folder / store.FILE_NAME).exists():
            run["file_bytes"] = (folder / store.FILE_NAME).stat().st_size
        if seed is None and not run["failed"]:
            encoded, run["validation"] = self.encode(task.validation), {}
            for checkpoint in [None, *sorted((folder / "checkpoints").glob("step-*"))]:
                with self._tuned(checkpoint), self._autocast():
                    errors = self._errors(encoded, noises=2)
                run["validation"][int(checkpoint.name[5:]) if checkpoint else 0] = errors.tolist()
        store.write_text(folder / "run.json", json.dumps(run))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return read_json(folder / "run.json")

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

    def _errors(self, encoded: data.Encoded, noises: int = 1) -> torch.Tensor:
        scheduler = DDPMScheduler.from_config(self.pipe.scheduler.config)
        return denoising_errors(self.pipe.unet, scheduler, encoded, noises)

    def _autocast(self):
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(torch.device(self.device).type, half or torch.bfloat16, enabled=half is not None)

    def encode(self, pairs: list[data.Pair]) -> data.Encoded:
        pipe = self.pipe
        encoded = data.encode(pairs, pipe.vae, pipe.tokenizer, pipe.text_encoder, self.resolution)
        return encoded.to(self.device, torch.float32)

    def encoded(self, task: Task) -> data.Encoded:
        """The held-out pairs of a task, encoded once, in the precision that pictures are drawn in."""
        with self._autocast():
            task.encoded = task.encoded or self.encode(task.test)
        return task.encoded

    @torch.no_grad()
    def given_back(self, pairs: list[data.Pair]) -> list[Image.Image]:
        """The pictures as the VAE gives them back, in the precision that pictures are drawn in."""
        vae = self.pipe.vae
        with self._autocast():
            latents = self.encode(pairs).mean[:, 0] / vae.config.scaling_factor
            decoded = torch.cat([vae.decode(part).sample.float().cpu() for part in latents.split(16)])
        return self.pipe.image_processor.postprocess(decoded, output_type="pil")

    def _draw(self, prompts: list[str], first_seed: int, adapters: dict) -> list[Image.Image]:
        """Prompt i from the noise of first_seed + i."""
        cells = [drawing.Cell(p, first_seed + i, adapters, self.guidance) for i, p in enumerate(prompts)]
        return drawing.draw_cells(
            self.pipe, cells, steps=self.settings.drawing_steps, size=self.resolution,
            title="" if self.rank else "drawing",
        )  # fmt: skip

    @cached_property
    def outside(self) -> tuple[data.Encoded, dict[str, torch.Tensor]]:
        """The base's own pictures of the prompts outside: encoded, and their features and the base's errors on them."""
        with self._autocast():
            images = self._draw(self.outside_prompts, 0, {})
        pairs = [data.Pair(p, p, lambda image=image: image) for p, image in zip(self.outside_prompts, images)]
        encoded = self.encode(pairs)
        with self._autocast():
            errors = self._errors(encoded)
        return encoded, {"outside": measures.features(images, self.device), "outside_errors": errors}

    def measure(self, task: Task, folder: Path, file: Path | None, seed: int) -> None:
        """Draws the held-out prompts and those outside the style; leaves pictures, features and errors in `folder`.

        Every method starts from the same noise: that of seed * prompts + i for held-out prompt i, and of i outside.
        """
        if (folder / "measured.safetensors").exists():
            return
        (outside, _), prompts, device = self.outside, [p.caption for p in task.test], self.device
        with self._tuned(file) as adapters, self._autocast():
            drawn = self._draw(prompts, seed * len(prompts), adapters)
            others = self._draw(self.outside_prompts, 0, adapters)
            found = {
                "errors": self._errors(self.encoded(task)),
                "outside_errors": self._errors(outside),
            }
        found |= {"features": measures.features(drawn, device), "colours": measures.colours(drawn),
                  "outside": measures.features(others, device)}  # fmt: skip
        (folder / "drawn").mkdir(parents=True, exist_ok=True)
        for prefix, images in (("", drawn), ("outside-", others)):
            for i, image in enumerate(images):
                image.save(folder / "drawn" / f"{prefix}{i:03d}.png")
        part = folder / ".measured.part"
        save_file(found, part)
        part.replace(folder / "measured.safetensors")


def final_error(run: dict) -> float:
    """The mean validation error at the end of a validation run."""
    curve = run.get("validation")
    return math.inf if run["failed"] or not curve else statistics.mean(curve[max(curve, key=int)])


def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}
