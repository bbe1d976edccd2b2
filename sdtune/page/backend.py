"""All that the page can do, without the page: loads the base, and holds the queue, the files and the jobs."""

from pathlib import Path

import torch

import sdtune

from ..bases.properties import default_guidance
from .add_files import add_from_hub, add_upload
from .datasets import Datasets
from .drawing import Drawings
from .files import AdapterFiles
from .output_folder import OutputFolder
from .queue import Queue
from .training_jobs import ASSETS, Trainings


class Backend:
    """The loaded base and what the windows share.

    Nothing here trusts a browser: adapters are named by their label, never by a path, and files are written below the
    output folder only.
    """

    def __init__(self, base: str = "tiny-sd", output: str | Path = "output"):
        on_gpu = torch.cuda.is_available()
        self.base, self.base_name = base, Path(base).name or base
        self.pipe = sdtune.load_base(base, torch.float16 if on_gpu else torch.float32)
        self.pipe.to("cuda" if on_gpu else "cpu")
        self.guidance = default_guidance(self.pipe)
        self.output = OutputFolder(output)
        self.queue = Queue()
        self.files = AdapterFiles([ASSETS, self.output.path], self.pipe.unet, self.pipe.text_encoder)
        self.drawings = Drawings(self.pipe, self.base_name, self.queue, self.files, self.output)
        self.side = self.drawings.side
        self.datasets = Datasets(self.output, self.pipe.tokenizer, self.side)
        self.trainings = Trainings(base, self.queue, self.files, self.datasets, self.output)

    def add_upload(self, source: str | Path) -> str:
        """As `add_files.add_upload`."""
        return add_upload(source, self.files, self.output)

    def add_from_hub(self, repository: str) -> str:
        """As `add_files.add_from_hub`."""
        return add_from_hub(repository, self.files, self.output)

    def close_window(self, window: str) -> None:
        """Stops the drawings of a closed window and keeps its training."""
        self.queue.close_window(window)
        self.trainings.close_window(window)

    def describe_activity(self, window: str) -> tuple[str, bool]:
        """A few words about what runs and waits, for one window, and whether anything does."""
        jobs = self.queue.jobs()
        if not jobs:
            return "ready", False
        job = next((job for job in reversed(jobs) if job.state == "running"), jobs[0])
        whose = "your" if job.window == window else "another window's"
        text = f"{whose} {job.kind}" + (f", {job.done} of {job.total}" if job.total else "")
        waiting = sum(job.state == "waiting" for job in jobs)
        return text + (f" · {waiting} waiting" if waiting else ""), True
