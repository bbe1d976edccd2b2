"""What the page of `app.py` asks for: draw side by side, draw a grid, take dropped data, train, add to the library.

`Studio` holds the loaded base, the `Device` that all windows share, and the `Library`. Nothing here trusts what a
browser sends: adapters are named by their label in the library, never by a path, and files are written below the
output folder only.
"""

import copy
import dataclasses
import gc
import json
import re
import secrets
import shlex
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

import sdtune

from ..adapters import tuner_file
from ..inference import grids
from ..training import dataset, encoding
from ..training.errors import Stopped
from ..training.trainer import fit
from ..tuners.config import TunerConfig
from .files import FileList, Item, matters
from .png_settings import Settings, slug, write_png
from .queue import Halted, Job, PageError, Queue

ASSETS = Path(__file__).parents[2] / "assets"
SAMPLERS = {
    "PNDM": (PNDMScheduler, {"skip_prk_steps": True}),
    "DDIM": (DDIMScheduler, {}),
    "Euler": (EulerDiscreteScheduler, {}),
    "Euler a": (EulerAncestralDiscreteScheduler, {}),
    "Heun": (HeunDiscreteScheduler, {}),
    "DPM++ 2M": (DPMSolverMultistepScheduler, {}),
    "DPM++ 2M Karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "UniPC": (UniPCMultistepScheduler, {}),
}
MOST_CELLS, MOST_LOADED, MOST_FILES = 100, 12, 1000
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DAY = 24 * 3600


@dataclass(frozen=True)
class Shot:
    """One picture to draw, its adapters named as in the library."""

    prompt: str
    seed: int
    adapters: dict[str, float]
    guidance: float
    negative_prompt: str = ""


@dataclass(frozen=True)
class Drawn:
    """What a drawing gave: a row of (title, PNG files) per column, or one grid."""

    columns: list[tuple[str, list[Path]]]
    settings: Settings


@dataclass(frozen=True)
class Run:
    """A training as the page asked for it."""

    config: "sdtune.TrainConfig"
    tuner: "sdtune.TunerConfig"

    @property
    def name(self) -> str:
        return Path(self.config.output).name

    def previews(self) -> list[Path]:
        """What it has drawn so far, in order."""
        output = Path(self.config.output)
        return [*sorted((output / "previews").glob("step-*.png")), *output.glob("preview.png")]


