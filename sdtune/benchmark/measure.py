"""Speed and memory, measured side by side in one run: `python -m sdtune.bench --help`.

A training step of diffusers' train_text_to_image_lora.py, of our trainer with Res-Attn and with LoRA, and of the frozen
UNet alone, the floor; a picture of the base as diffusers and as we load it, with a Res-Attn, with a LoRA of equal
parameters as it is and fused. The contestants alternate, each in a process of its own, so the ratios hold on a machine
whose speed wanders, and nobody profits from what another one sets. What they do is in `contestants`.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import diffusers
import numpy as np
import psutil
import torch
import transformers
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..adapters import tuner_file
from ..bases import load, single_file
from ..inference import compare
from ..kernels.cpu import heap
from ..training import dataset, trainer
from .candidates import BASE, CANDIDATES, FLOOR, LORA, REFERENCE, RES_ATTN, Job, prepare

ONCE = ("imports", "base", "reading", "encoding", "previews")  # the parts of a start-up, in seconds
ROOT = Path(__file__).parent.parent


def say(text: str) -> None:
    """Progress; the report alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------- measuring


def alternate(jobs: list[Job], rounds: int) -> tuple[dict[str, list[float]], bool]:
    """Seconds per image of each contestant in each round, in which each has a turn of a second or a unit or more.

    Stopped (Ctrl-C, SIGTERM) after a whole round, it gives what it has, and True.

    Raises:
        RuntimeError: with the last words of a contestant that fails.
    """
    seconds, order = {job.who: [] for job in jobs}, [job.who for job in jobs]
    with ExitStack() as stack:
        contestants = {job.who: stack.enter_context(_Process(job)) for job in jobs}
        for contestant in contestants.values():  # they get ready at the same time
            contestant.answer()
        units, stopped = dict.fromkeys(order, 1), False
        try:
            for number in range(rounds + 1):
                for name in order:
                    seconds[name].append(contestants[name].turn(units[name]) / jobs[0].batch)
                if not number:  # caches are cold after the others' turns, which would show in short ones
                    units = {name: math.ceil(1 / contestants[name].turn(1)) for name in order}
                order.append(order.pop(0))  # nobody is always behind the same one
                shown = ", ".join(f"{n} {t[-1]:.3g} s" for n, t in seconds.items())
                say(f"  {f'round {number} of {rounds}' if number else 'warm-up'}: {shown}")
        except KeyboardInterrupt:
            stopped = True
    whole = min(map(len, seconds.values()))
    if whole < 2:
        raise KeyboardInterrupt
    return {name: spent[1:whole] for name, spent in seconds.items()}, stopped


def _command(spec: dict, processes: int = 1) -> list[str]:
    """What starts `child`."""
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *many, "-m", "sdtune.bench", "--child", json.dumps(spec)]


def _environment(job: Job) -> dict[str, str]:
    """Of a contestant's process: that of train_anime.py for what trains with us; the floor must not lie above it."""
    ours = job.part != "draw" and job.who != REFERENCE
    return os.environ | (heap.heap_environment() if ours else {})


