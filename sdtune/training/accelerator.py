"""The Accelerator of a run: device, precision, on a CPU the number of threads, and what processes tell each other."""

import os

import torch
from accelerate import Accelerator, tracking
from accelerate.commands.config.config_args import default_config_file
from accelerate.state import AcceleratorState

from ..kernels.cpu import heap
from . import launch
from .config import DEFAULT_OUTPUT, TrainConfig
from .errors import TrainError


def create_accelerator(config: TrainConfig) -> Accelerator:
    """The Accelerator for these settings. On a GPU the default precision is fp16, on a CPU fp32.

    Raises:
        TrainError: if Accelerate refuses the settings, a tracker is not installed, or for fp16 on a CPU.
    """
    _check_tracker(config.report_to)
    precision = config.mixed_precision
    if precision is None and torch.cuda.is_available() and not is_precision_chosen():
        precision = "fp16"
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    try:
        accelerator = Accelerator(
            mixed_precision=precision, log_with=config.report_to, project_dir=config.output or DEFAULT_OUTPUT,
            cpu=not torch.accelerator.is_available(),  # without it, several processes on CPUs do not find each other
        )  # fmt: skip
    except ValueError as error:
        raise TrainError(f"Accelerate refuses this set-up: {error}") from error
    if accelerator.device.type == "cpu":
        if accelerator.mixed_precision == "fp16":
            raise TrainError("fp16 mixed precision needs a GPU; this run is on the CPU, where bf16 or no will do")
        heap.keep_freed_memory()
        if accelerator.num_processes == 1 and launch.ACCELERATE_PRECISION in os.environ:
            # `accelerate launch` without --cpu sets OMP_NUM_THREADS=1, which is meant for machines with GPUs
            torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    return accelerator


def max_over_processes(accelerator: Accelerator, number: int) -> int:
    """The greatest `number` of all processes; the same result in each of them."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


def _check_tracker(name: str | None) -> None:
    """Raises a TrainError for a tracker that is unknown or not installed; Accelerate goes on without the latter."""
    installed = [str(tracker) for tracker in tracking.get_available_trackers()]
    if name is None or name in installed or name == "all" and installed:
        return
    there = f"installed: {', '.join(installed) or 'none'}"
    if name in tracking.LOGGER_TYPE_TO_CLASS or name == "all":
        raise TrainError(f"--report_to {name}: this tracker is not installed ({there}); install it, for example with "
                         f"pip install {'tensorboard' if name == 'all' else name.replace('_', '-')}")  # fmt: skip
    known = ", ".join(tracking.LOGGER_TYPE_TO_CLASS)
    raise TrainError(f"--report_to {name}: there is no such tracker; possible are {known} ({there})")


def is_precision_chosen() -> bool:
    """Whether the user has chosen a precision for Accelerate: by flag, configuration file or environment.

    `accelerate launch` sets the environment variable to "no" where nobody has chosen.
    """
    if os.environ.get(launch.ACCELERATE_PRECISION, "no") != "no":
        return True
    command = launch.launcher_command()
    if not command:
        return launch.ACCELERATE_PRECISION in os.environ
    flags = {part.split("=")[0].replace("-", "_") for part in command}
    return os.path.isfile(default_config_file) or bool(flags & {"__mixed_precision", "__config_file"})
