"""What stands behind the page of `app.py` and is no layout: one device shared by many windows, and the library.

`Device` runs one piece of work at a time, in a thread of its own, and says who waits for whom. `Library` lists the
tuner and LoRA files in some folders, with what their metadata says and whether they fit the base. `Studio` draws
pictures, writes their settings into them, and trains. Nothing here trusts what a browser sends: adapters are
named by their label in the library, never by a path, and files are written below the output folder only.
"""

import base64
import io
import json
import re
import secrets
import shutil
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from PIL import Image
from safetensors import SafetensorError, safe_open

import sdtune

from . import bases, data, pictures, pipeline, store
from .notes import Settings, slug, write_png

ASSETS = Path(__file__).parent.parent / "assets"
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
MOST_WAITING, MOST_CELLS, MOST_LOADED, MOST_FILES = 20, 100, 12, 1000
_DAY = 24 * 3600


class StudioError(ValueError):
    """Something that the user of the page can put right; the message says what."""


class Halted(Exception):
    """Raised inside a piece of work that was told to stop."""


# ------------------------------------------------------------------------------------------ the device


@dataclass(eq=False)
class Job:
    """A piece of work for the device. `state` goes waiting, running, then one of done, stopped, failed."""

    owner: str | None  # the window that asked for it; None once that is closed
    kind: str  # "drawing" or "training"
    slot: str  # a window has one drawing per slot; a new one takes the place of the old
    work: Callable[["Job"], object]
    state: str = "waiting"
    done: int = 0
    total: int = 0
    note: str = ""
    result: object = None
    error: str = ""
    stopping: bool = False
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # of a training
    run: "Run | None" = None

    @property
    def over(self) -> bool:
        return self.state in ("done", "stopped", "failed")

    def step(self, done: int, total: int) -> None:
        """Notes the progress; raises Halted if the job was told to stop."""
        self.done, self.total = done, total
        if self.stopping:
            raise Halted


