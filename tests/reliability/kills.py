"""Runs that are killed (SIGKILL) at a random time, resumed, and compared with an undisturbed run, bit for bit.

Each trial starts `train_anime.py` without --output in a folder where output/anime holds a finished result, so that the
run goes to output/anime-2. It is killed at a random time, or a moment after a file is seen being written, and then
continued as a user would continue it: with --resume where there is a checkpoint, else with the same command. Some are
killed again. After each kill every checkpoint must be whole and hold the weights of the undisturbed run at its step,
and the finished result beside it must be as it was.

A run is a process of its own, forked from one that has run the same once, so that it need not import and compile.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from PIL import Image
from safetensors.torch import load_file
from tqdm.auto import tqdm

import train_anime

from . import commands
from .pictures import make_picture, write_pairs

STEPS = 6
COMMON = ("--batch_size 1 --resolution 64 --preview_steps 1 --preview_prompts waves --guidance_scale 1 "
          f"--learning_rate 1e-3 --steps {STEPS}").split()  # fmt: skip
SETTINGS = (
    "--rank 1 --num_heads 1 --preview_every 0 --checkpoint_every 1",
    "--kind lora --rank 2 --preview_every 2 --checkpoint_every 2 --flip --lr_warmup_steps 2",
    "--kind res_adapter --preview_every 3 --checkpoint_every 1 --stop_when memorising",
    "--rank 2 --num_heads 2 --attn_drop 0.2 --preview_every 0 --checkpoint_every 3 --gradient_accumulation_steps 2",
    "--kind full --preview_every 0 --checkpoint_every 2",
    "--rank 1 --num_heads 1 --preview_every 0 --checkpoint_every 100",
    "--rank 1 --num_heads 1 --preview_every 2 --checkpoint_every 1 --clip_skip 2 --trigger_words sks --shuffle_tags "
    "--tag_dropout 0.3 --caption_variants 3 --mask_weight 0 --preserve 0.5 --ema_decay 0.9",
)
SECONDS = 600  # a run that takes longer hangs; it computes for two, but the machine may be busy


@dataclass
class Trial:
    """What happened in a trial: the kills, and where they found the run; `fault` is empty if all was right."""

    settings: str
    kills: list[str] = field(default_factory=list)
    fault: str = ""


class Fault(Exception):
    """What is wrong after a kill, as a sentence."""


def warm_up(root: Path) -> None:
    """A run in this process, in one thread, since threads do not outlive a fork. A forked run then starts at once."""
    tqdm.monitor_interval = 0
    here = Path.cwd()
    os.chdir(root)
    commands.train("--data", str(root / "data"), "--output", "warm-up", *commands.SHORT)
    os.chdir(here)


def start(flags: list[str], folder: Path) -> int:
    """Forks a process that runs train_anime.py with these flags in a folder; its output goes to log.txt there."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(folder)
        number = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(number, 1)
        os.dup2(number, 2)
        sys.argv = ["train_anime.py", *flags]
        torch.set_num_threads(1)
        code = train_anime.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def wait(pid: int, folder: Path) -> float:
    """Waits until a process has ended, and gives the seconds that it computed; a Fault unless its exit code is 0."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status):
                last = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-3:]
                raise Fault(f"exit code {os.waitstatus_to_exitcode(status)}: {' / '.join(last)[-400:]}")
            return used.ru_utime + used.ru_stime
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise Fault(f"the run took longer than {SECONDS} s")


def check_refusal(pid: int, folder: Path) -> None:
    """Raises a Fault unless --resume says that there is nothing to resume, where a run was killed too early."""
    try:
        wait(pid, folder)
    except Fault:
        pass
    else:
        raise Fault("--resume went on with another run")
    if "nothing to resume" not in (folder / "log.txt").read_text(errors="replace"):
        raise Fault("--resume does not say that there is nothing to resume")


def kill_at_random(pid: int, run: Path, seconds: float, rng: random.Random) -> str | None:
    """Kills a process at a random time of a run that computes for about `seconds`, or while it writes a file.

    Returns:
        Where the kill found the run, or None if it had ended before.
    """
    during_write, moment, process = rng.random() < 0.5, rng.uniform(0, 1) * seconds, psutil.Process(pid)
    writes, delay, seen = rng.randrange(1, 12), rng.uniform(0, 0.006), set()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                raise Fault(f"before it was killed, the run ended with status {status}")
            return None
        if during_write:
            parts = unfinished_parts(run)
            seen |= parts
            if parts and len(seen) >= writes:
                time.sleep(delay)
                break
            time.sleep(0.0005)
        elif sum(process.cpu_times()[:2]) >= moment:
            break
        else:
            time.sleep(0.002)
    used = sum(process.cpu_times()[:2])
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    place = f"after {used:.2f} s, at the checkpoint of step {last_step(run)}"
    return place + (", during a write" if unfinished_parts(run) else "")


def unfinished_parts(run: Path) -> set[str]:
    found = set()
    for folder in (run, run / "checkpoints", run / "previews"):
        with contextlib.suppress(OSError):
            found |= {entry.path for entry in os.scandir(folder) if entry.name.endswith(".part")}
    return found


def checkpoint_folders(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoints/step-*"))


def last_step(run: Path) -> int:
    folders = checkpoint_folders(run)
    return int(folders[-1].name[5:]) if folders else 0


def check_files(run: Path, reference: Path) -> None:
    """Raises a Fault for a file that is not whole, or that differs from the undisturbed run's at the same step."""
    for folder in checkpoint_folders(run):
        wanted = reference / "checkpoints" / folder.name
        if not wanted.is_dir():
            raise Fault(f"{folder.name} is no step at which this run writes a checkpoint")
        for file in wanted.iterdir():
            if not (folder / file.name).is_file():
                raise Fault(f"{folder.name} lacks {file.name}")
        try:
            compare_tensors(folder / "tuner.safetensors", wanted / "tuner.safetensors")
            state, other = (json.loads((f / "state.json").read_text()) for f in (folder, wanted))
            torch.load(folder / "optimizer.bin", weights_only=True)
        except Fault:
            raise
        except Exception as error:
            raise Fault(f"{folder.name} is not whole: {type(error).__name__}: {error}") from error
        if state["losses"] != other["losses"] or state["step"] != other["step"]:
            raise Fault(f"{folder.name} holds other losses than the undisturbed run")
    if (run / "tuner.safetensors").exists():
        compare_tensors(run / "tuner.safetensors", reference / "tuner.safetensors")
    for picture in [*run.glob("*.png"), *run.glob("previews/*.png")]:
        with Image.open(picture) as image:
            image.load()
    for text in run.glob("*.json"):
        json.loads(text.read_text())


