"""Checkpoints of a run: folders checkpoints/step-N that are either complete or absent.

A folder holds the tuner in fp32, state.json (losses and settings), best.pt (with a stopping rule, the best weights so
far), and what Accelerate saves: optimizer, learning rate schedule, loss scale and random states of all processes.
"""

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from ..adapters import tuner_file
from .errors import TrainError

FOLDER = "checkpoints"
# settings that a resumed run may change
CHANGEABLE = {"steps", "checkpoint_every", "preview_every", "preview_prompts", "preview_steps", "guidance_scale",
              "report_to", "data", "base"}  # fmt: skip


@dataclass
class CheckpointState:
    """What a run has measured and how it was set up.

    Attributes:
        step: how many optimizer steps are done.
        losses: the training loss of each of them.
        heldout: step -> loss of each held-out image.
        settings, tuner: the training settings as they are used, and the `TunerConfig`.
        best: step and weights of the lowest held-out loss, if they are kept.
    """

    step: int
    losses: list[float]
    heldout: dict[int, list[float]]
    settings: dict
    tuner: dict
    best: tuple[int, torch.Tensor] | None = None


def find_checkpoint(output: Path, resume: bool) -> Path | None:
    """The folder of the last checkpoint if `resume`, else None.

    Raises:
        TrainError: if there is no checkpoint to resume, or if an unfinished run would be overwritten.
    """
    folder = output / FOLDER
    found = sorted(folder.glob("step-*/state.json"))
    if resume:
        if not found:
            raise TrainError(f"nothing to resume: {folder} holds no checkpoint; start without --resume")
        return found[-1].parent
    is_finished = (output / tuner_file.FILE_NAME).exists()
    if found and not is_finished:
        raise TrainError(
            f"{output} holds a run that stopped at step {int(found[-1].parent.name[5:])}. Continue it with "
            "--resume, or give another --output, or delete the folder"
        )
    return None


def remove_all(output: Path) -> None:
    shutil.rmtree(output / FOLDER, ignore_errors=True)


@contextmanager
def new_checkpoint(output: Path, step: int, accelerator: Accelerator):
    """Gives a folder to write into in a `with`; at its end adds what Accelerate saves, and moves it to its place."""
    final, part = output / FOLDER / f"step-{step:06d}", output / FOLDER / f".step-{step:06d}.part"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    yield part
    accelerator.wait_for_everyone()
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
    accelerator.wait_for_everyone()


def write_state(folder: Path, state: CheckpointState) -> None:
    values = {k: v for k, v in vars(state).items() if k != "best"}
    tuner_file.write_text(folder / "state.json", json.dumps(values))
    if state.best:
        torch.save(state.best, folder / "best.pt")


def read_state(folder: Path, device: torch.device) -> CheckpointState:
    state = CheckpointState(**json.loads((folder / "state.json").read_text()))
    state.heldout = {int(step): losses for step, losses in state.heldout.items()}
    if (folder / "best.pt").exists():
        state.best = torch.load(folder / "best.pt", map_location=device, weights_only=True)
    return state


def check_settings(folder: Path, state: CheckpointState, settings: dict, tuner: dict) -> None:
    """Raises a TrainError that names each setting that differs from the checkpoint's and must not."""
    new, old = {**settings, **json.loads(json.dumps(tuner))}, {**state.settings, **state.tuner}
    changed = [k for k in new if k not in CHANGEABLE and old.get(k) != new[k]]
    if changed:
        differences = "; ".join(f"{k} was {old.get(k)!r} and is {new[k]!r}" for k in changed)
        raise TrainError(f"{folder} cannot be resumed with other settings: {differences}")
