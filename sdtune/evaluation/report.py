"""Which tuner is better, by how much, and how sure is that? `python -m sdtune.evaluate --help`

    python assets/tasks.py                                            # once: prepares two of the three tasks
    python -m sdtune.evaluate                                         # all of it
    accelerate launch --num_processes 4 -m sdtune.evaluate            # the same, shared out
    python -m sdtune.evaluate --methods ablation --tasks openmoji --output output/ablation

Every method trains on the same pairs with the same data order, noise and steps, at matched parameter counts. Its
learning rate is the one of --rates (a tenth of these for full fine-tuning) with the lowest denoising error on a
quarter of the *training* pairs; then it trains on all of them with several seeds and draws held-out prompts, whose
true pictures are known. Written into the output folder: table.md, table.csv, results.json, grid.png, curves.png. What
is finished is kept there and skipped by the next start, what was interrupted goes on; processes and machines that
share the folder share the work.
"""

import argparse
import csv
import json
import os
import platform
import re
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import diffusers
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from ..adapters import tuner_file
from ..benchmark import candidates, measure
from ..inference import grids
from ..training import images, launch, stopping
from ..training.errors import Stopped, TrainError
from . import features, intervals, metrics
from .intervals import Estimate, Statistic
from .methods import GROUPS, EvaluationError, parameter_count
from .metrics import COLUMNS, Column
from .runs import BASE, SHUFFLED, Evaluation, Settings, final_error, read_json
from .tasks import TASKS, Task

COST_ROUNDS = 3  # how often each method's costs are measured, by turns

# ------------------------------------------------------------------------------------------------ costs


def measure_costs(evaluation: Evaluation) -> dict[str, dict]:
    """What the base and each method cost, each alone in a process of its own, by turns, while no others are at work.

    Kept in costs.json; what is there already is not measured again.

    Returns:
        By name: `peak_memory`, in bytes beyond what the imports take, in training; `step_seconds`; `drawing_seconds`
        per picture. Medians over the rounds, None where it failed.
    """
    settings, path = evaluation.settings, evaluation.output / "costs.json"
    kept: dict[str, list[dict]] = read_json(path)
    tuners = {BASE: None} | {name: asdict(config) for name, config in evaluation.methods.items()}
    with tempfile.TemporaryDirectory() as work, patch.dict(os.environ):
        os.environ.pop("OMP_NUM_THREADS", None)  # meant for several processes at once
        job = candidates.Job(
            "draw", BASE, settings.base, str(TASKS.get(settings.tasks[0], settings.tasks[0])), work,
            evaluation.resolution, settings.batch_size, evaluation.precision or "no",
            repeat=min(3, settings.steps), draw_steps=settings.drawing_steps,
        )  # fmt: skip
        for number in range(COST_ROUNDS if settings.steps > 20 else 1):
            for name in (n for n in tuners if len(kept.get(n, [])) <= number):
                own = replace(job, who=name, tuner=tuners[name])
                found = {"draw": measure.alone(own)}
                if name != BASE:
                    found["train"] = measure.alone(replace(own, part="train", repeat=min(20, settings.steps)))
                if not any("error" in part for part in found.values()):
                    kept.setdefault(name, []).append(found)
                    tuner_file.write_text(path, json.dumps(kept))

    def seconds_per_picture(found: dict) -> float:
        return statistics.median(found["seconds"]) / settings.batch_size

    def median(name: str, part: str, value) -> float | None:
        found = [value(each[part]) for each in kept.get(name, []) if part in each]
        return statistics.median(found) if found else None

    return {
        name: {
            "peak_memory": median(name, "train", lambda found: found["peak"]),
            "step_seconds": median(name, "train", lambda found: statistics.median(found["seconds"])),
            "drawing_seconds": median(name, "draw", seconds_per_picture),
        }
        for name in tuners
    }


# ---------------------------------------------------------------------------------------------- report


@dataclass
class Row:
    """A row of a task's tables: its statistics by measure and seed, and what it cost."""

    label: str
    measured: dict[str, dict[int, Statistic]]
    cost: dict = field(default_factory=dict)

    def estimate(self, key: str) -> Estimate | None:
        return intervals.estimate(list(self.measured[key].values())) if self.measured.get(key) else None

    def against(self, other: "Row", key: str) -> Estimate | None:
        """The difference to another row, over the seeds and prompts that both have."""
        own, theirs = self.measured.get(key, {}), other.measured.get(key, {})
        both = [own[s] - theirs[s] for s in own if s in theirs and own[s].size == theirs[s].size]
        return intervals.estimate(both) if both else None


