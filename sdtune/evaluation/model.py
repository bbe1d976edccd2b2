"""The base that an evaluation measures, with a tuner or without: it draws, encodes and predicts noise."""

from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from PIL import Image

from ..adapters import api
from ..bases import load, properties
from ..inference import compare
from ..training import dataset, encoding
from ..training.buckets import AspectBuckets
from ..training.loss import denoising_errors


def default_device() -> str:
    """The name of this machine's accelerator, or cpu."""
    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"


class EvaluatedModel:
    """A frozen base, and what the evaluation does with it in one precision.

    Args:
        base: as in `load_base`.
        precision: of Accelerate: fp16, bf16, or no and None for fp32.
        sampling_steps: of each picture that it draws.
        progress_bar: whether drawing shows one.
    """

    def __init__(self, base: str, precision: str | None, sampling_steps: int, progress_bar: bool):
        self.device = default_device()
        self.pipe = load.load_base(base).to(self.device)
        for part in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            part.requires_grad_(False).eval()
        self.resolution = load.native_resolution(base)
        self.buckets = AspectBuckets(self.resolution, square=True)  # all methods are compared on squares
        self.guidance = properties.default_guidance(self.pipe)
        self.precision, self.sampling_steps, self.progress_bar = precision, sampling_steps, progress_bar

    def autocast(self):
        """A context of mixed precision, or of none, in which everything that is compared must run."""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(torch.device(self.device).type, half or torch.bfloat16, enabled=half is not None)

    @contextmanager
    def with_tuner(self, file: Path | None):
        """Within the `with`, the base has the tuner of a file, or none; yields the adapters for `draw`."""
        if file is None:
            yield {}
            return
        name = api.attach_file(self.pipe, file, "evaluated")
        try:
            yield {name: 1.0}
        finally:
            api.unload_tuner(self.pipe, name)

    def encode(self, pairs: list[dataset.Pair]) -> encoding.Encoded:
        """Pictures and captions of pairs as the UNet takes them, on the device in fp32."""
        pipe = self.pipe
        encoded = encoding.encode(pairs, pipe.vae, pipe.tokenizer, pipe.text_encoder, self.buckets)
        return encoded.to(self.device, torch.float32)

    def denoising_errors(self, encoded: encoding.Encoded, noises: int = 1) -> torch.Tensor:
        """The mean squared error of the predicted noise for each pair, (n,), over so many noises."""
        scheduler = DDPMScheduler.from_config(self.pipe.scheduler.config)
        return denoising_errors(self.pipe.unet, scheduler, encoded, noises)

    @torch.no_grad()
    def reconstruct(self, pairs: list[dataset.Pair]) -> list[Image.Image]:
        """The pictures of pairs, encoded and decoded by the VAE, in the precision that pictures are drawn in."""
        vae = self.pipe.vae
        with self.autocast():
            latents = self.encode(pairs).buckets[0].mean[:, 0] / vae.config.scaling_factor
            decoded = torch.cat([vae.decode(part).sample.float().cpu() for part in latents.split(16)])
        return self.pipe.image_processor.postprocess(decoded, output_type="pil")

    def draw(self, prompts: list[str], first_seed: int, adapters: dict[str, float]) -> list[Image.Image]:
        """A picture of each prompt; prompt i starts from the noise of seed first_seed + i."""
        side = self.resolution
        cells = [
            compare.Cell(p, first_seed + i, adapters, self.guidance, width=side, height=side)
            for i, p in enumerate(prompts)
        ]
        title = "drawing" if self.progress_bar else ""
        return compare.draw_cells(self.pipe, cells, steps=self.sampling_steps, title=title)