def compare_tensors(file: Path, other: Path) -> None:
    own, wanted = load_file(file), load_file(other)
    if own.keys() != wanted.keys():
        raise Fault(f"{file.parent.name}/{file.name} holds other keys than the undisturbed run's")
    difference = max((own[k].float() - wanted[k].float()).abs().max().item() for k in own)
    if difference or not all(own[k].equal(wanted[k]) for k in own):
        name = f"{file.parent.name}/{file.name}"
        raise Fault(f"{name} holds other weights than the undisturbed run's, by up to {difference:.2g}")


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"):
        found.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return found.hexdigest()


def data_folder(settings: str) -> str:
    """The name of the data set on which a run with these settings trains."""
    return "split" if "--stop_when" in settings else "portraits" if "--mask_weight" in settings else "data"


def write_portraits(folder: Path, rng: random.Random) -> None:
    """Three pictures of 2:3 in two sizes, with a mask for one, and two captions of tags for each."""
    folder.mkdir()
    for i, size in enumerate([(64, 96), (80, 120), (64, 96)]):
        Image.open(io.BytesIO(make_picture(rng, ".png"))).resize(size).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"waves, {{red|blue}}, sea, number {i}\na picture of waves")
    mask = Image.new("L", (64, 96))
    mask.paste(255, (0, 0, 64, 48))
    mask.save(folder / "0-mask.png")


def run_trials(kills: int, seed: int) -> list[Trial]:
    """Trials until as many runs have been killed, over all `SETTINGS` in turn."""
    trials, references = [], {}
    with tempfile.TemporaryDirectory(prefix="sdtune-kills-") as name:
        root = Path(name)
        write_pairs(root / "data", random.Random(seed))
        warm_up(root)
        for split in ("train", "test"):
            (root / "split" / split).parent.mkdir(exist_ok=True)
            write_pairs(root / "split" / split, random.Random(f"{seed} {split}"))
        write_portraits(root / "portraits", random.Random(f"{seed} portraits"))
        while sum(len(t.kills) for t in trials) < kills:
            number = len(trials)
            settings = SETTINGS[number % len(SETTINGS)]
            flags = [*settings.split(), *COMMON, "--data", str(root / data_folder(settings))]
            trial = Trial(settings)
            trials.append(trial)
            try:
                if settings not in references:
                    folder = root / f"reference-{len(references)}"
                    folder.mkdir()
                    seconds = wait(start([*flags, "--output", "run"], folder), folder)
                    references[settings] = folder / "run", seconds
                folder = root / f"trial-{number}"
                _run_trial(trial, flags, folder, *references[settings], random.Random(f"{seed} {number}"))
                shutil.rmtree(folder)
            except Fault as fault:
                trial.fault = str(fault)
            print(f"{'failure' if trial.fault else 'right':8} {settings}  {trial.kills} {trial.fault}", flush=True)
    return trials


def _run_trial(
    trial: Trial, flags: list[str], folder: Path, reference: Path, seconds: float, rng: random.Random
) -> None:
    earlier, run = folder / "output/anime", folder / "output/anime-2"
    shutil.copytree(reference, earlier)
    before = digest(earlier)
    more_kills = rng.choice((1, 2, 3, 4))
    while True:
        is_last = len(trial.kills) >= more_kills
        command = [*flags, "--resume"] if checkpoint_folders(run) else flags
        if (run / "tuner.safetensors").exists() and not checkpoint_folders(run):
            break  # the tuner is the finished one, as `check_files` has found; this run was to write no checkpoint
        if trial.kills and not checkpoint_folders(run) and rng.random() < 0.5:
            check_refusal(start([*flags, "--resume"], folder), folder)
        pid = start(command, folder)
        if is_last:
            wait(pid, folder)
            break
        place = kill_at_random(pid, run, seconds, rng)
        if place is None:
            break
        trial.kills.append(place)
        check_files(run, reference)
        if digest(earlier) != before:
            raise Fault("the finished result beside the run was changed")
    check_files(run, reference)
    if digest(earlier) != before:
        raise Fault("the finished result beside the run was changed")
    if not (run / "tuner.safetensors").exists():
        raise Fault("the run has ended and there is no tuner")
    if is_last and (left := unfinished_parts(run)):
        raise Fault(f"unfinished parts were left: {left}")
    if [f.name for f in checkpoint_folders(run)] != [f.name for f in checkpoint_folders(reference)] and is_last:
        raise Fault("a checkpoint of the undisturbed run is missing")
