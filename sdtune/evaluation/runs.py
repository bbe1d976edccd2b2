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
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import save_file

from ..adapters import api, tuner_file
from ..bases import load, properties
from ..inference import compare
from ..training import dataset, encoding
from ..training.config import TrainConfig
from ..training.errors import Stopped, TrainError
from ..training.loss import denoising_errors
from ..training.trainer import fit
from ..tuners.config import FULL, TunerConfig
from . import features
from .methods import GROUPS, EvaluationError, methods, parameter_count
from .tasks import TASKS, UNRELATED_PROMPTS, Task, _write_pairs, read_task

BASE, SHUFFLED = "base", "shuffled"


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
        features.feature_network(self.device)  # tells at once if its packages are missing
        self.resolution = load.native_resolution(settings.base)
        self.tasks = [read_task(t, self.output, self.resolution, settings.prompts) for t in settings.tasks]
        if len({task.folder for task in self.tasks}) < len(self.tasks):
            raise EvaluationError(f"two of the tasks {', '.join(settings.tasks)} have one name; rename a folder")
        self.pipe = load.load_base(settings.base).to(self.device)
        for part in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            part.requires_grad_(False).eval()
        self.guidance = properties.default_guidance(self.pipe)
        self.outside_prompts = UNRELATED_PROMPTS["small" if properties.is_small(self.pipe) else "large"][
            : settings.prompts
        ]
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
            tuner_file.write_text(path, json.dumps(then | now, indent=2))

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
                    file = self.folder(task, label, found["rate"], seed) / tuner_file.FILE_NAME
                    if file.exists() and not run["failed"]:
                        self.measure(task, file.parent, file, seed)
        tuner_file.write_text(task.folder / name / "done.json", json.dumps(found, indent=1))

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
        if (folder / tuner_file.FILE_NAME).exists():
            run["file_bytes"] = (folder / tuner_file.FILE_NAME).stat().st_size
        if seed is None and not run["failed"]:
            encoded, run["validation"] = self.encode(task.validation), {}
            for checkpoint in [None, *sorted((folder / "checkpoints").glob("step-*"))]:
                with self._tuned(checkpoint), self._autocast():
                    errors = self._errors(encoded, noises=2)
                run["validation"][int(checkpoint.name[5:]) if checkpoint else 0] = errors.tolist()
        tuner_file.write_text(folder / "run.json", json.dumps(run))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return read_json(folder / "run.json")

    @contextmanager
    def _tuned(self, source: Path | None):
        """The base with a tuner file, or without; gives the adapters that a `Cell` names."""
        if source is None:
            yield {}
            return
        name = api.load_tuner(self.pipe, source, "evaluated")
        try:
            yield {name: 1.0}
        finally:
            api.unload_tuner(self.pipe, name)

    def _errors(self, encoded: encoding.Encoded, noises: int = 1) -> torch.Tensor:
        scheduler = DDPMScheduler.from_config(self.pipe.scheduler.config)
        return denoising_errors(self.pipe.unet, scheduler, encoded, noises)

    def _autocast(self):
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(torch.device(self.device).type, half or torch.bfloat16, enabled=half is not None)

    def encode(self, pairs: list[dataset.Pair]) -> encoding.Encoded:
        pipe = self.pipe
        encoded = encoding.encode(pairs, pipe.vae, pipe.tokenizer, pipe.text_encoder, self.resolution)
        return encoded.to(self.device, torch.float32)

    def encoded(self, task: Task) -> encoding.Encoded:
        """The held-out pairs of a task, encoded once, in the precision that pictures are drawn in."""
        with self._autocast():
            task.encoded = task.encoded or self.encode(task.test)
        return task.encoded

    @torch.no_grad()
    def given_back(self, pairs: list[dataset.Pair]) -> list[Image.Image]:
        """The pictures as the VAE gives them back, in the precision that pictures are drawn in."""
        vae = self.pipe.vae
        with self._autocast():
            latents = self.encode(pairs).mean[:, 0] / vae.config.scaling_factor
            decoded = torch.cat([vae.decode(part).sample.float().cpu() for part in latents.split(16)])
        return self.pipe.image_processor.postprocess(decoded, output_type="pil")

    def _draw(self, prompts: list[str], first_seed: int, adapters: dict) -> list[Image.Image]:
        """Prompt i from the noise of first_seed + i."""
        cells = [compare.Cell(p, first_seed + i, adapters, self.guidance) for i, p in enumerate(prompts)]
        return compare.draw_cells(
            self.pipe, cells, steps=self.settings.drawing_steps, size=self.resolution,
            title="" if self.rank else "drawing",
        )  # fmt: skip

    @cached_property
    def outside(self) -> tuple[encoding.Encoded, dict[str, torch.Tensor]]:
        """The base's own pictures of the prompts outside: encoded, and their features and the base's errors on them."""
        with self._autocast():
            images = self._draw(self.outside_prompts, 0, {})
        pairs = [dataset.Pair(p, p, lambda image=image: image) for p, image in zip(self.outside_prompts, images)]
        encoded = self.encode(pairs)
        with self._autocast():
            errors = self._errors(encoded)
        return encoded, {"outside": features.features(images, self.device), "outside_errors": errors}

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
        found |= {"features": features.features(drawn, device), "colours": features.colours(drawn),
                  "outside": features.features(others, device)}  # fmt: skip
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
