"""What each method costs: memory and time in training, time in drawing, measured by the benchmark."""

import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from unittest.mock import patch

from ..adapters import tuner_file
from ..benchmark import processes
from ..benchmark.candidates import Job
from .methods import TRAINING
from .runs import BASE, Evaluation, read_json
from .tasks import TASKS

ROUNDS = 3  # how often each method is measured, by turns


def measure_costs(evaluation: Evaluation) -> dict[str, dict]:
    """Measures what the base and each method cost, by turns, each alone in a process of its own.

    Results are kept in costs.json; what is there already is not measured again.

    Returns:
        By name: `peak_memory`, in bytes beyond what the imports take, in training; `step_seconds`; `drawing_seconds`
        per picture. Medians over the rounds, None where it failed.
    """
    settings, path = evaluation.settings, evaluation.output / "costs.json"
    kept: dict[str, list[dict]] = read_json(path)
    # the benchmark trains with the trainer's defaults, so a method with other settings is not measured
    plain = {name: config for name, config in evaluation.methods.items() if name not in TRAINING}
    tuners = {BASE: None} | {name: asdict(config) for name, config in plain.items()}
    with tempfile.TemporaryDirectory() as work_folder, patch.dict(os.environ):
        os.environ.pop("OMP_NUM_THREADS", None)  # which suits several processes at once
        job = Job(
            "draw", BASE, settings.base, str(TASKS.get(settings.tasks[0], settings.tasks[0])), work_folder,
            evaluation.model.resolution, settings.batch_size, evaluation.precision or "no",
            repetitions=min(3, settings.steps), sampling_steps=settings.drawing_steps,
        )  # fmt: skip
        for number in range(ROUNDS if settings.steps > 20 else 1):
            for name in (n for n in tuners if len(kept.get(n, [])) <= number):
                own = replace(job, name=name, tuner=tuners[name])
                found = {"draw": processes.run_alone(own)}
                if name != BASE:
                    training = replace(own, part="train", repetitions=min(20, settings.steps))
                    found["train"] = processes.run_alone(training)
                if not any("error" in part for part in found.values()):
                    kept.setdefault(name, []).append(found)
                    tuner_file.write_text(path, json.dumps(kept))

    def median(name: str, part: str, value: Callable[[dict], float]) -> float | None:
        values = [value(found[part]) for found in kept.get(name, []) if part in found]
        return statistics.median(values) if values else None

    return {
        name: {
            "peak_memory": median(name, "train", lambda found: found["peak"]),
            "step_seconds": median(name, "train", lambda found: statistics.median(found["seconds"])),
            "drawing_seconds": median(
                name, "draw", lambda found: statistics.median(found["seconds"]) / settings.batch_size
            ),
        }
        for name in (BASE, *evaluation.methods)
    }