class Report:
    """Reads what the runs have left, and writes tables, grid and curves."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation, self.reference, self.settings = evaluation, evaluation.reference, evaluation.settings
        self.costs = measure_costs(evaluation)
        self.done = {
            task.name: {name: read_json(task.folder / name / "done.json") for name in evaluation.methods}
            for task in evaluation.tasks
        }
        self.rows = {task.name: self._rows(task) for task in evaluation.tasks}

    def write(self) -> None:
        output = self.evaluation.output
        tuner_file.write_text(output / "results.json", json.dumps(self._results(), indent=2) + "\n")
        self._write_csv(output / "table.csv")
        self._grid().save(output / "grid.png")
        self._curves(output / "curves.png")
        tuner_file.write_text(output / "table.md", self._markdown())
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
        test, train = (evaluation.given_back(pairs) for pairs in (task.test, task.train))
        true = {
            "features": features.features(test, device), "colours": features.colours(test),
            "train": features.features(train, device), **evaluation.outside[1],
        }  # fmt: skip
        rows = []
        for label in (BASE, SHUFFLED, *evaluation.methods):
            folders = self._seed_folders(task, label)
            drawn = {seed: load_file(folder / "measured.safetensors") for seed, folder in folders.items()}
            found = {seed: metrics.all_metrics(d, true) for seed, d in drawn.items()}
            by_measure = {c.key: {seed: of[c.key] for seed, of in found.items()} for c in COLUMNS}
            cost = self.costs[self.reference if label == SHUFFLED else label]
            rows.append(Row(label, by_measure, cost | (self._training(task, label) if label != BASE else {})))

        itself, mean_colours = metrics.all_metrics(true, true), true["colours"].mean(0).expand(len(train), -1, -1)
        itself["kid"] = metrics.kid(true["train"], true["features"], paired=False)
        itself["colour"] = metrics.colour_distance(features.colours(train), mean_colours)
        rows.append(Row("true pictures", {k: {0: s} for k, s in itself.items()}))
        return rows

    def _training(self, task: Task, label: str) -> dict:
        done, evaluation = self._done(task, label), self.evaluation
        name = self.reference if label == SHUFFLED else label
        runs = done["runs"].get(label, [])
        rate, rates = done["rate"], evaluation.rates(name)
        curve = done["rates"].get(f"{rate:g}", {}).get("validation") if rate else None
        curve = {int(step): errors for step, errors in curve.items()} if curve else None
        return {
            "rate": rate,
            "rate_at_edge": len(rates) > 1 and rate in (rates[0], rates[-1]),
            "parameters": parameter_count(evaluation.pipe.unet, evaluation.methods[name]),
            "file_bytes": max((r["file_bytes"] for r in runs if r.get("file_bytes")), default=None),
            "failed": sum(bool(r["failed"]) for r in runs),
            "best_step": curve and min(curve, key=lambda step: statistics.mean(curve[step])),
            "memorises_after": curve and stopping.first_memorising_step(curve),
        }

    # ---------------------------------------------------------------------------------------- tables

    def _results(self) -> dict:
        settings, tasks = asdict(self.settings), {}
        for task, rows in self.rows.items():
            first = self._first(rows)
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
            "settings": settings, "base": read_json(self.evaluation.output / "settings.json")["base"],
            "methods": {n: asdict(c) for n, c in self.evaluation.methods.items()},
            "versions": tuner_file.library_versions(), "machine": self._machine(), "tasks": tasks,
        }  # fmt: skip

    def _machine(self) -> str:
        if torch.cuda.is_available():
            machine = f"one {torch.cuda.get_device_name()} per process"
        else:
            machine = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads per process"
        precision = self.evaluation.precision or "default"
        return f"{machine}; processes: {self.evaluation.world}; mixed precision: {precision}"

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
            "- Everywhere true pictures are taken as the base's VAE gives them back: all that a model draws comes "
            "through it, and its blur would outweigh all else",
            "- **lowest validation error**, **memorises** (`measures.memorising`): on a quarter of the training pairs, "
            "in the run at the chosen rate that left these out",
        ]  # fmt: skip
        lines += ["", *self._summary(), "", *self._cost_table()]
        for task, rows in self.rows.items():
            own = next(t for t in self.evaluation.tasks if t.name == task)
            first = self._first(rows)
            chance = f"{1 / len(own.test):.1%}"
            head = f"{len(own.train)} pairs, {len(own.test)} held-out prompts (nearest by chance: {chance})"
            lines += ["", f"## {task}: {head}", "", *self._training_table(rows), ""]
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

    def _summary(self) -> list[str]:
        """All tasks in one table: means, marked where they differ from the reference method's beyond doubt."""
        columns = [c for c in COLUMNS if c.key in ("error", "kid", "rank")]
        marks = {"loses to": " ▲", "wins against": " ▼", "cannot be told from": ""}
        titles = ["method", "parameters", *(f"{task}: {c.title}" for task in self.rows for c in columns)]
        cells: dict[str, list[str]] = {}
        for rows in self.rows.values():
            for row in rows:
                own = cells.setdefault(row.label, [row.label, _number(row.cost.get("parameters"), "{:,}")])
                for column in columns:
                    found, difference = row.estimate(column.key), row.against(self._first(rows), column.key)
                    compared = difference if row.label in (BASE, SHUFFLED, *self.evaluation.methods) else None
                    mark = marks[intervals.outcome(compared, column.better)] if compared else ""
                    own.append("–" if found is None else column.form.format(found.value) + mark)
        return [
            f"All tasks, means alone. ▲ better, ▼ worse than {self.reference} beyond doubt: the 95 % interval of the "
            "difference on the same prompts and seeds excludes 0. Of 20 equal methods one is marked by chance.", "",
            *_table(titles, list(cells.values())),
        ]  # fmt: skip

    def _first(self, rows: list[Row]) -> Row:
        return next(r for r in rows if r.label == self.reference)

    def _cost_table(self) -> list[str]:
        batch, first, cells = self.settings.batch_size, next(iter(self.rows.values())), []
        for row in (r for r in first if r.label in (BASE, *self.evaluation.methods)):
            c = row.cost
            cells.append([
                row.label, _number(c.get("parameters"), "{:,}"), _number(c.get("file_bytes"), "{:,.0f}", 1e3),
                _number(c["peak_memory"], "{:,.0f}", 1e6), _number(c["step_seconds"], "{:.3f}"),
                _number(c["drawing_seconds"], "{:.3f}"),
            ])  # fmt: skip
        return [
            f"What each costs, alone in a process of its own with all of the machine, medians of {COST_ROUNDS} "
            f"rounds: memory in training beyond what the imports take, the base included; a step of batch {batch}; a "
            f"picture, drawn in batches of {batch}.", "",
            *_table(["method", "trainable parameters", "file (KB)", "peak training memory (MB)", "step (s)",
                     "drawing (s)"], cells),
        ]  # fmt: skip

    def _training_table(self, rows: list[Row]) -> list[str]:
        cells = []
        for row in (r for r in rows if r.label in self.evaluation.methods):
            c = row.cost
            rate = f"{c['rate']:g}" + (" (edge of the grid)" if c["rate_at_edge"] else "") if c.get("rate") else "–"
            cells.append([row.label, rate, _number(c["best_step"], "{}"), _number(c["memorises_after"], "{}")])
        return _table(["method", "learning rate", "lowest validation error at step", "memorises after step"], cells)

    def _sentences(self, others: list[Row], first: Row) -> list[str]:
        """In words, where the reference method wins and where it loses, by intervals that exclude 0."""
        lines = []
        for column in (c for c in COLUMNS if c.better):
            verdicts = {"wins against": [], "loses to": [], "cannot be told from": []}
            for row in others:
                difference = row.against(first, column.key)
                if difference:
                    verdicts[intervals.outcome(difference, column.better)].append(row.label)
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
                true = images.crop_to_square(task.test[i].open(), evaluation.resolution)
                rows.append([*(drawn(task, label, f"{i:03d}.png") for label in columns), true])
            labels.append(f"{evaluation.outside_prompts[1]} (outside the style)")
            rows.append([*(drawn(task, label, "outside-001.png") for label in columns), nothing])
        return grids.make_grid(rows, [*columns, "true picture"], labels, cell=128)

    def _curves(self, path: Path) -> None:
        """Per task: validation error by learning rate, and by step at the chosen one; held-out error, compared."""
        from matplotlib.figure import Figure  # no pyplot: no global state

        panels = 3 if len(self.settings.rates) > 1 else 1  # one rate is taken as it is, and nothing validated
        figure = Figure(figsize=(14 if panels == 3 else 7, 4.2 * len(self.rows)), dpi=100, layout="constrained")
        grid = figure.subplots(len(self.rows), panels, squeeze=False)
        for (task, rows), (*validation, heldout) in zip(self.rows.items(), grid):
            if validation:
                self._plot_validation(task, *validation)
            first = self._first(rows)
            others = [r for r in rows if r.label in (SHUFFLED, *self.evaluation.methods) and r is not first]
            others = [r for r in others if r.against(first, "error")]
            for i, e in enumerate(r.against(first, "error") for r in others):
                heldout.plot([e.low, e.high], [i, i], color="#2f6db3")
                heldout.plot([e.value], [i], "o", color="#2f6db3")
            heldout.axvline(0, color="#999999", linewidth=1)
            heldout.set_yticks(range(len(others)), [r.label for r in others])
            heldout.invert_yaxis()
            heldout.locator_params(axis="x", nbins=5)
            heldout.set(xlabel="held-out error, 95 % interval", title=f"{task}: difference to {self.reference}")
            for axes in (*validation, heldout):
                axes.spines[["top", "right"]].set_visible(False)
                axes.grid(alpha=0.3)
        figure.savefig(path)

    def _plot_validation(self, task: str, by_rate, by_step) -> None:
        for i, (name, done) in enumerate(self.done[task].items()):
            style = {"color": f"C{i % 10}", "label": name, "linestyle": "-" if i < 10 else "--"}
            errors = {float(rate): final_error(run) for rate, run in done["rates"].items()}
            by_rate.plot(list(errors), list(errors.values()), "o", **style)
            curve = done["rates"].get(f"{done['rate']:g}", {}).get("validation", {}) if done["rate"] else {}
            by_step.plot([int(s) for s in curve], [statistics.mean(e) for e in curve.values()], **style)
        by_rate.set(xlabel="learning rate", ylabel="validation error at the end", title=task, xscale="log")
        by_rate.set_ylim(top=min(by_rate.get_ylim()[1], by_step.get_ylim()[1]))  # worse than the base: out of sight
        by_step.set(xlabel="step", ylabel="validation error", title="at the chosen rate")
        by_rate.legend(frameon=False, fontsize=8)


