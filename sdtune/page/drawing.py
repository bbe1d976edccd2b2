"""Draws images for the page: adapters side by side in columns, or a grid over two axes."""

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import sdtune

from ..adapters import api
from ..bases.properties import native_size
from ..bases.text_encoding import CHUNK
from ..inference import grids, prompts
from .errors import PageError
from .files import AdapterFiles
from .grid_axes import Axis, make_cells
from .output_folder import OutputFolder
from .png_settings import Settings, make_slug, write_png
from .queue import Job, Queue
from .samplers import SAMPLERS, sampler_of

MAX_CELLS = 100  # of a grid
MAX_LOADED = 12  # adapters that stay loaded, unless one drawing needs more


@dataclass(frozen=True)
class Drawn:
    """The result of a drawing: for each column its title and PNG files. A grid is one column with one file."""

    columns: list[tuple[str, list[Path]]]
    settings: Settings


class Drawings:
    """Submits drawings to the queue. Adapters are named by their label, never by a path that a browser sends."""

    def __init__(self, pipe, base_name: str, queue: Queue, files: AdapterFiles, output: OutputFolder):
        self.pipe, self.base_name = pipe, base_name
        self.queue, self.files, self.output = queue, files, output
        self.side = native_size(pipe)[0]
        self.sampler = sampler_of(pipe.scheduler)
        self._scheduler = pipe.scheduler
        self._loaded: OrderedDict[tuple, str] = OrderedDict()  # (path, time, size) -> adapter, oldest use first
        self._load_count = 0

    def draw_columns(self, window: str, settings: Settings, slot: str = "columns") -> Job:
        """Submits a drawing of adapters side by side; the job's result is a `Drawn`.

        Raises:
            ValueError: if a setting is out of range, or an adapter is missing or does not fit.
        """
        settings.check()
        self._require_space(settings, len(settings.columns) * settings.images)
        for label in (label for column in settings.columns for label in column):
            self.files.get(label)

        def work(job: Job) -> Drawn:
            cells = [
                sdtune.Cell(
                    settings.prompt,
                    settings.seed + i,
                    column,
                    settings.guidance,
                    settings.negative_prompt,
                    settings.width,
                    settings.height,
                    settings.clip_skip,
                )
                for column in settings.columns
                for i in range(settings.images)
            ]
            images = iter(self._draw(job, cells, settings))
            folder, columns = self.output.new_image_folder(), []
            for c, column in enumerate(settings.columns):
                title, paths = column_title(column), []
                for i in range(settings.images):
                    name = f"{make_slug(settings.prompt)}-{settings.seed + i}-{c + 1}-{make_slug(title)}.png"
                    paths.append(write_png(folder / name, next(images), settings, c, i, self.base_name))
                columns.append((title, paths))
            return Drawn(columns, settings)

        return self.queue.submit(Job(window, "drawing", slot, work))

    def draw_grid(self, window: str, settings: Settings, across: Axis, down: Axis) -> Job:
        """Submits a grid over two axes; the job's result is a `Drawn` with one labelled image.

        Raises:
            ValueError: as `draw_columns`, or if the grid has more than MAX_CELLS cells.
        """
        settings.check()
        count = len(across.values) * len(down.values)
        if count > MAX_CELLS:
            raise PageError(f"These axes make a grid of {count} images; at most {MAX_CELLS} are allowed.")
        self._require_space(settings, count)
        cells = make_cells(settings, across, down)
        for label in dict.fromkeys(label for cell in cells for label in cell.adapters):
            self.files.get(label)
        if across.chooses_adapter or down.chooses_adapter:  # no single adapter belongs to the whole grid
            settings = dataclasses.replace(settings, columns=[{}])

        def work(job: Job) -> Drawn:
            images = self._draw(job, cells, settings)
            rows = [images[i : i + len(across.values)] for i in range(0, len(images), len(across.values))]
            cell_side = min(256, max(192, settings.width or self.side))
            grid = grids.make_grid(rows, across.titles(), down.titles(), cell_side)
            path = self.output.new_image_folder() / f"grid-{make_slug(settings.prompt)}.png"
            titles = {axis.name: axis.titles() for axis in (across, down)}
            write_png(path, grid, settings, 0, 0, self.base_name, titles)
            return Drawn([("grid", [path])], settings)

        return self.queue.submit(Job(window, "drawing", "grid", work))

    def _require_space(self, settings: Settings, images: int) -> None:
        pixels = images * (settings.width or self.side) * (settings.height or self.side)
        self.output.require_space(3 * pixels, f"A drawing of {images} images")

    def default_columns(self) -> list[dict[str, float]]:
        """The columns of a new window: the base, a LoRA and a tuner, of these the files that exist."""
        files = [self.files.by_label[label] for label in self.files.labels()]
        shipped = [file for file in files if file.path.parent == self.files.folders[0]] or files
        loras = [{file.label: 1.0} for file in shipped if file.kind == "LoRA"]
        tuners = [{file.label: 1.0} for file in shipped if file.kind != "LoRA"]
        return [{}, *loras[:1], *tuners[:1]]

    def _draw(self, job: Job, cells: Sequence[sdtune.Cell], settings: Settings) -> list[Image.Image]:
        """Draws cells whose adapters are labels. Only the thread of the queue may call this."""
        names = self._load_adapters(dict.fromkeys(label for cell in cells for label in cell.adapters))
        cells = [
            dataclasses.replace(cell, adapters={names[label]: weight for label, weight in cell.adapters.items()})
            for cell in cells
        ]
        chunks = max(prompts.count_chunks(self.pipe, cell.prompt) for cell in cells)
        if chunks > 1:
            job.note = f"The prompt has more than {CHUNK} tokens: it is read in {chunks} chunks of {CHUNK}."
        scheduler, options = SAMPLERS[settings.sampler or self.sampler]
        self.pipe.scheduler = scheduler.from_config(self._scheduler.config, **options)
        try:
            return sdtune.draw_cells(self.pipe, cells, steps=settings.steps, on_step=job.report_progress)
        finally:
            self.pipe.scheduler = self._scheduler

    def _load_adapters(self, labels) -> dict[str, str]:
        """Loads adapter files that are not loaded yet, and returns label -> name of the adapter in the pipeline.

        If more than MAX_LOADED are loaded, those that were not used for the longest time are removed.
        """
        names = {}
        for label in labels:
            path = self.files.get(label).path
            stat = path.stat()
            key = (path, stat.st_mtime_ns, stat.st_size)
            if key not in self._loaded:
                self._load_count += 1
                self._loaded[key] = api.attach_file(self.pipe, path, f"a{self._load_count}")
            self._loaded.move_to_end(key)
            names[label] = self._loaded[key]
        while len(self._loaded) > max(MAX_LOADED, len(names)):
            self.pipe.delete_adapters(self._loaded.popitem(last=False)[1])
        return names


def column_title(column: dict[str, float]) -> str:
    """The title of a column: "base", or its adapters, with their weights where these are not 1."""
    return " + ".join(n if w == 1 else f"{n} × {w:g}" for n, w in column.items()) or "base"
