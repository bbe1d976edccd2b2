"""All runs of one command: data sets, methods and seeds. What is finished is kept in results.json and skipped."""

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from ..adapters import tuner_file
from ..training.errors import DataError
from ..tuners.config import FULL
from . import model, report
from .data import Data, Pixels, read_data
from .methods import DEFAULT, Method, parse_method
from .training import Schedule, train

RESULTS = "results.json"
GRID_RATES, GRID_DECAYS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (1e-4, 1e-2)
_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class SettingsError(ValueError):
    """The command cannot start; the message lists every problem."""


@dataclass
class Settings:
    """What the numbers depend on besides the code."""

    data: list[str] = field(default_factory=list)
    base: str = model.DEFAULT_BASE
    kinds: list[str] = field(default_factory=lambda: list(DEFAULT))
    seeds: int = 3
    epochs: int = 100
    batch_size: int = 64
    rates: list[float] = field(default_factory=list)
    grid: bool = False
    choose_on_first: bool = False
    image_size: int | None = None
    layers: int | None = None
    train_size: int | None = None
    augment: str = "none"
    mixed_precision: str = "no"
    output: str = "output/vision"


class Experiment:
    """The data sets and methods of one command.

    Raises:
        SettingsError: listing every problem of the methods, the base, the data and the output folder.
    """

    def __init__(self, settings: Settings):
        self.settings, self.output = settings, Path(settings.output)
        problems, self.methods, self.data = [], [], []
        self._read: dict[str, dict[str, Pixels]] = {}  # by data set
        for name in settings.kinds:
            try:
                self.methods.append(parse_method(name))
            except ValueError as error:
                problems.append(str(error))
        problems += model.check_base(settings.base, settings.image_size, settings.layers)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if settings.mixed_precision == "fp16" and device == "cpu":
            problems.append("--mixed_precision fp16 needs a GPU; on the CPU bf16 or no will do")
        for source in settings.data:
            try:
                self.data.append(read_data(source, train_size=settings.train_size))
            except DataError as error:
                problems += [f"{source}: {p}" for p in error.problems]
            else:
                if not len(self.data[-1].val) and (settings.grid or len(settings.rates) > 1):
                    problems.append(f"{source}: no picture is left for validation, by which a rate is chosen; give "
                                    "each class more pictures, or one rate alone")  # fmt: skip
        names = [d.name for d in self.data]
        problems += [f"two data sets are called {n}; rename a folder" for n in sorted(set(names)) if names.count(n) > 1]
        self.results = self._read_results(problems)
        if problems:
            raise SettingsError("\n".join(f"  - {p}" for p in problems))
        self.device = device

    def _read_results(self, problems: list[str]) -> dict:
        """What is in results.json; adds a problem for every setting that was another when it was written."""
        now = asdict(self.settings)
        for name in ("data", "kinds", "seeds", "output"):  # more of these may be added to what is there
            del now[name]
        path = self.output / RESULTS
        found = {"settings": now, "data": {}, "grid": {}, "runs": {}}
        if path.is_file():
            try:
                found |= json.loads(path.read_text())
            except ValueError:
                problems.append(f"{path} is not JSON; move it away, or give another --output")
        for data in self.data:
            own = {"classes": data.classes, "train": len(data.train), "val": len(data.val), "test": len(data.test)}
            if found["data"].setdefault(data.name, own) != own:
                problems.append(f"{path} holds results of another data set called {data.name}; give another --output")
        changed = [
            f"{k} was {found['settings'].get(k)} and is {v}" for k, v in now.items() if found["settings"].get(k) != v
        ]
        if changed:
            problems.append(f"{path} holds results of other settings ({'; '.join(changed)}); give another --output")
        return found

    def _write_results(self) -> None:
        tuner_file.write_text(self.output / RESULTS, json.dumps(self.results, indent=1))

    def run(self) -> None:
        """Does all runs, the seeds outermost, so that the table is complete for one seed first; then the report."""
        if any(f"{d.name}/{m.name}/seed-0" not in self.results["runs"] for d in self.data for m in self.methods):
            self._write_results()  # other settings are refused from here on, as a stopped run is continued
        total = self.settings.seeds * len(self.data) * len(self.methods)
        began, number = time.monotonic(), 0
        for seed in range(self.settings.seeds):
            for data in self.data:
                classifier = None
                for method in self.methods:
                    number += 1
                    key = f"{data.name}/{method.name}/seed-{seed}"
                    if key in self.results["runs"]:
                        continue
                    classifier = classifier or self._load(data)
                    head = f"[{number} of {total}, {(time.monotonic() - began) / 60:.0f} min] {key}"
                    self._run(key, head, data, classifier, method, seed)
        report.write(self.output, self.results, [m.name for m in self.methods], [d.name for d in self.data])

    def _load(self, data: Data) -> model.Classifier:
        loaded, setup = model.load_base(
            self.settings.base, data.classes, self.settings.image_size, self.settings.layers, self.device
        )
        return model.Classifier(loaded, setup, _DTYPES[self.settings.mixed_precision])

    def _pixels(self, data: Data, classifier: model.Classifier) -> dict[str, Pixels]:
        """The pixels of the splits of a data set, read once."""
        if data.name not in self._read:
            splits = {"all": data.train + data.val, "test": data.test}
            if len(self._candidates(self.methods[0])) > 1:
                splits |= {"train": data.train, "val": data.val}
            self._read[data.name] = {n: Pixels(s, classifier.setup.image_size, self.device) for n, s in splits.items()}
        return self._read[data.name]

    def _run(self, key: str, head: str, data: Data, classifier, method: Method, seed: int) -> None:
        folder = self.output / key
        schedule, pixels = self._choose(data, classifier, method), self._pixels(data, classifier)

        def log(text: str) -> None:
            print(f"\r{head}: {text}".ljust(100), end="", flush=True)

        try:
            found = train(classifier, method, pixels["all"], pixels["test"], schedule, seed, folder, seed == 0, log)
        except ArithmeticError as error:
            print(f"\n{error}; this run is left out")
            self.results["runs"][key] = {"failed": str(error)}
            self._write_results()
            return
        predictions, labels = found.pop("predictions"), data.test.labels
        found["correct"] = "".join("1" if p == t else "0" for p, t in zip(predictions, labels))
        self.results["runs"][key] = found
        self._write_results()
        if seed == 0:
            report.draw_mistakes(folder / "mistakes.png", data, predictions)
        print(f"\r{head}: {found['accuracy']:.1%} of the test in {found['seconds']:.0f} s".ljust(100))

    def _choose(self, data: Data, classifier: model.Classifier, method: Method) -> Schedule:
        """The schedule with the rate and decay that do best on the validation pictures of this data set, or of the
        first; what was tried is kept in results.json."""
        candidates = self._candidates(method)
        if len(candidates) == 1:
            return candidates[0]
        if self.settings.choose_on_first:
            data = self.data[0]
        name = f"{data.name}/{method.name}"
        tried = self.results["grid"].setdefault(name, {})
        by_key = {f"rate {c.rate:g}, decay {c.decay:g}": c for c in candidates}
        if not by_key.keys() <= tried.keys() and data.classes != classifier.setup.labels:
            classifier = self._load(data)
        for key, candidate in by_key.items():
            if key not in tried:
                pixels = self._pixels(data, classifier)
                try:
                    found = train(classifier, method, pixels["train"], pixels["val"], candidate, 0, log=lambda _: None)
                    tried[key] = found["accuracy"]
                except ArithmeticError:
                    tried[key] = 0.0
                self._write_results()
                print(f"{name}: {key}: {tried[key]:.1%} of the validation pictures")
        return by_key[max(by_key, key=tried.get)]

    def _candidates(self, method: Method) -> list[Schedule]:
        """The schedules to choose from, with each rate and decay."""
        settings = self.settings
        schedule = Schedule(settings.epochs, settings.batch_size, augment=settings.augment)
        rates = settings.rates or (list(GRID_RATES) if settings.grid else [schedule.rate])
        rates = [r / 10 if r and method.config.kind == FULL else r for r in rates]
        decays = GRID_DECAYS if settings.grid else (schedule.decay,)
        return [replace(schedule, rate=r, decay=d) for r in rates for d in decays]