def _verdict(difference: Estimate | None, column: Column) -> str:
    if difference is None:
        return "–"
    sign = column.form.replace(":", ":+")
    words = {"loses to": " better", "wins against": " worse", "cannot be told from": ""}
    word = words[intervals.outcome(difference, column.better)] if column.better else ""
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


# ---------------------------------------------------------------------------------------- command line


def _share(argv: list[str]) -> tuple[int, int, str | None]:
    """This process's number, how many there are, and --mixed_precision; all taken out of the environment.

    Each run of the trainer belongs to one process, so the trainer must not see the others; every process gets a GPU
    of its own. On a machine without a GPU, Accelerate (1.15) starts one process whatever --num_processes says, so
    the number asked for is started from here.
    """
    asked = launch.requested_processes("sdtune.evaluate")
    if asked > 1:
        launch.replace_with_processes(asked, ["-m", "sdtune.evaluate"], argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1, os.environ.get("ACCELERATE_MIXED_PRECISION")
    local = int(os.environ.get("LOCAL_RANK", 0))
    visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[local % len(visible)] if visible else str(local)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
    for name in list(os.environ):
        if re.match("(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$|MASTER_|TORCHELASTIC_|ACCELERATE_", name):
            del os.environ[name]
    return rank, world, precision


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
    add("rates", "learning rates to choose from, from the middle on; a single one is taken", type=float, nargs="+")
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
        evaluation = Evaluation(settings, *place)
        evaluation.run()
        if evaluation.rank == 0:
            Report(evaluation).write()
    except Stopped as stop:
        print(f"\n{str(stop).split('. Continue')[0]}. The same command goes on from there", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("\nstopped; what is finished stays, and the same command goes on from there", file=sys.stderr)
        return 130
    except (EvaluationError, features.MissingPackages, TrainError, ValueError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