class _Process:
    """A contestant in a process of its own that rests between its turns."""

    def __init__(self, job: Job):
        say(f"  readying {job.label}")
        self.label, self.words, pipe = job.label, Path(tempfile.mkdtemp(dir=job.work)) / "words.txt", subprocess.PIPE
        command = _command({"job": asdict(job)})
        with self.words.open("w") as words:
            self.process = subprocess.Popen(
                command,
                stdin=pipe,
                stdout=pipe,
                stderr=words,
                text=True,
                bufsize=1,
                env=_environment(job),
                start_new_session=True,  # what stops this process must not reach them first
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def turn(self, units: int) -> float:
        """Seconds of one unit."""
        with suppress(BrokenPipeError):
            print(units, file=self.process.stdin)
        return float(self.answer())

    def answer(self) -> str:
        answer = self.process.stdout.readline()
        if not answer:
            words = self.words.read_text(errors="replace").split()
            raise RuntimeError(f"{self.label}: {' '.join(words)[-400:] or 'ended without a word'}")
        return answer


def take_turns(job: Job) -> None:
    """The other end of `_Process`: a number on stdin for each turn, the answers on stdout, all else on stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    contestant = prepare(job)
    print("ready", file=answers)
    for line in sys.stdin:
        if torch.cuda.is_available():
            _time(contestant.run)  # takes back the memory that it gave the others
        print(_time(contestant.run, int(line)), file=answers)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def _peak():
    """Gives a list that ends with the most bytes in use during the `with`."""
    seen, over, cuda = [held()], threading.Event(), torch.cuda.is_available()

    def watch():
        while not over.wait(0.002):
            seen[0] = max(seen[0], held())

    torch.cuda.reset_peak_memory_stats() if cuda else threading.Thread(target=watch, daemon=True).start()
    yield seen
    over.set()
    seen[0] = torch.cuda.max_memory_reserved() if cuda else seen[0]


def held() -> int:
    """Bytes taken now: what torch has reserved on CUDA, since a recording's memory counts too; else the process's."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def give_back() -> None:
    """Lets go of memory that is free and kept for later: it would count as held."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's


def child(spec: dict) -> None:
    """One contestant alone in this process; writes what it took, in seconds and bytes, to `spec["result"]`, if any."""
    job = Job(**spec["job"])
    if "result" not in spec:
        return take_turns(job)
    started = spec["started"]
    found, before = {"imports": time.time() - started}, held()
    with _clocks(found):
        if job.part == "finish" and job.who != REFERENCE:
            trainer.fit(*job.trainer())
        else:
            with _peak() as whole:
                contestant = prepare(job)
                found["ready"] = time.time() - started
                contestant.run()  # warms up; and weights that are mapped from a file come into memory when first used
                if torch.cuda.is_available():
                    contestant.run()  # some record their work the second time
            give_back()
            found["loaded"] = held() - before
            with _peak() as peak:
                seconds = [_time(contestant.run) for _ in range(job.repeat - (job.part == "finish"))]
            contestant.finish()
            found |= {"seconds": seconds, "peak": peak[0] - before, "whole": max(whole + peak) - before}
    found["total"] = time.time() - started
    if os.environ.get("RANK", "0") == "0":
        Path(spec["result"]).write_text(json.dumps(found))


def alone(job: Job, processes: int = 1) -> dict:
    """What `child` finds for a job in a new process (or in several that share it), or its last words as `error`."""
    say(f"  {job.label}, batch {job.batch}, alone" + (f" in {processes} processes" if processes > 1 else ""))
    result = Path(tempfile.mkdtemp(dir=job.work)) / "result.json"
    job = replace(job, work=str(result.parent))  # an output folder of its own
    spec = {"job": asdict(job), "result": str(result), "started": time.time()}
    done = subprocess.run(
        _command(spec, processes), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env=_environment(job), start_new_session=True,
    )  # fmt: skip
    if result.exists():
        return json.loads(result.read_text())
    say(f"  failed with exit status {done.returncode}:\n{done.stdout[-2000:]}")
    return {"error": " ".join(done.stdout.split())[-200:]}


@contextmanager
def _clocks(spent: dict[str, float]):
    """Adds up in `spent` the seconds of the once-in-a-while work, by wrapping its functions for a while."""

    def timed(name, function, *args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

    watched = {"reading": (dataset, "read_splits"), "base": (load, "load_base"), "encoding": (dataset, "encode"),
               "previews": (compare, "draw_cells")}  # fmt: skip
    with ExitStack() as stack:
        for name, place in watched.items():
            stack.enter_context(patch.object(*place, partial(timed, name, getattr(*place))))
        yield


def _time(run: Callable[[], None], times: int = 1) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    for _ in range(times):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def measure_alternating(job: Job, options) -> Iterator[dict]:
    """Seconds per image of each contestant, and the ratio to the one that sets the mark, round by round."""
    job = replace(job, data=_repeated(job, math.lcm(*options.batch)))  # few pictures, in whole batches
    training = job.part == "train"
    mark = FLOOR if training else BASE
    for batch in options.batch if training else options.batch[:1]:
        jobs = [replace(job, who=name, batch=batch) for name in CANDIDATES[job.part]]
        try:
            seconds, stopped = alternate(jobs, options.rounds)
        except RuntimeError as error:
            say(f"  failed: {error}")
            yield {"batch": batch, "contestant": "all", "error": str(error)}
            continue
        for one in jobs:
            own = np.array(seconds[one.who])
            low, median, high = np.percentile(own, (25, 50, 75)).tolist()
            row = {"batch": batch, "contestant": one.label, "s/image": median}
            row["middle half"] = f"{low:.3g} to {high:.3g}"
            # ratios within each round: what slows a whole round down cancels
            row[f"x {mark}"] = float(np.median(own / seconds[mark]))
            row |= {"speed x reference": float(np.median(seconds[REFERENCE] / own))} if training else {}
            yield row | {"who": one.who, "seconds": seconds[one.who]}
        if stopped:
            raise KeyboardInterrupt


def measure_memory(job: Job, options) -> Iterator[dict]:
    """Start-up and time per image in seconds, and memory in MB beyond what the imports take, of each contestant alone.

    `loaded` is in use between two steps or pictures, `working` is what one needs on top, `peak` is both, and `whole`
    is the most since the start.
    """
    job = replace(job, part="train", default_previews=True)
    jobs = [replace(job, who=name, batch=batch) for batch in options.batch for name in CANDIDATES["train"]]
    jobs += [replace(job, who=RES_ATTN, checkpointing=True)]
    jobs += [replace(job, part="draw", who=name, repeat=1) for name in CANDIDATES["draw"]]  # pictures take long
    for one, found in ((one, alone(one)) for one in jobs):
        row = {"what": one.part, "batch": one.batch, "contestant": one.label, "error": found.get("error")}
        if "error" not in found:
            row |= {"start-up": found["ready"]} | {name: found.get(name, 0.0) for name in ONCE}
            row["base's share"] = row["base"] / (row["start-up"] - row["imports"])
            row["s/image"] = statistics.median(found["seconds"]) / one.batch
            row |= {name: found[name] / 1e6 for name in ("loaded", "peak", "whole")}
            row["working"] = row["peak"] - row["loaded"]
        yield row | {"who": one.who, "checkpointing": one.checkpointing}


def measure_imports(job: Job, options) -> Iterator[dict]:
    """Seconds of a Python process, and those beyond one that only imports torch."""
    commands = {"import torch": ["-c", "import torch"], "import sdtune": ["-c", "import torch, sdtune"],
                "train_anime.py --help": [str(ROOT / "train_anime.py"), "--help"]}  # fmt: skip
    start = {name: partial(subprocess.run, [sys.executable, *command], check=True, capture_output=True)
             for name, command in commands.items()}  # fmt: skip
    rounds = [[_time(run) for run in start.values()] for _ in range(options.rounds)]
    medians = [statistics.median(spent) for spent in zip(*rounds)]
    yield from ({"command": name, "s": m, "beyond torch": m - medians[0]} for name, m in zip(start, medians))


def measure_scale(job: Job, options) -> Iterator[dict]:
    """How our training with Res-Attn grows, one thing at a time; what does not fit shows its error."""
    job = replace(job, part="train", who=RES_ATTN)
    most = torch.cuda.device_count() if torch.cuda.is_available() else os.cpu_count()
    kinds = {"batch": (1, 2, 4, 8), "resolution": [job.resolution * n // 2 for n in (1, 2, 3, 4)],
             "images": (30, 300, 3000), "processes": [n for n in (1, 2, 4, 8) if n <= most]}  # fmt: skip
    for kind, value in ((kind, value) for kind, values in kinds.items() for value in values):
        say(f"scale: {kind} {value}")
        one = replace(job, data=_repeated(job, value)) if kind == "images" else job
        one = replace(one, **{kind: value}) if kind in ("batch", "resolution") else one
        processes = value if kind == "processes" else 1
        found = alone(one, processes)
        row = {"grows": kind, "to": value, "error": found.get("error")}
        if "error" not in found:
            row["s/image"] = statistics.median(found["seconds"]) / one.batch / processes
            row |= {name: found[name] for name in ("reading", "encoding")}
            row |= {f"{name} MB": found[name] / 1e6 for name in ("loaded", "peak")}
        yield row


def _repeated(job: Job, count: int) -> str:
    """A folder of `count` pairs: the training pictures over and over."""
    pairs, _ = dataset.read_splits(job.data, job.resolution, lambda line: None)
    folder = Path(tempfile.mkdtemp(dir=job.work))
    for i in range(count):
        first = i % len(pairs)
        if i == first:
            pairs[i].open().save(folder / f"{i}.png")
        else:
            shutil.copyfile(folder / f"{first}.png", folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(pairs[first].caption, encoding="utf-8")
    return str(folder)


def measure_finish(job: Job, options) -> Iterator[dict]:
    """Seconds from the start of a process to the end of a whole run with default settings, and parts of them."""
    job = replace(job, repeat=2 if options.quick else 300, default_previews=True)
    for one, found in ((one, alone(one)) for one in (replace(job, who=name) for name in (REFERENCE, RES_ATTN, LORA))):
        row = {"contestant": one.label, "batch": one.batch, "steps": one.repeat, "s in all": found.get("total")}
        yield row | {name: found.get(name, 0.0) for name in ONCE} | {"error": found.get("error")}


PARTS = {
    "train": (measure_alternating, "a training step: the contestants alternate"),
    "draw": (measure_alternating, "a picture: the contestants alternate"),
    "memory": (measure_memory, "start-up and time per image (s), peak memory (MB): each contestant alone"),
    "imports": (measure_imports, "`import sdtune` and `train_anime.py --help`, beyond importing torch"),
    "scale": (measure_scale, "how our training grows with batch, resolution, images and processes (long)"),
    "finish": (measure_finish, "a run of 300 steps on all images, with encoding, previews and saving (long)"),
}


# --------------------------------------------------------------------------------------- the report


def judge(found: dict[str, list[dict]], cuda: bool) -> list[dict]:
    """Each target of speed and memory: what was found, and whether it is met."""
    rows = []

    def target(text: str, value: float | None, limit: float, least: bool = False) -> None:
        met = value is not None and (value >= limit if least else value <= limit)
        row = {"target": text, "wanted": f"{'at least' if least else 'at most'} {limit:,}", "found": value}
        rows.append(row | {"answer": "not measured" if value is None else "met" if met else "NOT met"})

    def pick(part: str, column: str, **where):
        """The value in the row of a part that `where` describes."""
        chosen = (r for r in found.get(part, []) if all(r.get(k) == v for k, v in where.items()))
        return next(chosen, {}).get(column)

    def over(part: str, column: str, name: str, **where) -> float | None:
        """The value of Res-Attn over that of another contestant."""
        own, other = (pick(part, column, who=who, **where) for who in (RES_ATTN, name))
        return own / other if own is not None and other else None

    for batch in dict.fromkeys(r["batch"] for part in ("train", "memory") for r in found.get(part, [])):
        speed, time_ = (pick("train", c, batch=batch, who=RES_ATTN) for c in ("speed x reference", f"x {FLOOR}"))
        target(f"training step, batch {batch}: x reference's speed", speed, 2.0, least=True)
        target(f"training step, batch {batch}: x floor's time", time_, 1.1)
        # on a CPU without what has been loaded: a model that has done its work stays in the same memory
        kind, at = "peak" if cuda else "working", dict(what="train", batch=batch, checkpointing=False)
        target(f"training memory ({kind}), batch {batch}: x reference's", over("memory", kind, REFERENCE, **at), 0.6)
    if cuda:
        target("fp16, batch 1, checkpointing: MB", pick("memory", "whole", checkpointing=True), 4000)
    target("drawing with Res-Attn: x base's time", pick("draw", f"x {BASE}", who=RES_ATTN), 1.05)
    target("drawing with Res-Attn: x time of a LoRA of equal parameters", over("draw", "s/image", LORA), 1.0)
    share = pick("memory", "base's share", what="train", who=RES_ATTN)
    target("start-up after the imports: share of reading the base", share, 0.5, least=True)
    for command in ("import sdtune", "train_anime.py --help"):
        target(f"{command}: s beyond importing torch", pick("imports", "beyond torch", command=command), 1.0)
    return rows


def machine() -> dict:
    """What the numbers depend on; the load tells whether others were using the machine."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.partition(": ")[2] for line in info.splitlines() if "model name" in line), platform.machine())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    load, threads = round(psutil.getloadavg()[0], 1), torch.get_num_threads()
    return {"device": device, "cores": os.cpu_count(), "threads": threads, "load at start": load,
            "python": platform.python_version(), **tuner_file.library_versions()}  # fmt: skip


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table, without empty columns and those that are for the JSON file alone."""
    shown = dict.fromkeys(k for row in rows for k, v in row.items() if v is not None)
    columns = [k for k in shown if k not in ("who", "seconds", "checkpointing")]
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(c)) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def sd15_shape() -> str:
    """A base of Stable Diffusion 1.5's exact shape with random weights, made once and kept; 4.3 GB."""
    folder, part, configs = Path("output/sd15-shape"), Path("output/.sd15-shape.part"), single_file.CONFIGS / "sd15"
    if not folder.exists():
        say(f"making {folder}, Stable Diffusion 1.5's shape with random weights")
        StableDiffusionPipeline(
            vae=AutoencoderKL.from_config(AutoencoderKL.load_config(configs / "vae")),
            text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder")),
            tokenizer=CLIPTokenizer.from_pretrained(single_file.CONFIGS / "tokenizer", pad_token="<|endoftext|>"),
            unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(configs / "unet")),
            scheduler=PNDMScheduler.from_pretrained(configs / "scheduler"),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(part)  # fmt: skip
        part.rename(folder)
    return str(folder)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    for logging in (transformers.utils.logging, diffusers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if arguments[:1] == ["--child"]:
        child(json.loads(arguments[1]))
        return 0
    cuda = torch.cuda.is_available()
    parts = "\n".join(f"  {name:8} {text}" for name, (_, text) in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m sdtune.bench", description=__doc__.split("\n\n")[1], epilog=f"parts:\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("parts", nargs="*", metavar="part", help="what to measure; default: train draw memory imports")
    parser.add_argument("--base", default="tiny-sd", help="tiny-sd, sd15-shape (random weights), or any base")
    parser.add_argument("--resolution", type=int, help="side in px; default: the base's own, on a CPU at most 256")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="images per step; default: 1 4")
    parser.add_argument("--precision", choices=("no", "fp16", "bf16"), help="default: fp16 on CUDA, no on a CPU")
    parser.add_argument("--rounds", type=int, default=20 if cuda else 7, help="how often the contestants alternate")
    parser.add_argument("--quick", action="store_true", help="one round of the smallest of everything: does it run?")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there, too")
    options = parser.parse_args(arguments)
    if wrong := set(options.parts) - set(PARTS):
        parser.error(f"no part named {', '.join(wrong)}; possible: {', '.join(PARTS)}")
    if options.quick:
        options.rounds, options.batch, options.resolution = 1, [1], 64

    base = sd15_shape() if options.base == "sd15-shape" else options.base
    native, where, found = load.native_resolution(base), machine(), {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what `timeout` sends: it is over, and told as such
    with tempfile.TemporaryDirectory() as work:
        job = Job(
            "train", RES_ATTN, base, str(ROOT / "assets/anime"), work,
            resolution=options.resolution or (native if cuda else min(native, 256)), batch=options.batch[0],
            precision=options.precision or ("fp16" if cuda else "no"), repeat=1 if options.quick else 5,
            draw_steps=1 if options.quick else 50 if cuda else 10,
        )  # fmt: skip
        print(", ".join(f"{k} {v}" for k, v in where.items()), end="\n\n")
        print(f"base {options.base}, {job.resolution} px, precision {job.precision}, {options.rounds} rounds")
        for part in options.parts or ("train", "draw", "memory", "imports"):
            say(f"{part}: {PARTS[part][1]}")
            found[part], stopped = [], False
            try:
                for row in PARTS[part][0](replace(job, part=part), options):
                    found[part].append(row)
            except KeyboardInterrupt:
                stopped = True
                say(f"stopped in {part}; the report is on what came before")
            steps = f", {job.draw_steps} sampling steps" if part == "draw" else ""
            print(f"\n**{part}**: {PARTS[part][1]}{steps}\n\n{table(found[part])}", flush=True)
            if stopped:
                break
    verdicts = judge(found, cuda)
    print(f"\n**targets**\n\n{table(verdicts)}")
    if options.json:
        report = {"machine": where, "settings": {**vars(options), **asdict(job)}, **found, "targets": verdicts}
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