class Studio:
    """The loaded base, the device, the library, and all that the page can ask for."""

    def __init__(self, base: str = "tiny-sd", output: str | Path = "output"):
        self.base, self.output = base, Path(output)
        self.private = self.output / ".page"  # uploads and pictures of single windows, not listed anywhere
        self.private.mkdir(parents=True, exist_ok=True)
        on_gpu = torch.cuda.is_available()
        self.pipe = sdtune.load_base(base, torch.float16 if on_gpu else torch.float32)
        self.pipe.to("cuda" if on_gpu else "cpu")
        self.side = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        self._scheduler = self.pipe.scheduler
        own = type(self._scheduler).__name__
        self.sampler = next((n for n, (c, _) in SAMPLERS.items() if c.__name__ == own), "DDIM")
        self.device = Queue()
        self.library = FileList([ASSETS, self.output], self.pipe.unet)
        self._loaded: OrderedDict[tuple, str] = OrderedDict()  # (path, time, size) -> adapter, least used first
        self._count = 0
        self._trainings: dict[str, Job] = {}  # the last one of each window
        self._orphan: Job | None = None  # the last one whose window was closed
        self._tokenizer, self._one_counts = copy.deepcopy(self.pipe.tokenizer), threading.Lock()
        self._sweep()

    # -------------------------------------------------------------------------------------- drawing

    def draw(self, owner: str, settings: Settings, slot: str = "columns") -> Job:
        """Queues a side-by-side drawing; its result is `Drawn`, one title and list of files per column."""
        settings.check()
        for column in settings.columns:
            for label in column:
                self.library.find(label)

        def work(job: Job) -> Drawn:
            shots = [
                Shot(settings.prompt, settings.seed + i, column, settings.guidance, settings.negative_prompt)
                for column in settings.columns
                for i in range(settings.images)
            ]
            drawn = self._draw(job, shots, settings)
            folder, columns = self._new_folder(), []
            for c, column in enumerate(settings.columns):
                files = []
                for i in range(settings.images):
                    title = title_of(column)
                    name = f"{slug(settings.prompt)}-{settings.seed + i}-{c + 1}-{slug(title)}.png"
                    picture = drawn[c * settings.images + i]
                    files.append(write_png(folder / name, picture, settings, c, i, self.base_name))
                columns.append((title_of(column), files))
            return Drawn(columns, settings)

        return self.device.submit(Job(owner, "drawing", slot, work))

    def default_columns(self) -> list[dict[str, float]]:
        """What a new window sets side by side: the base, a LoRA and a tuner, as far as there are some."""
        offered = [self.library.items[label] for label in self.library.offered()]
        shipped = [i for i in offered if i.path.parent == ASSETS] or offered
        loras = [{i.label: 1.0} for i in shipped if i.kind == "LoRA"][:1]
        tuners = [{i.label: 1.0} for i in shipped if i.kind != "LoRA"][:1]
        return [{}, *loras, *tuners]

    def draw_grid(self, owner: str, settings: Settings, x: "Axis", y: "Axis") -> Job:
        """Queues a grid over two axes; its result is `Drawn` with one labelled picture."""
        settings.check()
        if len(x.values) * len(y.values) > MOST_CELLS:
            many = len(x.values) * len(y.values)
            raise PageError(f"these axes make {many} pictures; at most {MOST_CELLS} fit in one grid")
        adapters = settings.columns[0] if settings.columns else {}
        shots = []
        for below in y.values:
            for right in x.values:
                shot = dict(prompt=settings.prompt, seed=settings.seed, guidance=settings.guidance,
                            adapters=dict(adapters), negative_prompt=settings.negative_prompt)  # fmt: skip
                # the weight last: it is that of the adapter which the other axis may choose
                for name, value in sorted([(x.name, right), (y.name, below)], key=lambda pair: pair[0] == "weight"):
                    if name in ("tuner", "checkpoint"):
                        weight = next(iter(adapters.values()), 1.0)
                        shot["adapters"] = {value: weight} if value else {}
                    elif name == "weight":
                        shot["adapters"] = dict.fromkeys(shot["adapters"], value)
                    elif name:
                        shot[name] = value
                for label in shot["adapters"]:
                    self.library.find(label)
                shots.append(Shot(**shot))

        if {x.name, y.name} & {"tuner", "checkpoint"}:  # the picture's settings are not those of one of them
            settings = dataclasses.replace(settings, columns=[{}])

        def work(job: Job) -> Drawn:
            drawn = self._draw(job, shots, settings)
            rows = [drawn[i : i + len(x.values)] for i in range(0, len(drawn), len(x.values))]
            cell = min(256, max(192, self.side if settings.size is None else settings.size))
            picture = grids.make_grid(rows, x.titles(), y.titles(), cell)
            name = f"grid-{slug(settings.prompt)}.png"
            titles = {axis.name: axis.titles() for axis in (x, y)}
            file = write_png(self._new_folder() / name, picture, settings, 0, 0, self.base_name, titles)
            return Drawn([("grid", [file])], settings)

        return self.device.submit(Job(owner, "drawing", "grid", work))

    def _draw(self, job: Job, shots: list[Shot], settings: Settings) -> list[Image.Image]:
        """Draws on the device; called in its thread only."""
        items = {label: self.library.find(label) for label in dict.fromkeys(n for s in shots for n in s.adapters)}
        names = self._load(items)
        cells = [
            sdtune.Cell(s.prompt, s.seed, {names[n]: w for n, w in s.adapters.items()}, s.guidance, s.negative_prompt)
            for s in shots
        ]
        most = self.pipe.tokenizer.model_max_length
        if any(len(self.pipe.tokenizer(p).input_ids) > most for p in {s.prompt for s in shots}):
            job.note = f"The prompt is longer than the text encoder reads: only its first {most - 2} tokens count."
        kind, options = SAMPLERS[settings.sampler or self.sampler]
        self.pipe.scheduler = kind.from_config(self._scheduler.config, **options)
        try:
            return sdtune.draw_cells(self.pipe, cells, steps=settings.steps, size=settings.size, on_step=job.step)
        finally:
            self.pipe.scheduler = self._scheduler

    def _load(self, items: dict[str, Item]) -> dict[str, str]:
        """Label -> name of the adapter, loaded if need be; the least used ones leave when there are many."""
        names = {}
        for label, item in items.items():
            stat = item.path.stat()
            key = (item.path, stat.st_mtime_ns, stat.st_size)
            if key not in self._loaded:
                self._count += 1
                self._loaded[key] = sdtune.load_tuner(self.pipe, item.path, f"a{self._count}")
            self._loaded.move_to_end(key)
            names[label] = self._loaded[key]
        while len(self._loaded) > max(MOST_LOADED, len(names)):
            self.pipe.delete_adapters(self._loaded.popitem(last=False)[1])
        return names

    @property
    def base_name(self) -> str:
        return Path(self.base).name or self.base

    def _new_folder(self) -> Path:
        """A folder that only the window knows which asked for it."""
        self._sweep()
        folder = self.private / "pictures" / secrets.token_hex(16)
        folder.mkdir(parents=True)
        return folder

    def _sweep(self) -> None:
        """Removes what windows left a day ago."""
        for old in (*self.private.glob("pictures/*"), *self.private.glob("drops/*")):
            try:
                if old.stat().st_mtime < time.time() - _DAY:
                    shutil.rmtree(old)
            except OSError:  # another sweep was faster
                pass

    # ------------------------------------------------------------------------------------- training

    def take(self, files: Sequence[str | Path]) -> "Drop":
        """Copies dropped pictures and caption files into a folder of their own, and pairs them."""
        if len(files) > MOST_FILES:
            raise PageError(f"{len(files)} files were dropped; at most {MOST_FILES} at once, use a shell for more")
        folder = self.private / "drops" / secrets.token_hex(16)
        folder.mkdir(parents=True)
        problems, notes = [], []
        for file in map(Path, files):
            name = file.name.lstrip(".") or "unnamed"
            if (folder / name).exists():
                problems.append(f"{name}: two files of this name were dropped; rename one")
            else:
                shutil.copyfile(file, folder / name)
        found = dataset._find(folder, dataset._files(folder, problems), problems, notes)
        problems = [p for p in problems if ": no caption" not in p]  # those are typed in the page
        return Drop(folder, [(name, caption or "") for name, caption, _ in found], problems, notes)

    def check(
        self, drop: "Drop", captions: Sequence[str], resolution: int | None = None
    ) -> tuple[list[str], list[str]]:
        """What keeps these pictures and captions from being trained on, and what is only good to know."""
        folder = self.private / "drops" / secrets.token_hex(16)
        problems, notes, untold = list(drop.problems), list(drop.notes), ": no caption yet; write one beside it"
        try:
            drop.write(folder, captions)
            pairs = dataset.read(folder, resolution or self.side, log=notes.append)
            with self._one_counts:  # a tokenizer cannot serve two threads at once
                long = encoding.truncated_captions(pairs, self._tokenizer)
            if long:
                notes.append(f"captions longer than the text encoder reads are cut: {', '.join(long[:5])}")
        except sdtune.DataError as error:
            problems += [re.sub(r": no caption, or an empty one; .*", untold, p) for p in error.problems]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return problems, list(dict.fromkeys(notes))

    def plan(
        self, drop: "Drop | None", captions: Sequence[str], source: str, name: str, kind: str, steps, more: dict
    ) -> "Run":
        """What the page's form asks for, as a training.

        Args:
            source: "own" for the dropped pictures with these captions, "bundled" for the anime pairs.
            more: the other fields of the form, by their names in the configurations; empty ones count as default.

        Raises:
            ValueError: if a setting is out of range.
        """
        automatic = ("learning_rate", "resolution")  # where 0 stands for the default
        more = {k: v for k, v in more.items() if v not in (None, "") and not (k in automatic and not v)}
        sizes = ("rank", "num_heads", "length")
        numbers = (*sizes, "batch_size", "resolution", "preview_every", "checkpoint_every", "seed")
        more |= {k: int(more[k]) for k in numbers if k in more}
        tuner = {k: more.pop(k) for k in ("ops", *sizes) if k in more}
        tuner = TunerConfig(kind=kind, **{k: v for k, v in tuner.items() if matters(kind, k)})
        prompts = more.pop("preview_prompts", "").splitlines()
        more["preview_prompts"] = [p.strip() for p in prompts if p.strip()]
        more["base"] = base_choice(more.get("base"), self.base)
        if steps is not None:
            more["steps"] = int(steps)
        more["data"] = self._data_folder(drop, captions, name) if source == "own" else bundled()
        return Run(sdtune.TrainConfig(output=str(self.output / self.free_name(name)), **more), tuner)

    def free_name(self, wanted: str) -> str:
        """The name of a run that does not exist yet, made of the wanted one."""
        stem = slug(wanted) or "tuner"
        names = [stem, *(f"{stem}-{i}" for i in range(2, 1000))]
        return next(n for n in names if not (self.output / n).exists())

    def _data_folder(self, drop: "Drop | None", captions: Sequence[str], name: str) -> str:
        """Where these pictures and captions are kept, now or later: in one folder each, however often asked."""
        if drop is None:
            return str(self.output / "data" / "…")
        stem = f"{slug(name) or 'pictures'}-{drop.folder.name[:6]}"
        for folder in (self.output / "data" / n for n in (stem, *(f"{stem}-{i}" for i in range(2, 1000)))):
            if not folder.exists() or (folder / "metadata.jsonl").read_text(encoding="utf-8") == drop.table(captions):
                return str(folder)
        raise PageError(f"there are 1000 versions of {stem} already; choose another name")

    def keep(self, drop: "Drop", captions: Sequence[str], run: "Run") -> None:
        """Puts checked pictures and captions where the training finds them, from the page or from a shell."""
        folder = Path(run.config.data)
        if not folder.exists():
            part = folder.with_name(f".{secrets.token_hex(8)}.part")
            drop.write(part, captions)
            part.rename(folder)

    def train(self, owner: str, run: Run, before: Job | None = None) -> Job:
        """Queues a training; its result is the tuner's file, also when it is stopped after its first step.

        Args:
            before: the stopped training that it goes on with.
        """

        def work(job: Job) -> Path:

            job.total = run.config.steps

            def on_step(done: int, loss: float) -> bool:
                job.done = done
                job.losses.append(float(loss))
                self.device.let_pass()
                return job.stopping

            if job.stopping:
                raise Halted
            try:
                made = fit(run.config, run.tuner, on_step).tuner
                job.unfinished = False
                return made
            except Stopped:
                job.unfinished = True
                kept = sorted((Path(run.config.output) / "checkpoints").glob(f"step-*/{tuner_file.FILE_NAME}"))
                return kept[-1]
            finally:
                gc.collect()  # a trainer is part of cycles, which would keep its models
                self.library.scan()

        job = Job(owner, "training", "training", work, total=run.config.steps, run=run)
        if before:
            job.losses, job.unfinished, job.result = list(before.losses), True, before.result
        else:
            try:
                Path(run.config.output).mkdir(parents=True)  # the name is taken from now on
            except FileExistsError:
                raise PageError(f"another training has taken the name {run.name}; click again") from None
        try:
            self._trainings[owner] = self.device.submit(job)
        except PageError:
            if not before:
                Path(run.config.output).rmdir()  # nobody has taken the name, after all
            raise
        return job

    def go_on(self, owner: str) -> Job:
        """Queues the rest of the training that a window shows, which was stopped.

        Raises:
            StudioError: if there is none, or another one of this window is under way.
        """
        job = self.training_of(owner)
        if job is None or not job.unfinished:
            raise PageError("no stopped training is there to go on with; click on Train for a new one")
        config = dataclasses.replace(job.run.config, resume=True)
        return self.train(owner, Run(config, job.run.tuner), job)

    def training_of(self, owner: str) -> Job | None:
        """The training that a window shows: its own last one, else one whose window was closed and that goes on."""
        if owner not in self._trainings and self._orphan and self._orphan.over:
            self._trainings[owner], self._orphan = self._orphan, None  # whoever sees it end has it
        return self._trainings.get(owner) or self._orphan

    def forget(self, owner: str) -> None:
        """A window was closed."""
        self.device.forget(owner)
        job = self._trainings.pop(owner, None)
        if job and not job.over:
            self._orphan = job

    def label_of(self, job: Job) -> str | None:
        """The label of what a training made, if it fits the loaded base."""
        return next((i.label for i in self.library.items.values() if i.path == job.result and i.fits), None)

    def first_prompt(self, job: Job) -> str:
        """A prompt that a training has learned, to draw with."""
        config = job.run.config
        try:
            caption = dataset.read(config.data, self.side, log=lambda _: None)[0].caption
        except ValueError:
            return ""
        return f"{config.trigger_words} {caption}".strip()

    def show(self, picture: Path) -> Path:
        """A copy of a run's picture that the page may serve."""
        return Path(shutil.copy(picture, self._new_folder() / picture.name))

    def doing(self, owner: str) -> tuple[str, bool]:
        """What the device does, in a few words for one window, and whether it does anything."""
        jobs = self.device.jobs()
        if not jobs:
            return "device free", False
        now = next((job for job in reversed(jobs) if job.state == "running"), jobs[0])
        whose = "your" if now.owner == owner else "another window's"
        text = f"{whose} {now.kind}" + (f", {now.done} of {now.total}" if now.total else "")
        waiting = sum(job.state == "waiting" for job in jobs)
        return text + (f" · {waiting} waiting" if waiting else ""), True

    # -------------------------------------------------------------------------------------- library

    def add_file(self, source: str | Path) -> str:
        """Copies a dropped .safetensors file into the library."""
        source = Path(source)
        if source.suffix.lower() != ".safetensors":
            raise PageError(f"{source.name} is no .safetensors file; others may run code when they are read")
        name = slug(source.stem) or "file"
        target = self.output / "uploads" / f"{name}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and target.read_bytes() != source.read_bytes():
            target = target.with_stem(f"{name}-{secrets.token_hex(2)}")
        if not target.exists():
            part = target.with_name(f".{secrets.token_hex(8)}.part")
            shutil.copyfile(source, part)
            part.replace(target)
        self.library.scan()
        return next((i.label for i in self.library.items.values() if i.path == target), target.stem)

    def add_from_hub(self, name: str) -> str:
        """Fetches a tuner or LoRA from a hub repository into the library."""
        name = name.strip()
        if not HUB_ID.fullmatch(name):
            raise PageError(f"{name[:80]!r} is not a hub id; expected owner/name")
        from huggingface_hub import HfApi, hf_hub_download

        folder = self.output / "hub" / name.replace("/", "--")
        try:
            every = HfApi().model_info(name, files_metadata=True).siblings or []
            files = [f for f in every if f.rfilename.endswith(".safetensors") and "/" not in f.rfilename]
            usual = [f for f in files if f.rfilename in (tuner_file.FILE_NAME, "pytorch_lora_weights.safetensors")]
            files = usual or files
            if len(files) != 1:
                there = ", ".join(f.rfilename for f in files[:5]) or "none"
                raise PageError(f"expected one .safetensors file in {name}; found {there}")
            if (files[0].size or 0) > 2e9:
                raise PageError(f"{files[0].rfilename} of {name} has {files[0].size / 1e9:.1f} GB: no tuner or LoRA")
            hf_hub_download(name, files[0].rfilename, local_dir=folder)
            if any(f.rfilename == "preview.png" and (f.size or 0) < 2e7 for f in every):
                hf_hub_download(name, "preview.png", local_dir=folder)
        except PageError:
            raise
        except Exception as error:  # the hub client raises many kinds
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise PageError(f"the hub does not give {name}: {reason}") from error
        self.library.scan()
        return name