class Device:
    """First come, first served, one at a time; but a drawing may pass between two steps of a training."""

    def __init__(self):
        self._wake = threading.Condition()
        self._waiting: list[Job] = []
        self.running: list[Job] = []  # a training, and the drawing that passes it
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="device", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Job:
        """Puts a job into the queue; an older drawing of the same window and slot is stopped.

        Raises:
            StudioError: if the queue is full, or this window has a training already.
        """
        with self._wake:
            for old in self.jobs():
                if old.owner == job.owner and old.slot == job.slot:
                    if job.kind == "training":
                        raise StudioError("a training of this window is under way or waits; stop it first")
                    self._stop(old)
            if len(self._waiting) >= MOST_WAITING:
                raise StudioError(f"{MOST_WAITING} are waiting for the device already; try again in a moment")
            self._waiting.append(job)
            self._wake.notify_all()
        return job

    def jobs(self) -> list[Job]:
        """All that run or wait, in this order."""
        return [*self.running, *self._waiting]

    def ahead(self, job: Job) -> int:
        """How many jobs come before this one; a drawing does not wait for trainings."""
        with self._wake:
            before = self.jobs()[: self.jobs().index(job)] if job in self._waiting else []
        return sum(job.kind == "training" or other.kind == "drawing" for other in before)

    def stop(self, job: Job) -> None:
        """Ends a job at its next step, or takes it out of the queue."""
        with self._wake:
            self._stop(job)

    def _stop(self, job: Job) -> None:
        job.stopping = True
        if job in self._waiting:
            self._waiting.remove(job)
            job.state = "stopped"

    def forget(self, owner: str) -> None:
        """A window was closed: its drawings end, its training goes on and belongs to nobody."""
        for job in self.jobs():
            if job.owner == owner:
                job.owner = None
                if job.kind == "drawing":
                    self.stop(job)

    def let_pass(self) -> None:
        """Runs the first drawing that waits, if there is one. A training calls this between its steps."""
        with self._wake:
            job = next((j for j in self._waiting if j.kind == "drawing"), None)
            if job:
                self._waiting.remove(job)
                self.running.append(job)
        if job:
            with torch.random.fork_rng():  # the training's random numbers go on as if nothing had happened
                self._run(job)

    def close(self, timeout: float = 60.0) -> None:
        """Stops everything; a training writes its checkpoint first."""
        with self._wake:
            self._closed = True
            for job in self.jobs():
                self._stop(job)
            self._wake.notify_all()
        self._thread.join(timeout)

    def _serve(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._waiting.pop(0)
                self.running.append(job)
            self._run(job)

    def _run(self, job: Job) -> None:
        """Runs a job that is in `running`; whatever happens in it, the device goes on."""
        started, end = time.monotonic(), "done"
        job.state = "running"
        try:
            job.result = job.work(job)
        except Halted:
            end = "stopped"
        except BaseException as error:  # also what is no Exception must not end the device's thread
            job.error, end = in_plain_words(error), "failed"
        with self._wake:
            self.running.remove(job)
            job.seconds, job.state = time.monotonic() - started, end


def in_plain_words(error: BaseException) -> str:
    """An error as a sentence for the page; what nobody foresaw goes to the terminal in full."""
    if isinstance(error, sdtune.DataError):
        return "the data cannot be used: " + "; ".join(error.problems)
    if isinstance(error, (ValueError, *_trainer_errors())):
        return " ".join(str(error).split())
    traceback.print_exception(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "the device's memory is full; try a smaller size, fewer pictures or a smaller batch"
    return f"something went wrong ({type(error).__name__}: {' '.join(str(error).split())[:300]}); the terminal has more"


def _trainer_errors() -> tuple:
    from .train import TrainError  # heavy, and only known once something has been trained or drawn

    return (TrainError,)


# ----------------------------------------------------------------------------------------- the library


@dataclass(frozen=True)
class Item:
    """A tuner or LoRA file. `why` says why it does not fit the base, empty if it does."""

    label: str
    path: Path
    kind: str
    why: str = ""
    base: str = ""
    trigger_words: str = ""
    megabytes: float = 0.0
    made: float = 0.0  # seconds since 1970
    details: str = ""
    preview: Path | None = None
    run: str = ""  # for a checkpoint: the label of the run it belongs to

    @property
    def fits(self) -> bool:
        return not self.why


class Library:
    """The tuner and LoRA files in some folders, by label. `version` grows whenever the listing has changed."""

    def __init__(self, folders: Sequence[Path], unet):
        self.folders, self.version, self.items = list(folders), 0, {}
        with torch.device("meta"):  # a UNet of this shape that no other thread touches
            self._unet = UNet2DConditionModel.from_config(unet.config)
        self._layers = {
            name.replace(".", "_"): (module.in_features if isinstance(module, torch.nn.Linear) else module.in_channels)
            for name, module in self._unet.named_modules()
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        }
        self._known: dict[tuple, Item] = {}
        self._lock = threading.Lock()
        self.scan()

    def scan(self) -> int:
        """Looks for new, changed and vanished files; gives the version."""
        with self._lock:
            items, known = {}, {}
            for folder in self.folders:
                for path in sorted(p for p in folder.rglob("*.safetensors") if self._listed(folder, p)):
                    try:
                        stat = path.stat()
                    except OSError:  # it vanished meanwhile
                        continue
                    label = self._label(folder, path, items)
                    key = (label, path, stat.st_mtime_ns, stat.st_size)
                    known[key] = items[label] = self._known.get(key) or self._read(label, path, stat)
            if known.keys() != self._known.keys():
                self._known, self.items = known, items
                self.version += 1
            return self.version

    def offered(self, checkpoints: bool = False) -> list[str]:
        """The labels of what fits the base: finished files, or also the checkpoints of runs."""
        return [i.label for i in self.items.values() if i.fits and (checkpoints or not i.run or self._last(i))]

    def runs(self) -> dict[str, list[str]]:
        """Run -> the labels of its checkpoints that fit the base, in order."""
        found: dict[str, list[str]] = {}
        for item in self.items.values():
            if item.run and item.fits:
                found.setdefault(item.run, []).append(item.label)
        return found

    def find(self, label: str) -> Item:
        """The file of a label; StudioError if there is none or it does not fit."""
        item = self.items.get(label) if isinstance(label, str) else None
        if item is None:
            raise StudioError(f"{str(label)[:80]!r} is not in the library (any more); choose another")
        if item.why:
            raise StudioError(f"{item.label} does not fit this base: {item.why}")
        return item

    def _last(self, item: Item) -> bool:
        """Whether a checkpoint stands for its run: the run was stopped, and this is where."""
        own = [i for i in self.items.values() if i.run == item.run]
        return item.run not in self.items and item.label == own[-1].label

    @staticmethod
    def _listed(folder: Path, path: Path) -> bool:
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts) or "tiny-sd" in parts[:1]:
            return False
        return "checkpoints" not in parts or path.name == store.FILE_NAME

    @staticmethod
    def _label(folder: Path, path: Path, taken) -> str:
        parts = path.relative_to(folder).with_suffix("").parts
        parts = parts[:-1] if path.name == store.FILE_NAME and len(parts) > 1 else parts
        if len(parts) > 2 and parts[-2] == "checkpoints":
            step = parts[-1].removeprefix("step-").lstrip("0")
            parts = (*parts[:-3], f"{parts[-3]} @ step {step}")
        label, number = "/".join(parts[-2:])[:120], 2
        while label in taken:
            label, number = f"{'/'.join(parts[-2:])[:110]} ({number})", number + 1
        return label

    def _read(self, label: str, path: Path, stat) -> Item:
        facts = {"megabytes": stat.st_size / 1e6, "made": stat.st_mtime, "run": label.partition(" @ step ")[0]}
        if " @ step " not in label:
            facts["run"] = ""
        previews = (path.with_suffix(".png"), path.with_name("preview.png"))
        facts["preview"] = next((p for p in previews[: 1 + (path.name == store.FILE_NAME)] if p.is_file()), None)
        try:
            if store.is_plain_lora(path):
                return self._read_lora(label, path, facts)
            file = store.load(path)
        except (ValueError, OSError, SafetensorError) as error:
            return Item(label, path, "not usable", why=" ".join(str(error).split()), **facts)
        why = ""
        try:
            store.check_fits(file, pipeline.expected_shapes(self._unet, file.config), path.name)
        except ValueError as error:
            shape = file.base.get("shape") or {}
            own = {k: v for k, v in self._unet.config.items() if k in shape}
            differs = [f"{k} is {v}, here {own[k]}" for k, v in shape.items() if k in own and _lists(own[k]) != v]
            why = f"made for a base of another shape ({'; '.join(differs)})" if differs else " ".join(str(error).split())
        config, training = file.config, file.training
        details = f"rank {config.rank}, on {' + '.join(config.ops)}"
        if steps := training.get("steps_done"):
            details += f"; {steps} steps on {training.get('images', '?')} pictures"
        return Item(
            label, path, kind_name(config.kind), why, str(file.base.get("name", "")), str(file.trigger_words),
            details=details, **facts,
        )  # fmt: skip

    def _read_lora(self, label: str, path: Path, facts: dict) -> Item:
        """A LoRA of another tool: its layers must be layers of this UNet, with inputs as wide."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            downs = {k: file.get_slice(k).get_shape() for k in file.keys() if re.search(r"lora(_A|[._]down)\.", k)}
        found, wrong, rank = 0, "", 0
        for key, shape in downs.items():
            if key.startswith(("text_encoder", "lora_te")):
                continue
            layer = re.sub(r"\.?(lora_A(\.\w+)?|lora[._]down)\.weight$", "", key)
            layer = re.sub(r"^(unet\.|lora_unet_)", "", layer).replace(".processor", "").replace(".", "_")
            layer = layer.removesuffix("_lora")
            width = self._layers.get(layer, self._layers.get(f"{layer}_0"))
            if width is None:
                continue
            found, rank = found + 1, shape[0]
            if width != shape[1]:
                wrong = wrong or f"its {layer} is {shape[1]} wide, this base's is {width}"
        if not downs or not found:
            wrong = "none of its layers are in this base's UNet"
        base = metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture") or ""
        trigger = metadata.get("modelspec.trigger_phrase", "")
        return Item(label, path, "LoRA", wrong, base[:200], trigger[:500], details=f"rank {rank}", **facts)


def kind_name(kind: str) -> str:
    """"res_attn" as people write it: Res-Attn."""
    short = {"lora": "LoRA", "dora": "DoRA", "ia3": "IA3"}
    return short.get(kind) or "-".join(part.capitalize() for part in str(kind).split("_"))


def _lists(value):
    return list(value) if isinstance(value, tuple) else value


def thumbnail(path: Path | None, side: int) -> str:
    """A picture as a small JPEG in a data URL, or "" if it is none. Decoded and drawn anew, so nothing hides in it."""
    try:
        image = data.open_image(path)
        image.thumbnail((side, side))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=85)
    except Exception:  # decoders raise many kinds on damaged files
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


# ------------------------------------------------------------------------------------------ the studio


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
        self.small = self.pipe.unet.num_parameters() < 1e8
        self._scheduler = self.pipe.scheduler
        own = type(self._scheduler).__name__
        self.sampler = next((n for n, (c, _) in SAMPLERS.items() if c.__name__ == own), "DDIM")
        self.device = Device()
        self.library = Library([ASSETS, self.output], self.pipe.unet)
        self._loaded: OrderedDict[tuple, str] = OrderedDict()  # (path, time, size) -> adapter, least used first
        self._count = 0
        self._sweep()

    # -------------------------------------------------------------------------------------- drawing

    def draw(self, owner: str, settings: Settings) -> Job:
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
                    files.append(write_png(folder / name, picture, settings, c, i, self._base_name()))
                columns.append((title_of(column), files))
            return Drawn(columns, settings)

        return self.device.submit(Job(owner, "drawing", "columns", work))

    def draw_grid(self, owner: str, settings: Settings, x: "Axis", y: "Axis", slot: str = "grid") -> Job:
        """Queues a grid over two axes; its result is `Drawn` with one labelled picture."""
        settings.check()
        if len(x.values) * len(y.values) > MOST_CELLS:
            many = len(x.values) * len(y.values)
            raise StudioError(f"these axes make {many} pictures; at most {MOST_CELLS} fit in one grid")
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

        def work(job: Job) -> Drawn:
            drawn = self._draw(job, shots, settings)
            rows = [drawn[i : i + len(x.values)] for i in range(0, len(drawn), len(x.values))]
            cell = min(256, max(192, self.side if settings.size is None else settings.size))
            picture = pictures.grid(rows, [_short(t, cell // 9) for t in x.titles()], y.titles(), cell)
            name = f"grid-{slug(settings.prompt)}.png"
            file = write_png(self._new_folder() / name, picture, settings, 0, 0, self._base_name(), {x.name: x.titles(), y.name: y.titles()})  # noqa: E501
            return Drawn([("grid", [file])], settings)

        return self.device.submit(Job(owner, "drawing", slot, work))

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

    def _base_name(self) -> str:
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
            raise StudioError(f"{len(files)} files were dropped; at most {MOST_FILES} at once, use a shell for more")
        folder = self.private / "drops" / secrets.token_hex(16)
        folder.mkdir(parents=True)
        problems, notes = [], []
        for file in map(Path, files):
            name = file.name.lstrip(".") or "unnamed"
            if (folder / name).exists():
                problems.append(f"{name}: two files of this name were dropped; rename one")
            else:
                shutil.copyfile(file, folder / name)
        found = data._find(folder, data._files(folder, problems), problems, notes)
        problems = [p for p in problems if ": no caption" not in p]  # those are typed in the page
        return Drop(folder, [(name, caption or "") for name, caption, _ in found], problems, notes)

    def check(self, drop: "Drop", captions: Sequence[str], resolution: int | None) -> list[str]:
        """Everything that keeps these pictures and captions from being trained on; writes them as a data set."""
        ready = drop.ready
        shutil.rmtree(ready, ignore_errors=True)
        ready.mkdir()
        lines = []
        for (name, _), caption in zip(drop.pairs, captions):
            shutil.copyfile(drop.folder / name, ready / name)
            if caption.strip():
                lines.append(json.dumps({"file_name": name, "text": caption.strip()}, ensure_ascii=False))
        (ready / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        problems = list(drop.problems)
        try:
            data.read(ready, resolution or self.side, log=lambda _: None)
        except sdtune.DataError as error:
            problems += error.problems
        return [re.sub(r": no caption, or an empty one; .*", ": no caption yet; write one beside it", p) for p in problems]

    def free_name(self, wanted: str) -> str:
        """The name of a run that does not exist yet, made of the wanted one."""
        stem = slug(wanted) or "tuner"
        names = [stem, *(f"{stem}-{i}" for i in range(2, 1000))]
        return next(n for n in names if not (self.output / n).exists() and not (self.output / "data" / n).exists())

    def keep(self, drop: "Drop", name: str) -> str:
        """Moves a checked data set to where a training, now or from a shell, finds it; gives the folder."""
        folder = self.output / "data" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(drop.ready, folder)
        return str(folder)

    def train(self, owner: str, run: Run) -> Job:
        """Queues a training; its result is the tuner's file, also when it is stopped after its first step."""

        def work(job: Job) -> Path:
            from .train import Stopped, fit

            job.total = run.config.steps

            def on_step(done: int, loss: float) -> bool:
                job.done = done
                job.losses.append(float(loss))
                self.device.let_pass()
                return job.stopping

            if job.stopping:
                raise Halted
            try:
                return fit(run.config, run.tuner, on_step).tuner
            except Stopped:
                job.note = "stopped"
                kept = sorted((Path(run.config.output) / "checkpoints").glob(f"step-*/{store.FILE_NAME}"))
                return kept[-1]
            finally:
                self.library.scan()

        return self.device.submit(Job(owner, "training", "training", work, total=run.config.steps, run=run))

    # -------------------------------------------------------------------------------------- library

    def add_file(self, source: str | Path) -> str:
        """Copies a dropped .safetensors file into the library."""
        source = Path(source)
        if source.suffix.lower() != ".safetensors":
            raise StudioError(f"{source.name} is no .safetensors file; others may run code when they are read")
        name = slug(source.stem) or "file"
        target = self.output / "uploads" / f"{name}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and target.read_bytes() != source.read_bytes():
            target = target.with_stem(f"{name}-{secrets.token_hex(2)}")
        shutil.copyfile(source, target)
        self.library.scan()
        return next((i.label for i in self.library.items.values() if i.path == target), target.stem)

    def add_from_hub(self, name: str) -> str:
        """Fetches a tuner or LoRA from a hub repository into the library."""
        name = name.strip()
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
            raise StudioError(f"{name[:80]!r} is not a hub id; expected owner/name")
        from huggingface_hub import HfApi, hf_hub_download

        folder = self.output / "hub" / name.replace("/", "--")
        try:
            files = HfApi().model_info(name, files_metadata=True).siblings or []
            files = [f for f in files if f.rfilename.endswith(".safetensors") and "/" not in f.rfilename]
            usual = [f for f in files if f.rfilename in (store.FILE_NAME, "pytorch_lora_weights.safetensors")]
            files = usual or files
            if len(files) != 1:
                there = ", ".join(f.rfilename for f in files[:5]) or "none"
                raise StudioError(f"expected one .safetensors file in {name}; found {there}")
            if (files[0].size or 0) > 2e9:
                raise StudioError(f"{files[0].rfilename} of {name} has {files[0].size / 1e9:.1f} GB: no tuner or LoRA")
            hf_hub_download(name, files[0].rfilename, local_dir=folder)
        except StudioError:
            raise
        except Exception as error:  # the hub client raises many kinds
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise StudioError(f"the hub does not give {name}: {reason}") from error
        self.library.scan()
        return name


@dataclass(frozen=True)
class Drop:
    """Dropped training files: (picture, caption found for it), and what is wrong apart from missing captions."""

    folder: Path
    pairs: list[tuple[str, str]]
    problems: list[str]
    notes: list[str]

    @property
    def ready(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}-ready")


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
            raise StudioError(f"{name[:40]!r} is no axis; expected one of {', '.join(Axis.KINDS)}")
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
                    raise StudioError(f"{part[:20]!r} is no {name}; expected {kind}s with commas between") from None
                values.append(number)
        if not values:
            raise StudioError(f"the axis {name} has no values; give at least one")
        return Axis(name, values)

    def titles(self) -> list[str]:
        if not self.name:
            return [""]
        if self.name in ("tuner", "checkpoint"):
            return [value or "base" for value in self.values]
        return [str(v) if self.name == "prompt" else f"{self.name} {v:g}" if v < 1e5 else f"seed {v}" for v in self.values]


def title_of(column: dict[str, float]) -> str:
    """The title of a column: base, or its adapters with their weights where these are not 1."""
    return " + ".join(n if w == 1 else f"{n} × {w:g}" for n, w in column.items()) or "base"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def command(run: Run) -> str:
    """The line for a shell that trains the same."""
    import dataclasses
    import shlex

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
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) and not Path(text).exists():
        return text
    raise StudioError(f"{text[:80]!r} cannot be trained on from here; expected {own}, tiny-sd or a hub id (owner/name)")


_ = bases
