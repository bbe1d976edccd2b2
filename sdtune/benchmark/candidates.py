"""The candidates that the benchmark compares, each prepared up to its first unit of work.

In training: what diffusers' examples/text_to_image/train_text_to_image_lora.py does per step, our trainer with any
tuner, and the floor, which is the frozen UNet alone. In drawing: the base as diffusers and as we load it, any tuner, a
LoRA of equal parameters as it is and fused.

Nothing here trains or draws by itself: ours are `trainer.Trainer.step` and `compare.draw_cells`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from .. import kernels
from ..adapters import api, matching
from ..bases import load
from ..inference import compare
from ..kernels.cpu import heap
from ..kernels.cuda import graphs
from ..training import dataset, trainer
from ..training.buckets import AspectBuckets
from ..training.config import TrainConfig
from ..tuners.config import RES_ATTN_LAYER, TunerConfig

REFERENCE, RES_ATTN, LORA, FLOOR = "reference", "res_attn", "lora", "floor"
BYPASS = "bypass"
DIFFUSERS_BASE, BASE, FUSED = "plain", "base", "lora_fused"
CANDIDATES = {
    "train": {REFERENCE: "diffusers' script, LoRA r 4", RES_ATTN: "sdtune, Res-Attn",
              RES_ATTN_LAYER: "sdtune, Res-Attn on layers", BYPASS: "sdtune, bypass",
              LORA: "sdtune, LoRA r 4", FLOOR: "floor: frozen UNet"},
    "draw": {DIFFUSERS_BASE: "base as diffusers loads it", BASE: "base", RES_ATTN: "base + Res-Attn",
             LORA: "base + LoRA", FUSED: "base + LoRA, fused"},
}  # fmt: skip
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}
PROJECTIONS = ["to_k", "to_q", "to_v", "to_out.0"]
PROMPT = "a girl with silver hair, in anime style"


@dataclass(frozen=True)
class Job:
    """What one candidate does; its process gets it as JSON."""

    part: str  # train, draw, or finish: a whole training run
    name: str  # of the candidate, in CANDIDATES
    base: str
    data: str
    work_folder: str  # for what it writes
    resolution: int
    batch: int
    precision: str
    repetitions: int  # steps or pictures of a candidate alone, after one to warm up; the steps of a whole run
    sampling_steps: int
    default_previews: bool = False  # whether our trainer's previews are its default ones, or as short as possible
    checkpointing: bool = False
    varied: bool = False  # training on each picture's own shape, with shuffled tags and tag dropout
    tuner: dict | None = None  # a `TunerConfig` in place of the candidate's own

    @property
    def label(self) -> str:
        """The candidate's name in tables and messages."""
        if self.tuner:
            return f"{self.name}, {self.part}"
        label = CANDIDATES["draw" if self.part == "draw" else "train"][self.name]
        return label + (", checkpointing" if self.checkpointing else "")

    def configs(self) -> tuple[TrainConfig, TunerConfig]:
        """What a user would give our trainer; all else is its default."""
        varied = dict(shuffle_tags=True, tag_dropout=0.2) if self.varied else dict(square=True)
        short = dict(preview_steps=1, preview_prompts=[PROMPT], preview_every=0)
        config = TrainConfig(
            base=self.base, data=self.data, output=str(Path(self.work_folder) / "run" / self.name),
            batch_size=self.batch, resolution=self.resolution, mixed_precision=self.precision,
            gradient_checkpointing=self.checkpointing, steps=self.repetitions if self.part == "finish" else 1000,
            **varied, **({} if self.default_previews else short),
        )  # fmt: skip
        tuners = {
            LORA: dict(kind="lora", rank=4, ops=["attn1", "attn2"]),
            RES_ATTN_LAYER: dict(kind=RES_ATTN_LAYER),
            BYPASS: dict(kind="bypass", length=79),  # on tiny-sd as many parameters as Res-Attn
        }
        return config, TunerConfig(**(self.tuner or tuners.get(self.name, {})))


class Candidate(NamedTuple):
    """A candidate that is ready: `run` does a unit of its work (a step, or drawing a batch), `finish` saves."""

    run: Callable[[], None]
    finish: Callable[[], None] = lambda: None


def prepare(job: Job) -> Candidate:
    """Loads and sets up all that a candidate needs before its first unit of work."""
    if job.part == "draw":
        return _prepare_drawing(job)
    if job.name == REFERENCE:
        return _prepare_reference(job)
    if job.name == FLOOR:
        return _prepare_floor(job)
    return Candidate(trainer.Trainer(*job.configs()).step)


