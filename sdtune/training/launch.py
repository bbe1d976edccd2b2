"""What surrounds a run: signals that end it, and, where there is no GPU, several processes and what they free."""

import argparse
import os
import signal
import sys

import psutil


def requested_processes(name: str) -> int:
    """The --num_processes of an `accelerate launch` that started one process instead.

    On a machine without a GPU, Accelerate (1.15) starts a single process whatever that flag says.

    Args:
        name: of the script or module that was launched, without folders.
    """
    command = _launcher()
    names = [os.path.basename(part) for part in command]
    if name not in names or "WORLD_SIZE" in os.environ:
        return 1
    import torch

    if torch.accelerator.is_available():
        return 1
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int, default=1)
    return parser.parse_known_args(command[: names.index(name)])[0].num_processes


def _launcher() -> list[str]:
    """The command of the `accelerate launch` that started this process; empty where none did."""
    parent = psutil.Process().parent()
    command = parent.cmdline() if parent else []
    return command if any("accelerate" in part for part in command) else []


def is_precision_chosen() -> bool:
    """Whether a precision was chosen for Accelerate; `accelerate launch` says "no" where nobody has."""
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        return True
    command = _launcher()
    if not command:
        return "ACCELERATE_MIXED_PRECISION" in os.environ
    from accelerate.commands.config.config_args import default_config_file

    flags = {part.split("=")[0].replace("-", "_") for part in command}
    return os.path.isfile(default_config_file) or bool(flags & {"__mixed_precision", "__config_file"})


def replace_with_processes(count: int, target: list[str], arguments: list[str]) -> None:
    """Replaces this process by `count` ones of `target`, a script or ["-m", module]. Does not return."""
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), *target]
    os.execv(sys.executable, [sys.executable, *run, *arguments])


class CatchSignals:
    """Notes SIGINT and SIGTERM in `number` instead of dying; the second one kills as usual.

    Under `accelerate launch` the end of the launcher counts as SIGTERM, since it does not pass signals on.
    """

    def __enter__(self):
        self._number = 0
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
        self._old = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._note)
        except ValueError:  # not the main thread: whoever called us handles signals
            pass
        return self

    @property
    def number(self) -> int:
        if self._launcher and os.getppid() != self._launcher:
            return signal.SIGTERM
        return self._number

    def _note(self, number, _frame):
        self._number = number
        signal.signal(number, self._old[number])

    def __exit__(self, *_):
        for number, old in self._old.items():
            signal.signal(number, old)
