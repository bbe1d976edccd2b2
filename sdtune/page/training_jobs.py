"""Trainings that the page starts: from the form to a configuration, a job in the queue, and its shell command."""

import dataclasses
import functools
import gc
import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from ..adapters import api, tuner_file
from ..bases.single_file import CONFIGS
from ..training import caption_variants, checkpoints, config_file, dataset, setup
from ..training.buckets import AspectBuckets
from ..training.config import DEFAULT_KIND, TrainConfig
from ..training.errors import Stopped
from ..tuners.config import TunerConfig, fields_of
from .datasets import Datasets, UploadedImages
from .errors import JobStopped, PageError
from .files import AdapterFiles
from .output_folder import OutputFolder
from .queue import Job, Queue

ASSETS = Path(__file__).parents[2] / "assets"
MAX_STEPS, MAX_PROMPTS = 100_000, 64
FETCHED_BASE = 6e9  # bytes of a Stable Diffusion 1.x or 2.x in fp32, with its VAE and text encoder
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_TUNER_NUMBERS = ("rank", "num_heads", "length")
_NUMBERS = (*_TUNER_NUMBERS, "batch_size", "resolution", "preview_every", "checkpoint_every", "seed",
            "clip_skip", "keep_tokens", "max_tokens", "keep_last", "heldout")  # fmt: skip


@dataclass(frozen=True)
class TrainingRun:
    """A training that the page was asked for."""

    config: TrainConfig
    tuner: TunerConfig
    heldout: int = 0  # of the uploaded images, those that are not trained on

    @property
    def name(self) -> str:
        return Path(self.config.output).name

    def previews(self) -> list[Path]:
        """The previews that it has drawn so far, in their order."""
        output = Path(self.config.output)
        return [*sorted((output / "previews").glob("step-*.png")), *output.glob("preview.png")]

    def last_checkpoint(self) -> Path:
        """The tuner file of its last checkpoint."""
        return checkpoints.list_checkpoints(Path(self.config.output))[-1] / tuner_file.FILE_NAME

    def shell_command(self) -> str:
        """The command that trains the same in a shell."""
        script = ASSETS.parent / "train_anime.py"  # the other paths are relative to the folder of this process, too
        words = ["accelerate", "launch", script.name if Path(script.name).exists() else str(script)]
        defaults = asdict(TrainConfig()) | asdict(TunerConfig(self.tuner.kind)) | {"kind": DEFAULT_KIND}
        for name, value in (asdict(self.config) | asdict(self.tuner)).items():
            if value is not None and value != defaults[name]:
                words += [f"--{name}"] if value is True else config_file.as_flags({name: value})
        return shlex.join(words)


