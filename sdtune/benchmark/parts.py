"""The parts of the benchmark: each measures some candidates and yields the rows of its table."""

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..training import dataset
from ..training.buckets import AspectBuckets
from .candidates import BASE, CANDIDATES, FLOOR, LORA, REFERENCE, RES_ATTN, Job
from .child import seconds_per_call
from .kernel_switches import KERNELS, SWITCHES
from .processes import CandidateProcess, alternate, log, run_alone

START_UP = ("imports", "base", "reading", "encoding", "previews")  # the parts of a start-up, in seconds
ROOT = Path(__file__).parents[2]


def measure_alternating(job: Job, options: argparse.Namespace) -> Iterator[dict]:
    """Seconds per image of each candidate, and the ratio to the floor or to the base, round by round."""
    job = replace(job, data=_repeat_pairs(job, math.lcm(*options.batch)))  # few pictures, in whole batches
    training = job.part == "train"
    compared_with = FLOOR if training else BASE
    for batch in options.batch if training else options.batch[:1]:
        jobs = [replace(job, name=name, batch=batch) for name in CANDIDATES[job.part]]
        try:
            with ExitStack() as stack:
                processes = {one.name: stack.enter_context(CandidateProcess(one)) for one in jobs}
                for process in processes.values():  # they get ready at the same time
                    process.wait_until_ready()
                found, stopped = alternate({name: p.turn for name, p in processes.items()}, options.rounds)
        except RuntimeError as error:
            log(f"  failed: {error}")
            yield {"batch": batch, "candidate": "all", "error": str(error)}
            continue
        seconds = {name: np.array(spent) / batch for name, spent in found.items()}
        for one in jobs:
            own = seconds[one.name]
            row = {"batch": batch, "candidate": one.label, **_median_and_quartiles("s/image", own)}
            # ratios within each round, so that what slows a whole round down cancels
            row[f"x {compared_with}"] = float(np.median(own / seconds[compared_with]))
            row |= {"speed x reference": float(np.median(seconds[REFERENCE] / own))} if training else {}
            yield row | {"name": one.name, "seconds": own.tolist()}
        if stopped:
            raise KeyboardInterrupt


def measure_kernels(job: Job, options: argparse.Namespace) -> Iterator[dict]:
    """Seconds of our training step with Res-Attn, with all kernels, without each and without any, by turns.

    All in one process, where a kernel is switched off for a turn, so nothing else differs.
    """
    settings = {"all on": ()} | {f"without {name}": (name,) for name in SWITCHES} | {"all kernels off": KERNELS}
    for batch in options.batch:
        try:
            with CandidateProcess(replace(job, part="train", name=RES_ATTN, batch=batch)) as process:
                process.wait_until_ready()
                turns = {name: partial(process.turn, kernels_off=off) for name, off in settings.items()}
                found, stopped = alternate(turns, options.rounds)
        except RuntimeError as error:
            log(f"  failed: {error}")
            yield {"batch": batch, "setting": "all", "error": str(error)}
            continue
        for name, spent in found.items():
            row = {"batch": batch, "setting": name, **_median_and_quartiles("s/step", spent)}
            ratios = np.array(spent) / found["all on"]
            yield row | {"x all on": float(np.median(ratios)), "name": name, "seconds": spent}
        if stopped:
            raise KeyboardInterrupt


