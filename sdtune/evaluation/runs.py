"""The runs of an evaluation: what is trained, drawn and measured for each method on each task.

Every finished run leaves a file in the output folder and is skipped by the next start; an interrupted one continues.
"""

import hashlib
import json
import math
import re
import shutil
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..adapters import tuner_file
from ..adapters.matching import count_parameters
from ..bases import load, properties
from ..training import checkpoints, dataset, encoding
from ..training.config import TrainConfig
from ..training.errors import Stopped, TrainError
from ..training.fit import fit
from ..tuners.config import FULL, TunerConfig
from . import features, metrics
from .methods import GROUPS, TRAINING, EvaluationError, methods
from .model import EvaluatedModel, default_device
from .tasks import TASKS, UNRELATED_PROMPTS, Task, read_task, write_pairs

BASE, SHUFFLED = "base", "shuffled"


@dataclass
class Settings:
    """What the numbers depend on besides the code."""

    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    methods: list[str] = field(default_factory=lambda: ["paper", "baselines"])
    seeds: int = 3
    steps: int = 200
    rates: list[float] = field(default_factory=lambda: [3e-3, 6e-3, 1.2e-2, 2.4e-2])
    prompts: int = 48
    batch_size: int = 8
    drawing_steps: int = 20
    base: str = "tiny-sd"
    output: str = "output/evaluation"