class Trainings:
    """Plans trainings and submits them to the queue. Each window shows one training: the last that it started."""

    def __init__(self, base: str, queue: Queue, files: AdapterFiles, datasets: Datasets, output: OutputFolder):
        self.base = base
        self.queue, self.files, self.datasets, self.output = queue, files, datasets, output
        self._by_window: dict[str, Job] = {}
        # trainings whose window was closed before their end; at the start the unfinished ones on the disk
        self._without_window: list[Job] = self._find_unfinished()

    def plan(
        self, uploaded: UploadedImages | None, captions: Sequence[str], source: str, name: str, kind: str, steps,
        more: dict,
    ) -> TrainingRun:  # fmt: skip
        """The training that the form describes.

        Args:
            source: "own" for the uploaded images with these captions, "bundled" for the anime pairs.
            more: the other fields of the form, by their names in the configurations; an empty one means the default.
                "heldout" is how many of the uploaded images are not trained on.

        Raises:
            ValueError: if a setting is out of range, or of a kind that the page's own form never sends.
        """
        try:
            return self._plan(uploaded, captions, source, name, kind, steps, more)
        except (TypeError, AttributeError, OverflowError) as error:
            raise PageError(
                f"A field of the form holds a value of another kind ({error}). Load the page again."
            ) from error

    def _plan(self, uploaded, captions, source: str, name: str, kind: str, steps, more: dict) -> TrainingRun:
        zero_means_default = ("learning_rate", "resolution", "keep_last")
        more = {k: v for k, v in more.items() if v not in (None, "") and (v or k not in zero_means_default)}
        more |= {k: int(more[k]) for k in _NUMBERS if k in more}
        heldout = more.pop("heldout", 0)
        tuner = {k: more.pop(k) for k in ("ops", *_TUNER_NUMBERS) if k in more}
        tuner = TunerConfig(kind=kind, **{k: v for k, v in tuner.items() if k in fields_of(kind)})
        if "init" in more:  # a label of the list of files, never a path that a browser sends
            more["init"] = str(self.files.get(more["init"]).path)
            tuner = tuner_file.load(more["init"]).config
        prompts = [line.strip() for line in more.pop("preview_prompts", "").splitlines()]
        more["preview_prompts"] = [prompt for prompt in prompts if prompt]
        more["base"] = check_base(more.get("base"), self.base)
        if steps is not None:
            more["steps"] = int(steps)
        own = source == "own"
        more["data"] = str(self.datasets.folder_for(uploaded, captions, name, heldout)) if own else bundled_data()
        output = self.output.path / self.output.free_run_name(name)
        return TrainingRun(TrainConfig(output=str(output), **more), tuner, heldout)

    def start(self, window: str, run: TrainingRun) -> Job:
        """Submits a training; the job's result is the tuner's file, also if it is stopped after its first step.

        Raises:
            PageError: if its name is taken by now, this window has another training that runs or waits, or what it
                writes does not fit on the disk.
        """
        self._check_size(run)
        folder = Path(run.config.output)
        try:
            folder.mkdir(parents=True)  # this reserves the name
        except FileExistsError:
            raise PageError(f"Another training has just taken the name {run.name}. Click on Train again.") from None
        try:
            return self._submit(self._new_job(window, run))
        except PageError:
            folder.rmdir()
            raise

    def resume(self, window: str) -> Job:
        """Submits the rest of the stopped training that a window shows.

        Raises:
            PageError: if there is none, or this window has another training that runs or waits.
        """
        stopped = self.shown_in(window)
        if stopped is None or not stopped.resumable:
            raise PageError("There is no stopped training to resume. Click on Train to start a new one.")
        self._check_size(stopped.run, len(stopped.losses))
        config = dataclasses.replace(stopped.run.config, resume=True)
        job = self._new_job(window, TrainingRun(config, stopped.run.tuner))
        job.losses, job.resumable, job.result = list(stopped.losses), True, stopped.result
        return self._submit(job)

    def shown_in(self, window: str) -> Job | None:
        """The training that a window shows: its own last one, else one that continues after its window was closed."""
        last = self._without_window[-1] if self._without_window else None
        if window not in self._by_window and last and last.finished:
            self._by_window[window] = self._without_window.pop()  # the first window that shows its end keeps it
        return self._by_window.get(window) or last

    def unfinished(self, window: str) -> dict[str, Job]:
        """The stopped trainings that can be resumed besides the one that a window shows, by name, the last first."""
        return {job.run.name: job for job in reversed(self._without_window) if job.finished and job.resumable}

    def choose(self, window: str, name: str) -> None:
        """Makes a window show a stopped training.

        Raises:
            PageError: if there is none of this name (any more), or the window's own training has not finished.
        """
        own, job = self._by_window.get(window), self.unfinished(window).get(name)
        if job is None:
            raise PageError(f"There is no stopped training named {str(name)[:80]!r} (any more).")
        if own and not own.finished:
            raise PageError("This window has a training that runs or waits. Stop it first.")
        self._without_window.remove(job)
        if own and own.resumable:
            self._without_window.append(own)
        self._by_window[window] = job

    def close_window(self, window: str) -> None:
        """Keeps the training of a closed window for other windows, if it has not finished."""
        job = self._by_window.pop(window, None)
        if job and (job.resumable or not job.finished):
            self._without_window.append(job)

    def _find_unfinished(self) -> list[Job]:
        """The trainings below the output folder that stopped at a checkpoint, as jobs, the last at the end."""
        found, jobs = [], []
        for folder in {path.parent for path in self.output.path.glob("*/checkpoints")}:
            if steps := _unfinished_checkpoints(folder):
                found.append((steps[-1].stat().st_mtime, folder, steps[-1]))
        for _, folder, last in sorted(found):
            try:
                settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
                known = {f.name for f in dataclasses.fields(TrainConfig)}
                values = {**checkpoints.BEFORE_OPTIONS, **settings["train"]}
                config = TrainConfig(**{k: v for k, v in values.items() if k in known}, output=str(folder))
                run = TrainingRun(config, TunerConfig(**settings["tuner"]))
                state = json.loads((last / "state.json").read_text(encoding="utf-8"))
                losses = [float(loss) for loss in state["losses"]]
            except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):  # damaged, or no run
                continue
            jobs.append(Job(
                None, "training", "training", self._train, state="stopped", done=len(losses), total=config.steps,
                losses=losses, run=run, resumable=True, result=last / tuner_file.FILE_NAME,
            ))  # fmt: skip
        return jobs

    def first_prompt(self, job: Job) -> str:
        """A prompt to draw with the trained tuner: the first caption with the trigger words; "" if there is none."""
        config = job.run.config
        try:
            pairs = dataset.read_pairs(config.data, AspectBuckets(self.datasets.side), log=lambda _: None)
        except ValueError:
            return ""
        return caption_variants.first_text(pairs[0], config.trigger_words)

    def _check_size(self, run: TrainingRun, done: int = 0) -> None:
        """Raises a PageError for a training that is too long, or that would fill the disk with what it writes.

        Args:
            done: the steps that it has behind it.
        """
        config, steps = run.config, run.config.steps - done
        if config.steps > MAX_STEPS:
            raise PageError(
                f"{config.steps:,} steps are too many here; the page trains at most {MAX_STEPS:,}. For more, run "
                "train_anime.py in a shell."
            )
        if len(config.preview_prompts) > MAX_PROMPTS:
            raise PageError(
                f"There are {len(config.preview_prompts):,} preview prompts; at most {MAX_PROMPTS} can be drawn."
            )
        needed = 0.0
        if config.base == self.base:
            unet = self.files.unet
        else:  # a base that may have to be fetched, about whose size nothing is known but that it is a Stable Diffusion
            unet, needed = sd15_unet(), FETCHED_BASE
        shapes = api.expected_shapes(unet, run.tuner).values()
        weights = torch.empty(sum(math.prod(shape) for shape in shapes), device="meta")
        kept = steps // config.checkpoint_every + 1
        kept = min(kept, config.keep_last or kept)
        needed += (kept + 1) * setup.checkpoint_bytes(weights, config)
        side = config.resolution or self.datasets.side
        previews = steps // config.preview_every + 1 if config.preview_every else 1
        needed += previews * 3 * (len(config.preview_prompts) or 4) * 3 * side**2  # base, tuned and true image of each
        checkpoints_of = f"{steps:,} steps with a checkpoint after each {config.checkpoint_every:,}"
        self.output.require_space(needed, f"A training of {checkpoints_of}")

    def _new_job(self, window: str, run: TrainingRun) -> Job:
        return Job(window, "training", "training", self._train, total=run.config.steps, run=run)

    def _submit(self, job: Job) -> Job:
        before = self._by_window.get(job.window)
        self._by_window[job.window] = self.queue.submit(job)
        if before and before.resumable and before.run.name != job.run.name:
            self._without_window.append(before)  # it can still be chosen and resumed
        return job

    def _train(self, job: Job) -> Path:
        """Runs a training in the thread of the queue and returns the tuner's file."""
        from ..training.fit import fit  # heavy, and only needed here

        def on_step(done: int, loss: float) -> bool:
            job.done = done
            job.losses.append(float(loss))
            self.queue.run_waiting_drawing()
            return job.stop_requested

        if job.stop_requested:
            raise JobStopped
        try:
            result = fit(job.run.config, job.run.tuner, on_step)
            job.resumable = False
            return result.tuner
        except Stopped:
            job.resumable = True
            return job.run.last_checkpoint()
        except Exception:  # such as a full disk
            if kept := _unfinished_checkpoints(Path(job.run.config.output)):
                job.resumable, job.result = True, kept[-1] / tuner_file.FILE_NAME
                job.done = checkpoints.step_of(kept[-1])
                del job.losses[job.done :]
            raise
        finally:
            gc.collect()  # reference cycles would keep the models of the trainer in memory
            self.files.scan()


def _unfinished_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run that has no result yet."""
    return [] if (output / tuner_file.FILE_NAME).exists() else checkpoints.list_checkpoints(output)


def bundled_data() -> str:
    """The path of the bundled anime pairs: the relative default where that is the same folder."""
    default = TrainConfig.data
    return default if Path(default).resolve() == ASSETS / "anime" else str(ASSETS / "anime")


@functools.cache
def sd15_unet() -> UNet2DConditionModel:
    """The UNet of Stable Diffusion 1.5 without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / "sd15/unet"))


def check_base(text: str | None, loaded: str) -> str:
    """The base to train on: the loaded one, tiny-sd or a hub id. Paths are refused, because they are the server's.

    Raises:
        PageError: for anything else.
    """
    text = (text or loaded).strip()
    if text in (loaded, "tiny-sd"):
        return text
    if HUB_ID.fullmatch(text) and not Path(text).exists():
        return text
    raise PageError(f"The page cannot train on {text[:80]!r}. Choose {loaded}, tiny-sd or a hub id such as owner/name.")
