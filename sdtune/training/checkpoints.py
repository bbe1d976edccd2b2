"""Checkpoints of a run: folders checkpoints/step-N that are either complete or absent.

A folder holds the tuner in fp32, state.json (losses and settings), best.pt (with a stopping rule, the best weights so
far), and what Accelerate saves: optimizer, learning rate schedule, loss scale and random states of all processes.
"""

import json
import shutil
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator

from ..adapters import disk, tuner_file
from .config import TrainConfig
from .errors import TrainError, is_out_of_memory, shorten_list

FOLDER = "checkpoints"
TRAINED_NAME = "trained.safetensors"  # with a moving average, the weights that are trained; the tuner is the average
MANIFEST = "files.json"  # size in bytes and CRC-32 of every other file of a checkpoint
# settings that a resumed run may change
CHANGEABLE = {"steps", "checkpoint_every", "preview_every", "preview_prompts", "preview_steps", "guidance_scale",
              "report_to", "data", "base", "author", "license", "keep_last", "init"}  # fmt: skip
# what runs did before there was an option, whose checkpoints do not name it
BEFORE_OPTIONS = {"square": True, "mask_weight": 1.0}


@dataclass
class CheckpointState:
    """What a run has measured and how it was set up.

    Attributes:
        step: how many optimizer steps are done.
        losses: the training loss of each of them.
        heldout: step -> loss of each held-out image.
        settings, tuner: the training settings as they are used, and the `TunerConfig`.
        best: step and weights of the lowest held-out loss, if they are kept.
        digests: of the data and the base (`setup.collect_digests`); empty in checkpoints from before they were kept.
    """

    step: int
    losses: list[float]
    heldout: dict[int, list[float]]
    settings: dict
    tuner: dict
    best: tuple[int, torch.Tensor] | None = None
    digests: dict = field(default_factory=dict)


def list_checkpoints(output: Path) -> list[Path]:
    """The folders of all checkpoints of a run, in the order of their steps."""
    folders = [f for f in (output / FOLDER).glob("step-*") if f.name[5:].isdigit() and f.is_dir()]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The step of a checkpoint, from the name of its folder."""
    return int(folder.name[5:])


def find_checkpoint(output: Path, log: Callable[[str], None]) -> Path:
    """The folder of the last checkpoint that is whole; damaged ones after it are logged.

    Raises:
        TrainError: if there is none.
    """
    problems = []
    for folder in reversed(list_checkpoints(output)):
        problem = find_damage(folder)
        if problem is None:
            if problems:
                log(f"{'; '.join(problems)}. The run continues from {folder.name}, the last whole checkpoint")
            return folder
        problems.append(f"the checkpoint {folder} is damaged ({problem})")
    if problems:
        raise TrainError(f"{'; '.join(problems)}, and there is no whole one. Start anew with another --output")
    raise TrainError(f"nothing to resume: {output / FOLDER} holds no checkpoint; start without --resume")


def find_damage(folder: Path) -> str | None:
    """Which file of a checkpoint is missing or has another content than was written, or None if all are whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        if not isinstance(files, dict) or not all(_is_entry(entry) for entry in files.values()):
            return f"{MANIFEST} holds no list of files"
    except FileNotFoundError:  # a checkpoint from before there were manifests
        files = {name: None for name in ("state.json", tuner_file.FILE_NAME, "optimizer.bin")}
    except (OSError, ValueError, RecursionError) as error:
        return f"{MANIFEST}: {error}"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size == 0:
            return f"{name} is empty"
        if expected and size != expected[0]:
            return f"{name} has {size:,} bytes instead of {expected[0]:,}"
        if expected and _checksum(path) != expected[1]:
            return f"the content of {name} has changed"
    try:
        read_state(folder)
        tuner_file.load(folder)
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())[:200]
    return None


def _is_entry(entry) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(number, int) for number in entry)


def read_state(folder: Path) -> CheckpointState:
    """The state of a checkpoint, without the best weights.

    Raises:
        ValueError: naming what is wrong, if it is not what `write_state` writes.
    """
    try:
        values = json.loads((folder / "state.json").read_text())
        state = CheckpointState(**values)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"state.json: {error}") from error
    kinds = {"step": int, "losses": list, "heldout": dict, "settings": dict, "tuner": dict, "digests": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(getattr(state, name), kind)]
    if not wrong and len(state.losses) != state.step:
        wrong = ["step and losses, which differ in number"]
    if wrong or not all(isinstance(loss, float) for loss in state.losses):
        raise ValueError(f"state.json: unusable {' and '.join(wrong) or 'losses'}")
    try:
        state.heldout = {int(step): [float(loss) for loss in losses] for step, losses in state.heldout.items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"state.json: unusable held-out losses ({error})") from error
    return state


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 22):
            value = zlib.crc32(part, value)
    return value