def _prepare_reference(job: Job) -> Candidate:
    """diffusers' train_text_to_image_lora.py, as it is documented and behaves with its default flags and flipping.

    Every step decodes, scales, crops and flips image files in a DataLoader without workers, tokenises the captions,
    runs the VAE's encoder and the text encoder, and reads the loss back twice. LoRA r 4 in the UNet's attention,
    AdamW, constant 1e-4. Its gradient clipping gets a exhausted iterator, so it clips nothing.
    """
    AcceleratorState._reset_state()  # which our trainer may have set in this process
    accelerator = Accelerator(mixed_precision=job.precision, cpu=not torch.cuda.is_available())
    pairs, _ = dataset.read_splits(job.data, AspectBuckets(job.resolution, square=True), lambda line: None)
    pipe = load.load_base(job.base)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    unet, vae = kernels.restore(pipe.unet), kernels.restore(pipe.vae)
    for model in (vae, pipe.text_encoder, unet):
        model.requires_grad_(False).to(accelerator.device, DTYPES[job.precision])
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=PROJECTIONS))
    if job.precision == "fp16":
        cast_training_params(unet, dtype=torch.float32)
    trainable = filter(lambda p: p.requires_grad, unet.parameters())
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=1e-2)
    collate = partial(_pixels_and_ids, pipe.tokenizer, job.resolution)
    loader = torch.utils.data.DataLoader(pairs, batch_size=job.batch, shuffle=True, collate_fn=collate)
    rate = get_scheduler("constant", optimizer)
    unet, optimizer, loader, rate = accelerator.prepare(unet.train(), optimizer, loader, rate)
    batches = chain.from_iterable(repeat(loader))

    def step() -> None:
        pixels, ids = next(batches)
        latents = vae.encode(pixels.to(DTYPES[job.precision])).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        steps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        states = pipe.text_encoder(ids, return_dict=False)[0]
        predicted = unet(scheduler.add_noise(latents, noise, steps), steps, states, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), noise.float())
        accelerator.gather(loss.repeat(job.batch)).mean().item()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        loss.detach().item()

    def finish() -> None:
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(accelerator.unwrap_model(unet)))
        StableDiffusionPipeline.save_lora_weights(job.work_folder, unet_lora_layers=layers)

    return Candidate(step, finish)


def _pixels_and_ids(tokenizer, side: int, pairs: list) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's batch: files decoded, scaled, cropped at random, flipped at random, and captions tokenised."""
    pixels = []
    for image in (pair.open() for pair in pairs):
        scale = side / min(image.size)
        image = image.resize([max(side, round(n * scale)) for n in image.size], Image.Resampling.BILINEAR)
        left, top = (int(torch.randint(0, n - side + 1, ())) for n in image.size)
        image = image.crop((left, top, left + side, top + side))
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else image
        channels_first = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        pixels.append(channels_first.float().div(255).sub(0.5).div(0.5))
    padded = dict(max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt")
    return torch.stack(pixels), tokenizer([pair.caption for pair in pairs], **padded).input_ids


def _prepare_floor(job: Job) -> Candidate:
    """The frozen UNet's forward and backward, and nothing else: no data, no tuner, no optimizer, no autocast.

    The gradient reaches back to the result of the first operation that would have a tuner, as that tuner needs. On
    CUDA it is captured as a CUDA graph, as our trainer's step is.
    """
    heap.keep_freed_memory()  # as our trainer does; otherwise the floor would be slower than it
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", DTYPES[job.precision]
    unet = kernels.restore(load.load_base(job.base).unet).requires_grad_(False).to(device, dtype).train()
    first = next(module for name, module in unet.named_modules() if name.endswith(".attn1"))
    first.register_forward_hook(lambda module, args, output: output.requires_grad_())
    side, width = job.resolution // 8, unet.config.cross_attention_dim
    noisy, noise = torch.randn(2, job.batch, 4, side, side, device=device, dtype=dtype)
    states = torch.randn(job.batch, 77, width, device=device, dtype=dtype)
    steps = torch.randint(0, 1000, (job.batch,), device=device)

    def step(noisy, noise, states, steps) -> torch.Tensor:
        loss = F.mse_loss(unet(noisy, steps, states, return_dict=False)[0].float(), noise.float())
        loss.backward()
        return loss.detach()

    run = graphs.CudaGraphed(step) if device == "cuda" else step
    return Candidate(partial(run, noisy=noisy, noise=noise, states=states, steps=steps))


def _prepare_drawing(job: Job) -> Candidate:
    """A pipeline that draws with a fresh adapter; the values of its weights make no difference to the time."""
    pipe = load.load_base(job.base, DTYPES[job.precision]).to("cuda" if torch.cuda.is_available() else "cpu")
    unet = pipe.unet.requires_grad_(False)
    if job.tuner or job.name == RES_ATTN:
        api.add_tuner(pipe, TunerConfig(**job.tuner or {}))
    elif job.name == DIFFUSERS_BASE:
        kernels.restore(unet), kernels.restore(pipe.vae)
        return Candidate(partial(_draw_as_diffusers, pipe, job))
    elif job.name != BASE:
        api.add_tuner(pipe, matching.match_parameters(unet, "rank", kind="lora", ops=["attn1", "attn2"]))
    if job.name == FUSED:
        unet.fuse_lora()
        unet.unload_lora()
    unet.eval()
    adapters = {} if job.name in (BASE, FUSED) else {"tuner_0": 1.0}
    side = job.resolution
    cells = [compare.Cell(PROMPT, seed, adapters, width=side, height=side) for seed in range(job.batch)]
    return Candidate(partial(compare.draw_cells, pipe, cells, steps=job.sampling_steps))


def _draw_as_diffusers(pipe: StableDiffusionPipeline, job: Job) -> None:
    """Draws a batch through the pipeline's own call."""
    noise = [torch.Generator("cpu").manual_seed(seed) for seed in range(job.batch)]
    size = dict(height=job.resolution, width=job.resolution)
    pipe([PROMPT] * job.batch, num_inference_steps=job.sampling_steps, generator=noise, **size)