@dataclass(frozen=True, eq=False)
class Drop:
    """Dropped training files: (picture, caption found for it), and what is wrong apart from missing captions."""

    folder: Path
    pairs: list[tuple[str, str]]
    problems: list[str]
    notes: list[str]

    def table(self, captions: Sequence[str]) -> str:
        """The metadata.jsonl of these pictures with the captions as they stand in the page."""
        lines = [
            json.dumps({"file_name": name, "text": caption.strip()}, ensure_ascii=False) + "\n"
            for (name, _), caption in zip(self.pairs, captions)
            if caption and caption.strip()
        ]
        return "".join(lines)

    def write(self, folder: Path, captions: Sequence[str]) -> None:
        """Writes pictures and captions as a data set."""
        folder.mkdir(parents=True)
        for name, _ in self.pairs:
            shutil.copyfile(self.folder / name, folder / name)
        (folder / "metadata.jsonl").write_text(self.table(captions), encoding="utf-8")


@dataclass(frozen=True)
class Axis:
    """One axis of a grid: what changes ("" for nothing) and its values."""

    name: str
    values: list

    KINDS = ("tuner", "weight", "seed", "prompt", "guidance", "checkpoint")

    @staticmethod
    def parse(name: str, text: str, chosen: Sequence[str]) -> "Axis":
        """An axis from what the page holds: values in a text, or labels of the library.

        Raises:
            StudioError: if there is no value, or one is not a number where one is needed.
        """
        if not name:
            return Axis("", [None])
        if name not in Axis.KINDS:
            raise PageError(f"{name[:40]!r} is no axis; expected one of {', '.join(Axis.KINDS)}")
        if name in ("tuner", "checkpoint"):
            values = ["" if label == "base" else label for label in chosen or []]
        elif name == "prompt":
            values = [line.strip() for line in text.splitlines() if line.strip()]
        else:
            values = []
            for part in filter(None, re.split(r"[,;\s]+", text.strip())):
                try:
                    number = int(part) if name == "seed" else float(part)
                    limit = {"seed": 2**32 - 1, "weight": 5, "guidance": 30}[name]
                    if not (-limit if name == "weight" else 0) <= number <= limit:
                        raise ValueError
                except ValueError:
                    kind = "whole number" if name == "seed" else "number"
                    raise PageError(f"{part[:20]!r} is no {name}; expected {kind}s with commas between") from None
                values.append(number)
        if not values:
            raise PageError(f"the axis {name} has no values; give at least one")
        return Axis(name, values)

    def titles(self) -> list[str]:
        if not self.name:
            return [""]
        if self.name in ("tuner", "checkpoint"):
            return [value or "base" for value in self.values]
        return [v if self.name == "prompt" else f"{self.name} {v:.10g}" for v in self.values]