class Evaluation:
    """The base, the tasks and the methods of one evaluation, and the runs of this process.

    Args:
        rank, world: the number of this process, and how many share the runs.
        precision: mixed precision of Accelerate, or None for its default.

    Raises:
        MissingPackages, EvaluationError, DataError, BaseError: if it cannot start.
    """

    def __init__(self, settings: Settings, rank: int = 0, world: int = 1, precision: str | None = None):
        self.settings, self.output = settings, Path(settings.output)
        self.rank, self.world, self.precision = rank, world, precision
        features.feature_network(default_device())  # fails at once if its packages are missing
        resolution = load.native_resolution(settings.base)
        self.tasks = [read_task(t, self.output, resolution, settings.prompts) for t in settings.tasks]
        if len({task.folder for task in self.tasks}) < len(self.tasks):
            raise EvaluationError(f"two of the tasks {', '.join(settings.tasks)} have one name; rename a folder")
        self._print(f"loading the base {settings.base} ...")
        self.model = EvaluatedModel(settings.base, precision, settings.drawing_steps, progress_bar=not rank)
        prompts = UNRELATED_PROMPTS["small" if properties.is_small(self.model.pipe) else "large"]
        self.outside_prompts = prompts[: settings.prompts]
        self.methods = self._select_methods(settings.methods)
        self.reference = next(iter(self.methods))
        self._check_output_folder()

    def _select_methods(self, names: list[str]) -> dict[str, TunerConfig]:
        """The methods of these names and groups."""
        every = methods(self.model.pipe.unet)
        flat = [n for name in names for n in GROUPS.get(name, [name])]
        unknown = [n for n in flat if n not in every]
        if unknown:
            raise EvaluationError(
                f"there is no method {', '.join(unknown)}; possible: {', '.join(every)}, and the groups "
                f"{', '.join(GROUPS)}"
            )
        return {n: every[n] for n in flat}

    def _check_output_folder(self) -> None:
        """Refuses an output folder whose numbers were made from another base, other data or other settings."""
        weights = hashlib.sha256()
        for p in self.model.pipe.unet.parameters():
            weights.update(p.flatten()[:1000].cpu().numpy().tobytes())
        now = {"base": f"{self.settings.base} {weights.hexdigest()[:12]}"}
        now |= {k: getattr(self.settings, k) for k in ("steps", "batch_size", "prompts", "drawing_steps")}
        now["mixed precision"] = self.precision or "no"
        now["measures"] = ", ".join(column.key for column in metrics.COLUMNS)
        for task in self.tasks:
            pairs = hashlib.sha256()
            for pair in task.train + task.test:
                pairs.update(pair.caption.encode() + pair.open().tobytes())
            now[f"task {task.name}"] = pairs.hexdigest()[:12]
        now |= {f"method {name}": asdict(c) | TRAINING.get(name, {}) for name, c in self.methods.items()}
        path = self.output / "settings.json"
        then = read_json(path)
        if then:
            then = {"measures": "those of an earlier version"} | then
        changed = [f"{k} was {then[k]} and is {now[k]}" for k in now if k in then and then[k] != now[k]]
        if changed:
            raise EvaluationError(
                f"{self.output} holds results that cannot be compared with these: {'; '.join(changed)}. Give another "
                "--output, or delete the folder"
            )
        if self.rank == 0:
            tuner_file.write_text(path, json.dumps(then | now, indent=2))

    def run(self) -> None:
        """Does this process's share of the runs; the first process then waits until the others have done theirs."""
        for name, config in self.methods.items():
            self._print(f"{name}: {count_parameters(self.model.pipe.unet, config):,} trainable parameters")
        pairs = [(task, name) for task in self.tasks for name in (BASE, *self.methods)]
        own = pairs[self.rank :: self.world]
        for i, (task, name) in enumerate(own):
            self._print(f"[{i + 1} of {len(own)}] {task.name}: {name}")
            self.evaluate(task, name)
        if self.rank == 0:
            files = [task.folder / name / "done.json" for task, name in pairs]
            while any(read_json(path).get("asked") != self._rates_and_seeds for path in files):
                time.sleep(2)

    def _print(self, text: str) -> None:
        print(text if self.world == 1 else f"process {self.rank}: {text}", flush=True)

    @property
    def _rates_and_seeds(self) -> dict:
        return {"rates": self.settings.rates, "seeds": self.settings.seeds}

    def evaluate(self, task: Task, name: str) -> None:
        """Does all runs of one method, or of the base, on one task; for the first method also with shuffled captions.

        Leaves done.json: `rates`, the validation runs by rate, the chosen `rate`, and `runs`, those of each seed.
        """
        # the key "asked" is that of earlier versions, whose output folders are still read
        found = {"asked": self._rates_and_seeds, "rates": {}, "runs": {}}
        if name == BASE:
            for seed in range(self.settings.seeds):
                self.draw_and_measure(task, task.folder / BASE / f"seed-{seed}", None, seed)
        else:
            found |= self.choose_rate(task, name)
            labels = [name, SHUFFLED] if name == self.reference else [name]
            for label in labels if found["rate"] else []:
                seeds = 1 if label == SHUFFLED else self.settings.seeds  # one is enough to show where a floor is
                found["runs"][label] = [self.train(task, label, self.methods[name], found["rate"], seed)
                                        for seed in range(seeds)]  # fmt: skip
                for seed, run in enumerate(found["runs"][label]):
                    file = self.run_folder(task, label, found["rate"], seed) / tuner_file.FILE_NAME
                    if file.exists() and not run["failed"]:
                        self.draw_and_measure(task, file.parent, file, seed)
        tuner_file.write_text(task.folder / name / "done.json", json.dumps(found, indent=1))

    def rates(self, name: str) -> list[float]:
        """The learning rates to choose from; for full fine-tuning a tenth, as the trainer's default is."""
        if TRAINING.get(name, {}).get("optimizer") == "prodigy":
            return [1.0]
        return sorted(r / 10 if self.methods[name].kind == FULL else r for r in self.settings.rates)

    def choose_rate(self, task: Task, name: str) -> dict:
        """Trains on three quarters of the training pairs at several rates, and draws the prompts of the rest.

        It starts with the two in the middle and continues where the similarity to the true pictures rises, until both
        neighbours of the best have been tried, or the best is the first or last of all.

        Returns:
            `rate`, the best (None if the loss was not finite at any), and `rates`: the run of each that was tried. A
            single rate is taken without a run.
        """
        rates, similarity, runs = self.rates(name), {}, {}
        if len(rates) == 1:
            return {"rate": rates[0], "rates": {}}
        middle = len(rates) // 2
        wanted = {middle - 1, middle}
        while wanted:
            for i in sorted(wanted):
                runs[i] = self.train(task, name, self.methods[name], rates[i], None)
                similarity[i] = -math.inf if runs[i]["failed"] else runs[i]["similarity"]
            best = max(similarity, key=similarity.get)
            wanted = {best - 1, best + 1} & set(range(len(rates))) - similarity.keys()
        found = ", ".join(f"{rates[i]:g}: {similarity[i]:.4f}" for i in sorted(similarity))
        self._print(f"{task.name}, {name}: local similarity on validation prompts by learning rate {found}")
        rate = rates[best] if math.isfinite(similarity[best]) else None
        return {"rate": rate, "rates": {f"{rates[i]:g}": runs[i] for i in sorted(runs)}}

    def run_folder(self, task: Task, label: str, rate: float, seed: int | None) -> Path:
        """The folder of a run of `train`."""
        label = f"{SHUFFLED}-{self.reference}" if label == SHUFFLED else label
        return task.folder / label / (f"validation-rate-{rate:g}" if seed is None else f"seed-{seed}-rate-{rate:g}")

    def train(self, task: Task, label: str, config: TunerConfig, rate: float, seed: int | None) -> dict:
        """One run of the trainer, or the result that a finished one has left; without a seed it is a validation run.

        Returns:
            `failed` (why, if its loss was not finite) and `file_bytes`; of a validation run `validation`: step ->
            denoising error of each validation pair, and `similarity` as of `similarity_on_validation`.
        """
        folder, pairs = self.run_folder(task, label, rate, seed), task.train if seed is not None else task.train_part
        if (folder / "run.json").exists():
            return read_json(folder / "run.json")
        captions = [p.caption for p in pairs]
        if label == SHUFFLED:  # every picture gets the caption of another
            captions = captions[len(captions) // 2 :] + captions[: len(captions) // 2]
        source = task.folder / "data" / (SHUFFLED if label == SHUFFLED else "part" if seed is None else "all")
        write_pairs(source, pairs, captions, self.model.resolution)
        steps = self.settings.steps
        settings = TrainConfig(
            data=str(source), base=self.settings.base, output=str(folder), steps=steps, learning_rate=rate,
            batch_size=self.settings.batch_size, seed=seed or 0, mixed_precision=self.precision, preview_every=0,
            preview_steps=1, preview_prompts=captions[:1], checkpoint_every=-(-steps // 5),
            resume=any((folder / "checkpoints").glob("step-*/state.json")),
            **TRAINING.get(self.reference if label == SHUFFLED else label, {}),
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
            self._print(f"{task.name}, {label}, rate {rate:g}: {error}")
        if (folder / tuner_file.FILE_NAME).exists():
            run["file_bytes"] = (folder / tuner_file.FILE_NAME).stat().st_size
        if seed is None and not run["failed"]:
            encoded, run["validation"] = self.model.encode(task.validation), {}
            for checkpoint in [None, *checkpoints.list_checkpoints(folder)]:
                with self.model.with_tuner(checkpoint), self.model.autocast():
                    errors = self.model.denoising_errors(encoded, noises=2)
                run["validation"][checkpoints.step_of(checkpoint) if checkpoint else 0] = errors.tolist()
            run["similarity"] = self.similarity_on_validation(task, folder / tuner_file.FILE_NAME)
        tuner_file.write_text(folder / "run.json", json.dumps(run))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return read_json(folder / "run.json")

    def similarity_on_validation(self, task: Task, file: Path) -> float:
        """The mean local similarity of what a tuner draws of the validation prompts, twice, to their true pictures."""
        with self.model.autocast():
            true = features.local_features(self.model.reconstruct(task.validation), self.model.device)
        prompts = [p.caption for p in task.validation]
        with self.model.with_tuner(file) as adapters, self.model.autocast():
            drawn = self.model.draw(2 * prompts, 0, adapters)
        found = metrics.local_similarity(features.local_features(drawn, self.model.device), true.repeat(2, 1, 1, 1))
        return found.of(torch.ones(1, found.size)).item()

    def encoded(self, task: Task) -> encoding.Encoded:
        """The held-out pairs of a task, encoded once, in the precision that pictures are drawn in."""
        with self.model.autocast():
            task.encoded = task.encoded or self.model.encode(task.test)
        return task.encoded

    @cached_property
    def outside(self) -> tuple[encoding.Encoded, dict[str, torch.Tensor]]:
        """The base's own pictures of prompts outside the style, encoded; their features and the base's errors."""
        with self.model.autocast():
            images = self.model.draw(self.outside_prompts, 0, {})
        pairs = [
            dataset.Pair(p, p, lambda image=image: image, image.size) for p, image in zip(self.outside_prompts, images)
        ]
        encoded = self.model.encode(pairs)
        with self.model.autocast():
            errors = self.model.denoising_errors(encoded)
        return encoded, {"outside": features.features(images, self.model.device), "outside_errors": errors}

    def draw_and_measure(self, task: Task, folder: Path, file: Path | None, seed: int) -> None:
        """Draws the held-out prompts and those outside the style; leaves pictures, features and errors in `folder`.

        Every method starts from the same noise: that of seed * prompts + i for held-out prompt i, and that of i
        for prompt i outside the style.
        """
        if (folder / "measured.safetensors").exists():
            return
        (outside, _), prompts, device = self.outside, [p.caption for p in task.test], self.model.device
        with self.model.with_tuner(file) as adapters, self.model.autocast():
            drawn = self.model.draw(prompts, seed * len(prompts), adapters)
            others = self.model.draw(self.outside_prompts, 0, adapters)
            found = {
                "errors": self.model.denoising_errors(self.encoded(task)),
                "outside_errors": self.model.denoising_errors(outside),
            }
        found |= {
            "features": features.features(drawn, device), "local": features.local_features(drawn, device).half(),
            "colours": features.colours(drawn), "outside": features.features(others, device),
        }  # fmt: skip
        (folder / "drawn").mkdir(parents=True, exist_ok=True)
        for prefix, images in (("", drawn), ("outside-", others)):
            for i, image in enumerate(images):
                image.save(folder / "drawn" / f"{prefix}{i:03d}.png")
        part = folder / ".measured.part"
        save_file(found, part)
        part.replace(folder / "measured.safetensors")


def read_json(path: Path) -> dict:
    """The content of a JSON file, or an empty dict where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}
