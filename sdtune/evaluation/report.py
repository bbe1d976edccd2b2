"""Writes the report of an evaluation: results.json, table.csv, table.md, grid.png and curves.png."""

import csv
import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch

from ..adapters import tuner_file
from .intervals import Estimate
from .metrics import COLUMNS
from .plots import draw_grid, plot_curves
from .results import Results
from .runs import Evaluation, read_json
from .tables import markdown_report

COST_COLUMNS = ["rate", "parameters", "file_bytes", "peak_memory", "step_seconds", "drawing_seconds", "failed"]


def write_report(evaluation: Evaluation) -> None:
    """Measures the costs, collects what the runs have left, writes all files, and prints the tables."""
    results, output = Results(evaluation), evaluation.output
    machine = _describe_machine(evaluation)
    tuner_file.write_text(output / "results.json", json.dumps(_as_dict(results, machine), indent=2) + "\n")
    _write_csv(results, output / "table.csv")
    draw_grid(results).save(output / "grid.png")
    plot_curves(results, output / "curves.png")
    text = markdown_report(results, machine)
    tuner_file.write_text(output / "table.md", text)
    print(text)
    print(*(output / n for n in ("table.md", "table.csv", "results.json", "grid.png", "curves.png")), sep="\n")


def _as_dict(results: Results, machine: str) -> dict:
    """The content of results.json."""
    evaluation, reference, tasks = results.evaluation, results.reference, {}
    for task, rows in results.rows.items():
        first = results.first_row(rows)
        tasks[task] = {
            "rows": {
                row.label: row.cost
                | {c.key: _interval(row.estimate(c.key)) for c in COLUMNS}
                | {"against_" + reference: {c.key: _interval(row.against(first, c.key)) for c in COLUMNS}}
                for row in rows
            },
            "runs": results.done[task],
        }
    return {
        "settings": asdict(evaluation.settings), "base": read_json(evaluation.output / "settings.json")["base"],
        "methods": {n: asdict(c) for n, c in evaluation.methods.items()},
        "versions": tuner_file.library_versions(), "machine": machine, "tasks": tasks,
    }  # fmt: skip


def _describe_machine(evaluation: Evaluation) -> str:
    if torch.cuda.is_available():
        machine = f"one {torch.cuda.get_device_name()} per process"
    else:
        machine = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads per process"
    precision = evaluation.precision or "default"
    return f"{machine}; processes: {evaluation.world}; mixed precision: {precision}"


def _write_csv(results: Results, path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        measured = [f"{c.key}{end}" for c in COLUMNS for end in ("", "_low", "_high")]
        writer.writerow(["task", "method", *COST_COLUMNS, *measured])
        for task, rows in results.rows.items():
            for row in rows:
                numbers = [n for c in COLUMNS for n in row.estimate(c.key) or ("", "", "")]
                writer.writerow([task, row.label, *(row.cost.get(k, "") for k in COST_COLUMNS), *numbers])


def _interval(found: Estimate | None) -> dict | None:
    return found and found._asdict()