def title_of(column: dict[str, float]) -> str:
    """The title of a column: base, or its adapters with their weights where these are not 1."""
    return " + ".join(n if w == 1 else f"{n} × {w:g}" for n, w in column.items()) or "base"


def bundled() -> str:
    """The bundled pairs: as the shell's default names them where that is here, else where they are."""
    default = sdtune.TrainConfig().data
    return default if Path(default).resolve() == ASSETS / "anime" else str(ASSETS / "anime")


def command(run: Run) -> str:
    """The line for a shell that trains the same."""
    words = ["accelerate", "launch", "train_anime.py"]
    for part in (run.config, run.tuner):
        for f in dataclasses.fields(part):
            value = getattr(part, f.name)
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            if value is None or value == default:
                continue
            words.append(f"--{f.name}")
            words += [str(v) for v in value] if isinstance(value, list) else [] if value is True else [str(value)]
    return shlex.join(words)


def base_choice(text: str, own: str) -> str:
    """A base that the page may train on: the loaded one, tiny-sd, or a hub id, but no path of the server's.

    Raises:
        StudioError: for anything else.
    """
    text = (text or own).strip()
    if text in (own, "tiny-sd"):
        return text
    if HUB_ID.fullmatch(text) and not Path(text).exists():
        return text
    raise PageError(f"{text[:80]!r} cannot be trained on from here; expected {own}, tiny-sd or a hub id (owner/name)")