def measure_shapes(job: Job, options: argparse.Namespace) -> Iterator[dict]:
    """Seconds per step of our training on square pictures, and on the same in three shapes with captions that vary.

    A turn has a step for each picture, in which every shape has its share exactly; the ratio is that of a pixel's time.
    """
    for batch in options.batch:
        square = replace(job, part="train", name=RES_ATTN, batch=batch, data=_repeat_pairs(job, 3 * batch))
        own_folder = tempfile.mkdtemp(dir=job.work_folder)
        varied = replace(square, data=_crop_to_shapes(square), varied=True, work_folder=own_folder)
        areas = [math.prod(shape) for shape in _shapes(varied)]
        pixels = {"one shape": job.resolution**2, "three shapes": sum(areas) / len(areas)}
        try:
            with ExitStack() as stack:
                processes = [stack.enter_context(CandidateProcess(one)) for one in (square, varied)]
                for process in processes:
                    process.wait_until_ready()
                turns = {
                    name: lambda _, p=process, steps=3 * batch: p.turn(steps)
                    for name, process in zip(pixels, processes)
                }
                found, stopped = alternate(turns, options.rounds)
        except RuntimeError as error:
            log(f"  failed: {error}")
            yield {"batch": batch, "pictures": "all", "error": str(error)}
            continue
        per_pixel = {name: np.array(spent) / pixels[name] for name, spent in found.items()}
        for name, spent in found.items():
            ratios = per_pixel[name] / per_pixel["one shape"]
            row = {"batch": batch, "pictures": name, **_median_and_quartiles("s/step", spent)}
            row["x one shape, per pixel"] = float(np.median(ratios))
            yield row | {"rounds": f"{ratios.min():.3f} to {ratios.max():.3f}", "name": name, "seconds": spent}
        if stopped:
            raise KeyboardInterrupt


def _shapes(job: Job) -> list[tuple[int, int]]:
    """The shape in which each picture is trained on."""
    buckets = AspectBuckets(job.resolution)
    return [buckets.shape_for(pair.size) for pair in dataset.read_splits(job.data, buckets, lambda line: None)[0]]


def _crop_to_shapes(job: Job) -> str:
    """A copy of a folder of square pictures: a third of them as they are, a third upright, a third lying, 2 : 3."""
    pairs, _ = dataset.read_splits(job.data, AspectBuckets(job.resolution, square=True), lambda line: None)
    folder = Path(tempfile.mkdtemp(dir=job.work_folder))
    for i, pair in enumerate(pairs):
        image = pair.open()
        side, cut = image.width, image.width // 6
        boxes = (0, 0, side, side), (cut, 0, side - cut, side), (0, cut, side, side - cut)
        image.crop(boxes[i % 3]).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(pair.caption, encoding="utf-8")
    return str(folder)


def _median_and_quartiles(column: str, seconds) -> dict:
    low, median, high = np.percentile(seconds, (25, 50, 75)).tolist()
    return {column: median, "middle half": f"{low:.3g} to {high:.3g}"}


def measure_memory(job: Job, options: argparse.Namespace) -> Iterator[dict]:
    """Start-up and time per image in seconds, and memory in MB beyond what the imports take, of each candidate alone.

    `loaded` is in use between two steps or pictures, `working` is what one needs on top, `peak` is both, and `whole`
    is the most since the start.
    """
    job = replace(job, part="train", default_previews=True)
    jobs = [replace(job, name=name, batch=batch) for batch in options.batch for name in CANDIDATES["train"]]
    jobs += [replace(job, name=RES_ATTN, checkpointing=True)]
    jobs += [replace(job, part="draw", name=name, repetitions=1) for name in CANDIDATES["draw"]]  # pictures take long
    for one, found in ((one, run_alone(one)) for one in jobs):
        row = {"what": one.part, "batch": one.batch, "candidate": one.label, "error": found.get("error")}
        if "error" not in found:
            row |= {"start-up": found["ready"]} | {name: found.get(name, 0.0) for name in START_UP}
            row["base's share"] = row["base"] / (row["start-up"] - row["imports"])
            row["s/image"] = statistics.median(found["seconds"]) / one.batch
            row |= {name: found[name] / 1e6 for name in ("loaded", "peak", "whole")}
            row["working"] = row["peak"] - row["loaded"]
        yield row | {"name": one.name, "checkpointing": one.checkpointing}


