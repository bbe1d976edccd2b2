"""What the runs of an evaluation have left, collected for the report: a row of statistics per task and method."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

from ..adapters.matching import count_parameters
from ..training import stopping
from . import features, intervals, metrics
from .costs import measure_costs
from .intervals import Estimate, Statistic
from .metrics import COLUMNS
from .runs import BASE, SHUFFLED, Evaluation, read_json
from .tasks import Task

TRUE_PICTURES = "true pictures"


@dataclass
class Row:
    """A row of a task's tables: its statistics by metric and seed, and what it cost."""

    label: str
    measured: dict[str, dict[int, Statistic]]
    cost: dict = field(default_factory=dict)

    def estimate(self, key: str) -> Estimate | None:
        """The mean of a metric over the seeds with its interval; None where it was not measured."""
        return intervals.estimate(list(self.measured[key].values())) if self.measured.get(key) else None

    def against(self, other: "Row", key: str) -> Estimate | None:
        """This row's metric minus another's, over the seeds and prompts that both have."""
        own, theirs = self.measured.get(key, {}), other.measured.get(key, {})
        both = [own[s] - theirs[s] for s in own if s in theirs and own[s].size == theirs[s].size]
        return intervals.estimate(both) if both else None


class Results:
    """The rows of every task, what the runs of each method found, and what each method costs."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation, self.reference, self.settings = evaluation, evaluation.reference, evaluation.settings
        self.costs = measure_costs(evaluation)
        self.done = {
            task.name: {name: read_json(task.folder / name / "done.json") for name in evaluation.methods}
            for task in evaluation.tasks
        }
        self.rows = {task.name: self._rows(task) for task in evaluation.tasks}

    def first_row(self, rows: list[Row]) -> Row:
        """The row of the method that the others are compared with."""
        return next(r for r in rows if r.label == self.reference)

    def is_method(self, row: Row) -> bool:
        """Whether a row is a method's, rather than the base's, the shuffled captions' or the true pictures'."""
        return row.label in self.evaluation.methods

    def compared_rows(self, rows: list[Row]) -> list[Row]:
        """The rows that are compared with the first method's: all that a model drew, but for its own."""
        return [r for r in rows if r.label not in (TRUE_PICTURES, self.reference)]

    def seed_folders(self, task: Task, label: str) -> dict[int, Path]:
        """The folders, by seed, of what was measured of a method, of the base, or of the shuffled captions."""
        evaluation, seeds = self.evaluation, range(self.settings.seeds)
        rate = None if label == BASE else self._done(task, label).get("rate")
        folders = {
            s: task.folder / BASE / f"seed-{s}" if label == BASE else evaluation.run_folder(task, label, rate, s)
            for s in (seeds if rate or label == BASE else [])
        }
        return {s: f for s, f in folders.items() if (f / "measured.safetensors").exists()}

    def _done(self, task: Task, label: str) -> dict:
        return self.done[task.name].get(self.reference if label == SHUFFLED else label, {})

    def _rows(self, task: Task) -> list[Row]:
        """The rows of a task: base, shuffled captions, methods, and the true pictures."""
        evaluation, device = self.evaluation, self.evaluation.model.device
        test, train = (evaluation.model.reconstruct(pairs) for pairs in (task.test, task.train))
        true = {
            "features": features.features(test, device), "local": features.local_features(test, device),
            "colours": features.colours(test),
            "train": features.features(train, device), **evaluation.outside[1],
        }  # fmt: skip
        rows = []
        for label in (BASE, SHUFFLED, *evaluation.methods):
            folders = self.seed_folders(task, label)
            drawn = {seed: load_file(folder / "measured.safetensors") for seed, folder in folders.items()}
            found = {seed: metrics.all_metrics(d, true) for seed, d in drawn.items()}
            by_metric = {c.key: {seed: of[c.key] for seed, of in found.items()} for c in COLUMNS}
            cost = self.costs[self.reference if label == SHUFFLED else label]
            rows.append(Row(label, by_metric, cost | (self._training(task, label) if label != BASE else {})))

        ceiling, mean_colours = metrics.all_metrics(true, true), true["colours"].mean(0).expand(len(train), -1, -1)
        ceiling["kid"] = metrics.kid(true["train"], true["features"], paired=False)
        ceiling["colour"] = metrics.colour_distance(features.colours(train), mean_colours)
        rows.append(Row(TRUE_PICTURES, {k: {0: s} for k, s in ceiling.items()}))
        return rows

    def _training(self, task: Task, label: str) -> dict:
        """What the training runs of a method on a task found."""
        done, evaluation = self._done(task, label), self.evaluation
        name = self.reference if label == SHUFFLED else label
        runs = done["runs"].get(label, [])
        rate, rates = done["rate"], evaluation.rates(name)
        curve = done["rates"].get(f"{rate:g}", {}).get("validation") if rate else None
        curve = {int(step): errors for step, errors in curve.items()} if curve else None
        return {
            "rate": rate,
            "rate_at_edge": len(rates) > 1 and rate in (rates[0], rates[-1]),
            "parameters": count_parameters(evaluation.model.pipe.unet, evaluation.methods[name]),
            "file_bytes": max((r["file_bytes"] for r in runs if r.get("file_bytes")), default=None),
            "failed": sum(bool(r["failed"]) for r in runs),
            "best_step": curve and min(curve, key=lambda step: statistics.mean(curve[step])),
            "memorises_after": curve and stopping.first_memorising_step(curve),
        }