@contextmanager
def new_checkpoint(output: Path, step: int, accelerator: Accelerator):
    """Gives a folder to write into in a `with`; at its end adds what Accelerate saves, and moves it to its place.

    All of it is on the disk before it is moved. If anything fails, the unfinished folder is removed.
    """
    final, part = output / FOLDER / f"step-{step:06d}", output / FOLDER / f".step-{step:06d}.part"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    try:
        yield part
        accelerator.wait_for_everyone()
        accelerator.save_state(str(part))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = sorted(p for p in part.rglob("*") if p.is_file())
            manifest = {p.relative_to(part).as_posix(): (p.stat().st_size, _checksum(p)) for p in files}
            for path in files:
                disk.sync(path)
            tuner_file.write_text(part / MANIFEST, json.dumps(manifest))
            if final.is_dir():
                shutil.rmtree(final, ignore_errors=True)
            else:
                final.unlink(missing_ok=True)
            part.rename(final)
            disk.sync(final.parent)
    except BaseException:
        if accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()


def delete_old(output: Path, keep_last: int | None, step: int) -> None:
    """Deletes all checkpoints but the last `keep_last` up to this step; None keeps all.

    Later ones are damaged: the run has continued from one before them.
    """
    if keep_last is None:
        return
    kept = [folder for folder in list_checkpoints(output) if step_of(folder) <= step][-keep_last:]
    for folder in list_checkpoints(output):
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def write_state(folder: Path, state: CheckpointState) -> None:
    values = {k: v for k, v in vars(state).items() if k != "best"}
    tuner_file.write_text(folder / "state.json", json.dumps(values))
    if state.best:
        torch.save(state.best, folder / "best.pt")


def load(
    folder: Path, accelerator: Accelerator, weights: dict[str, torch.Tensor], settings: dict, tuner: dict
) -> CheckpointState:
    """Reads a checkpoint: the tuner into `weights`, the rest into what is registered with Accelerate, and the state.

    Raises:
        TrainError: if it was written with other settings, or a file of it is damaged.
    """
    try:
        state = read_state(folder)
        if (folder / "best.pt").exists():
            state.best = torch.load(folder / "best.pt", map_location=accelerator.device, weights_only=True)
        check_settings(folder, state, settings, tuner)
        is_averaged = (folder / TRAINED_NAME).is_file()
        file = tuner_file.load(folder, TRAINED_NAME) if is_averaged else tuner_file.load(folder)
        tuner_file.check_fits(file, {k: tuple(p.shape) for k, p in weights.items()}, folder)
        for name, p in weights.items():
            p.copy_(file.tensors[name])
        accelerator.load_state(str(folder))
    except TrainError:
        raise
    except Exception as error:  # a damaged file of PyTorch gives many kinds of errors
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise TrainError(
            f"the checkpoint {folder} is damaged ({type(error).__name__}: {reason}); delete it, then --resume "
            "continues from the one before it"
        ) from error
    return state


def drop_what_changed(state: CheckpointState, digests: dict, log: Callable[[str], None]) -> None:
    """Logs how data and base differ from the checkpoint's; held-out losses of others are dropped, not joined."""
    changes = describe_changes(state.digests, digests)
    for change in changes.values():
        log(f"note: {change}")
    counts = {len(losses) for losses in state.heldout.values()}
    if state.heldout and ({"base", "test"} & changes.keys() or counts != {len(digests["test"])}):
        log("note: the held-out losses up to here were measured on others, so they are dropped")
        state.heldout, state.best = {}, None


def check_settings(folder: Path, state: CheckpointState, settings: dict, tuner: dict) -> None:
    """Raises a TrainError that names each setting that differs from the checkpoint's and must not."""
    new = {**settings, **json.loads(json.dumps(tuner))}
    # an option that is newer than the checkpoint was at its default
    old = {**asdict(TrainConfig()), **BEFORE_OPTIONS, **state.settings, **state.tuner}
    changed = [k for k in new if k not in CHANGEABLE and old.get(k) != new[k]]
    if changed:
        differences = "; ".join(f"{k} was {old.get(k)!r} and is {new[k]!r}" for k in changed)
        raise TrainError(f"{folder} cannot be resumed with other settings: {differences}")


def describe_changes(old: dict, new: dict) -> dict[str, str]:
    """What differs between the digests of a checkpoint and those of now: "base", "train" or "test" -> a sentence."""
    found = {}
    if old.get("base") not in (None, new["base"]):
        found["base"] = "the weights of the base are others than those that this run was started on"
    for split, title in (("train", "training"), ("test", "held-out")):
        before, now = old.get(split), new[split]
        if before is None or before == now:
            continue
        lists = {
            "changed": [n for n in now if before.get(n, now[n]) != now[n]],
            "new": [n for n in now if n not in before],
            "gone": [n for n in before if n not in now],
        }
        parts = [f"{len(names)} {what} ({shorten_list(names)})" for what, names in lists.items() if names]
        what = "; ".join(parts) or "in another order"
        found[split] = f"the {title} pictures or captions are not those of the checkpoint: {what}"
    return found