def measure_imports(job: Job, options: argparse.Namespace) -> Iterator[dict]:
    """Seconds of a Python process, and those beyond one that only imports torch."""
    commands = {"import torch": ["-c", "import torch"], "import sdtune": ["-c", "import torch, sdtune"],
                "train_anime.py --help": [str(ROOT / "train_anime.py"), "--help"]}  # fmt: skip
    start = {name: partial(subprocess.run, [sys.executable, *command], check=True, capture_output=True)
             for name, command in commands.items()}  # fmt: skip
    rounds = [[seconds_per_call(run) for run in start.values()] for _ in range(options.rounds)]
    medians = [statistics.median(spent) for spent in zip(*rounds)]
    yield from ({"command": name, "s": m, "beyond torch": m - medians[0]} for name, m in zip(start, medians))


def measure_scale(job: Job, options: argparse.Namespace) -> Iterator[dict]:
    """How our training with Res-Attn grows, one thing at a time; a setting that fails shows its error."""
    job = replace(job, part="train", name=RES_ATTN)
    most = torch.cuda.device_count() if torch.cuda.is_available() else os.cpu_count()
    grown = {"batch": (1, 2, 4, 8), "resolution": [job.resolution * n // 2 for n in (1, 2, 3, 4)],
             "images": (30, 300, 3000), "processes": [n for n in (1, 2, 4, 8) if n <= most]}  # fmt: skip
    for what, value in ((what, value) for what, values in grown.items() for value in values):
        log(f"scale: {what} {value}")
        one = replace(job, data=_repeat_pairs(job, value)) if what == "images" else job
        one = replace(one, **{what: value}) if what in ("batch", "resolution") else one
        processes = value if what == "processes" else 1
        found = run_alone(one, processes)
        row = {"grows": what, "to": value, "error": found.get("error")}
        if "error" not in found:
            row["s/image"] = statistics.median(found["seconds"]) / one.batch / processes
            row |= {name: found[name] for name in ("reading", "encoding")}
            row |= {f"{name} MB": found[name] / 1e6 for name in ("loaded", "peak")}
        yield row


def measure_finish(job: Job, options: argparse.Namespace) -> Iterator[dict]:
    """Seconds from the start of a process to the end of a whole run with default settings, and parts of them."""
    job = replace(job, repetitions=2 if options.quick else 300, default_previews=True)
    jobs = [replace(job, name=name) for name in (REFERENCE, RES_ATTN, LORA)]
    for one, found in ((one, run_alone(one)) for one in jobs):
        row = {"candidate": one.label, "batch": one.batch, "steps": one.repetitions, "s in all": found.get("total")}
        yield row | {name: found.get(name, 0.0) for name in START_UP} | {"error": found.get("error")}


def _repeat_pairs(job: Job, count: int) -> str:
    """A folder of `count` pairs: the training pictures over and over."""
    pairs, _ = dataset.read_splits(job.data, AspectBuckets(job.resolution, square=True), lambda line: None)
    folder = Path(tempfile.mkdtemp(dir=job.work_folder))
    for i in range(count):
        first = i % len(pairs)
        if i == first:
            pairs[i].open().save(folder / f"{i}.png")
        else:
            shutil.copyfile(folder / f"{first}.png", folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(pairs[first].caption, encoding="utf-8")
    return str(folder)


PARTS = {
    "train": (measure_alternating, "a training step: the candidates alternate"),
    "draw": (measure_alternating, "a picture: the candidates alternate"),
    "memory": (measure_memory, "start-up and time per image (s), peak memory (MB): each candidate alone"),
    "imports": (measure_imports, "`import sdtune` and `train_anime.py --help`, beyond importing torch"),
    "kernels": (measure_kernels, "our training step without each of the CPU kernels, by turns"),
    "shapes": (measure_shapes, "our training step on three shapes with varied captions, per pixel, and on one shape"),
    "scale": (measure_scale, "how our training grows with batch, resolution, images and processes (long)"),
    "finish": (measure_finish, "a run of 300 steps on all images, with encoding, previews and saving (long)"),
}
