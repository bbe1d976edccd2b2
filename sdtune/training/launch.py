"""What a command does before its work: start several processes, hide library messages, say that it is starting.

Imports nothing heavy, so that all of this happens before PyTorch is imported.
"""

import argparse
import os
import sys

import psutil

from ..extras import require

ACCELERATE_PRECISION = "ACCELERATE_MIXED_PRECISION"  # set in processes that `accelerate launch` has started


def requested_processes(name: str) -> int:
    """The --num_processes of an `accelerate launch` that started one process instead, else 1.

    On a machine without a GPU, Accelerate (1.15) starts a single process whatever that flag says.

    Args:
        name: of the script or module that was launched, without folders.
    """
    command = launcher_command()
    names = [os.path.basename(part) for part in command]
    if name not in names or "WORLD_SIZE" in os.environ:
        return 1
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int, default=1)
    count = parser.parse_known_args(command[: names.index(name)])[0].num_processes
    if count > 1:
        import torch

        if torch.accelerator.is_available():
            return 1
    return count


def launcher_command() -> list[str]:
    """The command line of the `accelerate launch` that started this process; empty if there is none."""
    parent = psutil.Process().parent()
    command = parent.cmdline() if parent else []
    return command if any("accelerate" in part for part in command) else []


def replace_with_processes(count: int, target: list[str], arguments: list[str]) -> None:
    """Replaces this process by `count` processes of `target`, a script or ["-m", module]. Does not return."""
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), *target]
    os.execv(sys.executable, [sys.executable, *run, *arguments])


def start_quietly() -> None:
    """`print_start`, then `silence_libraries`."""
    print_start()
    silence_libraries()


def print_start() -> None:
    """Prints a line, in the first process only, so that a user sees something before the imports that take seconds.

    Raises:
        SystemExit: with one line, if a package that training needs is not installed.
    """
    require("train")
    if os.environ.get("RANK", "0") == "0":
        print("starting: importing PyTorch and diffusers", flush=True)


def silence_libraries() -> None:
    """Imports transformers and diffusers, which takes seconds, and switches off their warnings and progress bars.

    To be called before any other import of diffusers: some warnings appear on import (about torchvision), others while
    a base is loaded (about precisions, and a progress bar for each file).
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
