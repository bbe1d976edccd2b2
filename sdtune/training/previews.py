"""Previews: images that the tuner in training draws next to those of the base, and a check of the saved file."""

from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image

from ..adapters import api
from ..bases import load
from ..inference import compare, grids
from .errors import TrainError


class Previews:
    """Draws the preview prompts, prompt number i from the noise of seed i.

    Args:
        pipe: the pipeline whose UNet is trained.
        adapter_name: of the tuner in that UNet.
        true_images: the image that belongs to each prompt, for comparison; empty if there are none.
        guidance: guidance scale.
        steps: sampling steps.
        shapes: width and height of the image of each prompt, in pixels.
        clip_skip: with which the tuner is trained.
    """

    def __init__(
        self, pipe, adapter_name: str, accelerator: Accelerator, prompts: list[str], true_images: list[Image.Image],
        *, guidance: float, steps: int, shapes: list[tuple[int, int]], clip_skip: int,
    ):  # fmt: skip
        self.pipe, self.adapter_name, self.accelerator = pipe, adapter_name, accelerator
        self.prompts, self.true_images = prompts, true_images
        self.guidance, self.steps, self.shapes, self.clip_skip = guidance, steps, shapes, clip_skip
        self.base_images: list[Image.Image] = []  # drawn once, for the first grid

    def draw_grid(self, path: Path, title: str) -> list[Image.Image]:
        """Writes a grid with a row for each prompt: base, tuner, true image. Returns the images of the tuner.

        Args:
            title: of the column of the tuner.
        """
        tuned = self._draw(self.pipe, {self.adapter_name: 1.0})
        self.base_images = self.base_images or self._draw(self.pipe, {})
        columns, titles = [self.base_images, tuned], ["base", title]
        if self.true_images:
            columns, titles = [*columns, self.true_images], [*titles, "true picture"]
        path.parent.mkdir(parents=True, exist_ok=True)
        grids.write_png(grids.make_grid([list(row) for row in zip(*columns)], titles, self.prompts), path)
        return tuned

    def verify_file(self, path: Path, base: str, expected: Image.Image) -> float:
        """Checks that a fresh pipeline with the tuner file draws the first preview again.

        Args:
            expected: the first image that `draw_grid` has returned.

        Returns:
            The mean difference of the two images in grey levels of 255.

        Raises:
            TrainError: if the file changes nothing or draws something else.
        """
        dtype, fresh = self.pipe.unet.dtype, load.load_base(base)
        api.attach_file(fresh, path, self.adapter_name)
        fresh.to(self.accelerator.device)
        fresh.unet.to(dtype)
        (drawn,) = self._draw(fresh, {self.adapter_name: 1.0}, 1)
        difference = grids.mean_difference(drawn, expected)
        from_base = grids.mean_difference(drawn, self.base_images[0])
        if from_base == 0:
            raise TrainError(f"{path} was written, but it changes nothing: a fresh pipeline draws the base's picture")
        rounding = 0.0 if dtype == torch.float32 else 2.0  # in half precision a batch of one is rounded differently
        if difference > 0.2 * from_base + rounding:
            raise TrainError(
                f"{path} was written, but a fresh pipeline does not draw the preview with it: it differs by "
                f"{difference:.2f} grey levels, and from the base's picture by {from_base:.2f}"
            )
        return difference

    def _draw(self, pipe, adapters: dict[str, float], count: int | None = None) -> list[Image.Image]:
        """The images of the first `count` prompts, or of all."""
        cells = [
            compare.Cell(prompt, i, adapters, self.guidance, width=width, height=height, clip_skip=self.clip_skip)
            for i, (prompt, (width, height)) in enumerate(zip(self.prompts[:count], self.shapes))
        ]
        with self.accelerator.autocast():
            return compare.draw_cells(pipe, cells, steps=self.steps, title="preview")


@contextmanager
def evaluation_mode(pipe, device: torch.device):
    """For the length of a `with`: all models on the device, no dropout, and the random state for training unchanged."""
    random_state = torch.get_rng_state()
    set_training_mode(pipe.unet, False)
    for model in (pipe.vae, pipe.text_encoder):
        model.to(device)
    try:
        yield
    finally:
        set_training_mode(pipe.unet, True)
        for model in (pipe.vae, pipe.text_encoder):
            model.to("cpu")
        torch.set_rng_state(random_state)


def set_training_mode(unet, training: bool) -> None:
    """Sets the mode of the adapters only: in training mode, diffusers' own layers would copy activations needlessly."""
    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            module.train(training)
