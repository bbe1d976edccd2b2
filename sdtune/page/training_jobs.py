"""Trainings that the page starts: from the form to a configuration, a job in the queue, and its shell command."""

import dataclasses
import gc
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters import tuner_file
from ..training import checkpoints, dataset
from ..training.buckets import AspectBuckets
from ..training.config import TrainConfig
from ..training.errors import Stopped
from ..tuners.config import TunerConfig, fields_of
from .datasets import Datasets, UploadedImages
from .errors import JobStopped, PageError
from .files import AdapterFiles
from .output_folder import OutputFolder
from .queue import Job, Queue

ASSETS = Path(__file__).parents[2] / "assets"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_TUNER_NUMBERS = ("rank", "num_heads", "length")
_NUMBERS = (*_TUNER_NUMBERS, "batch_size", "resolution", "preview_every", "checkpoint_every", "seed",
            "clip_skip", "keep_tokens", "max_tokens", "keep_last")  # fmt: skip


@dataclass(frozen=True)
class TrainingRun:
    """A training that the page was asked for."""

    config: TrainConfig
    tuner: TunerConfig

    @property
    def name(self) -> str:
        return Path(self.config.output).name

    def previews(self) -> list[Path]:
        """The previews that it has drawn so far, in their order."""
        output = Path(self.config.output)
        return [*sorted((output / "previews").glob("step-*.png")), *output.glob("preview.png")]

    def last_checkpoint(self) -> Path:
        """The tuner file of its last checkpoint."""
        return sorted((Path(self.config.output) / "checkpoints").glob(f"step-*/{tuner_file.FILE_NAME}"))[-1]

    def shell_command(self) -> str:
        """The command that trains the same in a shell."""
        words = ["accelerate", "launch", "train_anime.py"]
        for part in (self.config, self.tuner):
            for field in dataclasses.fields(part):
                value = getattr(part, field.name)
                has_value = field.default is not dataclasses.MISSING
                if value is None or value == (field.default if has_value else field.default_factory()):
                    continue
                words.append(f"--{field.name}")
                words += map(str, value) if isinstance(value, list) else [] if value is True else [str(value)]
        return shlex.join(words)


class Trainings:
    """Plans trainings and submits them to the queue. Each window shows one training: the last that it started."""

    def __init__(self, base: str, queue: Queue, files: AdapterFiles, datasets: Datasets, output: OutputFolder):
        self.base = base
        self.queue, self.files, self.datasets, self.output = queue, files, datasets, output
        self._by_window: dict[str, Job] = {}
        # the last training whose window was closed before its end; at the start an unfinished one on the disk
        self._without_window: Job | None = self._find_unfinished()

    def plan(
        self, uploaded: UploadedImages | None, captions: Sequence[str], source: str, name: str, kind: str, steps,
        more: dict,
    ) -> TrainingRun:  # fmt: skip
        """The training that the form describes.

        Args:
            source: "own" for the uploaded images with these captions, "bundled" for the anime pairs.
            more: the other fields of the form, by their names in the configurations; an empty one means the default.

        Raises:
            ValueError: if a setting is out of range.
        """
        zero_means_default = ("learning_rate", "resolution", "keep_last")
        more = {k: v for k, v in more.items() if v not in (None, "") and (v or k not in zero_means_default)}
        more |= {k: int(more[k]) for k in _NUMBERS if k in more}
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
        more["data"] = str(self.datasets.folder_for(uploaded, captions, name)) if own else bundled_data()
        output = self.output.path / self.output.free_run_name(name)
        return TrainingRun(TrainConfig(output=str(output), **more), tuner)

    def start(self, window: str, run: TrainingRun) -> Job:
        """Submits a training; the job's result is the tuner's file, also if it is stopped after its first step.

        Raises:
            PageError: if its name is taken by now, or this window has another training that runs or waits.
        """
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
        config = dataclasses.replace(stopped.run.config, resume=True)
        job = self._new_job(window, TrainingRun(config, stopped.run.tuner))
        job.losses, job.resumable, job.result = list(stopped.losses), True, stopped.result
        return self._submit(job)

    def shown_in(self, window: str) -> Job | None:
        """The training that a window shows: its own last one, else one that continues after its window was closed."""
        if window not in self._by_window and self._without_window and self._without_window.finished:
            # the first window that shows its end keeps it
            self._by_window[window], self._without_window = self._without_window, None
        return self._by_window.get(window) or self._without_window

    def close_window(self, window: str) -> None:
        """Keeps the training of a closed window for other windows, if it has not finished."""
        job = self._by_window.pop(window, None)
        if job and (job.resumable or not job.finished):
            self._without_window = job

    def _find_unfinished(self) -> Job | None:
        """The training below the output folder that stopped last at a checkpoint, as a job that can be resumed."""
        found = []
        for folder in {path.parent for path in self.output.path.glob("*/checkpoints")}:
            steps = checkpoints.list_checkpoints(folder)
            if steps and not (folder / tuner_file.FILE_NAME).exists():
                found.append((steps[-1].stat().st_mtime, folder, steps[-1]))
        for _, folder, last in sorted(found, reverse=True):
            try:
                settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
                known = {f.name for f in dataclasses.fields(TrainConfig)}
                values = {**checkpoints.BEFORE_OPTIONS, **settings["train"]}
                config = TrainConfig(**{k: v for k, v in values.items() if k in known}, output=str(folder))
                run = TrainingRun(config, TunerConfig(**settings["tuner"]))
                losses = json.loads((last / "state.json").read_text(encoding="utf-8"))["losses"]
            except (OSError, ValueError, TypeError, KeyError):  # not a run, or a damaged one
                continue
            return Job(
                None, "training", "training", self._train, state="stopped", done=len(losses), total=config.steps,
                losses=losses, run=run, resumable=True, result=last / tuner_file.FILE_NAME,
            )  # fmt: skip
        return None

    def first_prompt(self, job: Job) -> str:
        """A prompt to draw with the trained tuner: the first caption with the trigger words; "" if there is none."""
        config = job.run.config
        try:
            pairs = dataset.read_pairs(config.data, AspectBuckets(self.datasets.side), log=lambda _: None)
        except ValueError:
            return ""
        return f"{config.trigger_words} {pairs[0].caption}".strip()

    def _new_job(self, window: str, run: TrainingRun) -> Job:
        return Job(window, "training", "training", self._train, total=run.config.steps, run=run)

    def _submit(self, job: Job) -> Job:
        self._by_window[job.window] = self.queue.submit(job)
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
        finally:
            gc.collect()  # reference cycles would keep the models of the trainer in memory
            self.files.scan()


def bundled_data() -> str:
    """The path of the bundled anime pairs: the relative default where that is the same folder."""
    default = TrainConfig.data
    return default if Path(default).resolve() == ASSETS / "anime" else str(ASSETS / "anime")


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
