"""Which tuner is better, by how much, and how certain is that? `python -m sdtune.evaluation --help`

    python assets/tasks.py                                            # once: prepares the three tasks
    python -m sdtune.evaluation                                       # all of it
    accelerate launch --num_processes 4 -m sdtune.evaluation          # the same, shared by four processes
    python -m sdtune.evaluation --methods ablation --tasks openmoji --output output/ablation

Every method trains on the same pairs with the same data order, noise and steps, at matched parameter counts. Its
learning rate is the one of --rates (a tenth of these for full fine-tuning) whose drawings of a quarter of the
*training* pairs, left out for that, are most similar to the true pictures, place by place; then it trains on all of
them with several seeds and draws held-out prompts, whose true pictures are known. Written into the output folder:
table.md, table.csv, results.json, grid.png, curves.png. What is finished is kept there and skipped by the next start,
and what was interrupted continues; processes and machines that share the folder share the work.
"""

import argparse
import os
import re
import sys
from dataclasses import replace

import torch

from ..extras import MissingPackages
from ..training import launch
from ..training.accelerator import is_precision_chosen
from ..training.errors import Stopped, TrainError
from .methods import GROUPS, EvaluationError
from .report import write_report
from .runs import Evaluation, Settings
from .tasks import TASKS


def _parse(argv: list[str]) -> Settings:
    default = Settings()
    quick = replace(default, seeds=1, steps=2, rates=[1e-3, 3e-3], prompts=2, batch_size=2, drawing_steps=2)
    groups = "; ".join(f"{name}: {' '.join(of)}" for name, of in GROUPS.items())
    parser = argparse.ArgumentParser(
        prog="python -m sdtune.evaluation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, help: str, **more) -> None:
        usual = getattr(default, name)
        usual = " ".join(map(str, usual)) if isinstance(usual, list) else usual
        parser.add_argument(f"--{name}", help=f"{help} (default: {usual})", **more)

    add("tasks", f"{', '.join(TASKS)}, or folders with train and test", nargs="+")
    add("methods", f"methods, or groups of them ({groups}); the others are compared with the first", nargs="+")
    add("seeds", "training seeds of each method", type=int)
    add("steps", "steps of every run", type=int)
    add("rates", "learning rates to choose from; a single one is not validated", type=float, nargs="+")
    add("prompts", "largest number of held-out prompts of each task", type=int)
    add("base", "as in train_anime.py")
    add("output", "folder for the results and for finished runs")
    parser.add_argument("--quick", action="store_true", help="a few steps of each run, to see that all of it works")
    given = vars(parser.parse_args(argv))
    start = quick if given.pop("quick") else default
    settings = replace(start, **{k: v for k, v in given.items() if v is not None})
    low = [n for n in ("seeds", "steps") if getattr(settings, n) < 1] + ["prompts"] * (settings.prompts < 2)
    if low:
        parser.error(f"too low: {', '.join(low)}; seeds and steps must be at least 1, prompts at least 2")
    return settings


def _claim_process(argv: list[str]) -> tuple[int, int, str | None]:
    """This process's number, how many there are, and --mixed_precision; all are removed from the environment.

    Each run of the trainer belongs to one process, so the trainer must not see the others; `__main__` has given every
    process a GPU of its own. On a machine without a GPU, Accelerate (1.15) starts one process whatever --num_processes
    is, so the requested number is started from here.
    """
    requested = launch.requested_processes("sdtune.evaluation")
    if requested > 1:
        launch.replace_with_processes(requested, ["-m", "sdtune.evaluation"], argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if torch.cuda.is_available() and not is_precision_chosen():
        precision = "fp16"  # as in train_anime.py
    if world == 1:
        return 0, 1, precision
    for name in list(os.environ):
        if re.match("(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$|MASTER_|TORCHELASTIC_|ACCELERATE_", name):
            del os.environ[name]
    return rank, world, precision


def main(argv: list[str] | None = None) -> int:
    """Runs the command with these arguments, by default those of the process; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    settings = _parse(argv)
    process = _claim_process(argv)
    try:
        evaluation = Evaluation(settings, *process)
        evaluation.run()
        if evaluation.rank == 0:
            write_report(evaluation)
    except Stopped as stop:
        print(f"\n{str(stop).split('. Continue')[0]}. The same command continues from there", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("\nstopped; finished runs are kept, and the same command continues from there", file=sys.stderr)
        return 130
    except (EvaluationError, MissingPackages, TrainError, ValueError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0
