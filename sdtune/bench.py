"""Speed and memory, measured side by side in one run: `python -m sdtune.bench --help`.

Contestants of a training step: what diffusers' examples/text_to_image/train_text_to_image_lora.py does per step, our
trainer with Res-Attn and with LoRA, and the floor, the frozen UNet alone. Contestants of drawing: the base, a Res-Attn,
a LoRA of equal parameters as it is and fused. They alternate, all on one copy of the frozen UNet, so the ratios hold on
a machine whose speed wanders; memory and start-up are measured on each in a process of its own.

This file trains nothing itself: our contestants are `train._Trainer.step`, `train.fit` and `pipeline.draw`.
"""

import argparse
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from . import attach, bases, data, pipeline, store, train
from .config import TrainConfig
from .tuners import TunerConfig

PARTS = {
    "train": "a training step: the contestants alternate",
    "draw": "a picture: the contestants alternate",
    "memory": "start-up and peak memory, each contestant in a process of its own",
    "imports": "`import sdtune` and `train_anime.py --help`, beyond importing torch",
    "scale": "how our training grows with batch, resolution, images and processes",
    "finish": "a whole run of 300 steps on 30 images, with encoding, previews and saving (long on a CPU)",
}
REFERENCE, RES_ATTN, LORA, FLOOR = "reference", "res_attn", "lora", "floor"
BASE, FUSED = "base", "lora_fused"
TRAIN, DRAW = (REFERENCE, RES_ATTN, LORA, FLOOR), (BASE, RES_ATTN, LORA, FUSED)
LABELS = {
    REFERENCE: "diffusers' script, LoRA r 4", RES_ATTN: "sdtune, Res-Attn", LORA: "sdtune, LoRA r 4",
    FLOOR: "floor: frozen UNet", BASE: "base", FUSED: "LoRA, fused",
}  # fmt: skip
TARGETS_OF_LORA = ["to_k", "to_q", "to_v", "to_out.0"]
ROOT = Path(__file__).parent.parent
PROMPT = "a girl with silver hair, in anime style"


@dataclass(frozen=True)
class Job:
    """What one contestant does; a child process is given it as JSON.

    Attributes:
        part: train, draw or finish.
        who: the contestant, of TRAIN or DRAW.
        base: what `bases.load_base` takes.
        data: a folder of pairs.
        work: a folder for what it writes.
        repeat: units (steps, pictures) that a child runs after one to warm up; a finished run's steps.
        draw_steps: sampling steps of a picture.
        first_preview: whether our trainer's previews are its default ones (as short as they can be otherwise).
        checkpointing: trades time for memory.
    """

    part: str
    who: str
    base: str
    data: str
    work: str
    resolution: int
    batch: int
    precision: str
    repeat: int = 1
    draw_steps: int = 10
    first_preview: bool = False
    checkpointing: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}[self.precision]


@dataclass
class Contestant:
    """One, ready: `run` does a unit of its work with `unet`."""

    unet: torch.nn.Module
    run: Callable[[], None]
    finish: Callable[[], None] = lambda: None


# --------------------------------------------------------------------------------------- contestants


def prepare(job: Job) -> Contestant:
    """Loads what a contestant needs and readies it to the brink of its first unit."""
    if job.part == "draw":
        return _drawing(job)
    makers = {REFERENCE: _reference, FLOOR: _floor}
    return makers.get(job.who, _ours)(job)


def _ours(job: Job) -> Contestant:
    """Our trainer itself, with its default settings."""
    trainer = train._Trainer(train_config(job), tuner_config(job))
    return Contestant(trainer.unet, trainer.step, trainer.close)


def tuner_config(job: Job) -> TunerConfig:
    return TunerConfig(kind=LORA, rank=4, ops=["attn1", "attn2"]) if job.who == LORA else TunerConfig()


def train_config(job: Job) -> TrainConfig:
    short = {} if job.first_preview else {"preview_steps": 1, "preview_prompts": [PROMPT], "preview_every": 0}
    return TrainConfig(
        base=job.base, data=job.data, output=str(Path(job.work) / f"{job.part}-{job.who}"), batch_size=job.batch,
        resolution=job.resolution, mixed_precision=job.precision, steps=max(job.repeat, 300),
        gradient_checkpointing=job.checkpointing, **short,
    )  # fmt: skip


def _reference(job: Job) -> Contestant:
    """diffusers' train_text_to_image_lora.py, as it is documented and behaves with its default flags.

    Every step decodes, resizes, crops and flips the image files in a DataLoader without workers, tokenises the captions,
    runs the VAE's encoder and the text encoder, and reads the loss back twice. LoRA r 4 in the UNet's attention, AdamW,
    constant 1e-4. Its gradient clipping is handed an iterator that is already used up, so it clips nothing.
    """
    AcceleratorState._reset_state()  # of our trainer in this process
    accelerator = Accelerator(mixed_precision=job.precision, cpu=not torch.cuda.is_available())
    pairs, _ = data.read_splits(job.data, job.resolution, lambda line: None)
    pipe = bases.load_base(job.base)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    for frozen in (pipe.vae, pipe.text_encoder, pipe.unet):
        frozen.requires_grad_(False).to(accelerator.device, job.dtype)
    unet, vae, text_encoder = pipe.unet, pipe.vae, pipe.text_encoder
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=TARGETS_OF_LORA))
    if job.precision == "fp16":
        cast_training_params(unet, dtype=torch.float32)
    if job.checkpointing:
        unet.enable_gradient_checkpointing()
    trainable = filter(lambda p: p.requires_grad, unet.parameters())
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=1e-2)
    pictures = _Pictures(pairs, pipe.tokenizer, job.resolution)
    loader = torch.utils.data.DataLoader(pictures, batch_size=job.batch, shuffle=True)
    rate = get_scheduler("constant", optimizer)
    unet, optimizer, loader, rate = accelerator.prepare(unet, optimizer, loader, rate)
    unet.train()
    batches = chain.from_iterable(repeat(loader))

    def step() -> None:
        pixels, ids = next(batches)
        latents = vae.encode(pixels.to(job.dtype)).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        steps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        noisy = scheduler.add_noise(latents, noise, steps)
        states = text_encoder(ids, return_dict=False)[0]
        predicted = unet(noisy, steps, states, return_dict=False)[0]
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
        StableDiffusionPipeline.save_lora_weights(job.work, unet_lora_layers=layers)

    return Contestant(accelerator.unwrap_model(unet), step, finish)


class _Pictures(torch.utils.data.Dataset):
    """The reference's data set: files decoded, scaled, cropped at random, flipped at random, and captions tokenised."""

    def __init__(self, pairs: list, tokenizer, side: int):
        self.pairs, self.tokenizer, self.side = pairs, tokenizer, side

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        pair, side = self.pairs[i], self.side
        image = pair.open()
        ratio = side / min(image.size)
        image = image.resize([max(side, round(n * ratio)) for n in image.size], Image.Resampling.BILINEAR)
        left, top = (int(torch.randint(0, n - side + 1, ())) for n in image.size)
        image = image.crop((left, top, left + side, top + side))
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255).sub(0.5).div(0.5)
        ids = self.tokenizer(
            pair.caption, max_length=self.tokenizer.model_max_length, padding="max_length", truncation=True,
            return_tensors="pt",
        ).input_ids[0]  # fmt: skip
        return pixels, ids


def _floor(job: Job) -> Contestant:
    """The frozen UNet's forward and backward, and nothing else: no data, no tuner, no optimizer, no autocast.

    The gradient goes down to the result of the first operation that a tuner can hang on, as a tuner there needs.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = bases.load_base(job.base)
    unet = pipe.unet.requires_grad_(False).to(device, job.dtype).train()
    if job.checkpointing:
        unet.enable_gradient_checkpointing()
    first = next(iter(attach.find_ops(unet, TunerConfig()).values()))[0]
    first.register_forward_hook(lambda module, args, output: output.requires_grad_())
    width, tokens, side = unet.config.cross_attention_dim, pipe.tokenizer.model_max_length, job.resolution // 8
    random = torch.Generator().manual_seed(0)
    noisy, noise = torch.randn(2, job.batch, 4, side, side, generator=random).to(device, job.dtype)
    states = torch.randn(job.batch, tokens, width, generator=random).to(device, job.dtype)
    steps = torch.randint(0, 1000, (job.batch,), generator=random).to(device)

    def step() -> None:
        F.mse_loss(unet(noisy, steps, states, return_dict=False)[0].float(), noise.float()).backward()

    return Contestant(unet, step)


def _drawing(job: Job) -> Contestant:
    """A pipeline that draws, with a fresh adapter: its weights' values cost nothing."""
    pipe = bases.load_base(job.base, job.dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.unet.requires_grad_(False)
    if job.who == RES_ATTN:
        pipeline.add_tuner(pipe)
    elif job.who != BASE:
        rank = equal_rank(pipe.unet)
        pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS_OF_LORA))
        if job.who == FUSED:
            pipe.unet.fuse_lora()
            pipe.unet.unload_lora()
    pipe.unet.eval()
    return Contestant(
        pipe.unet,
        partial(pipeline.draw, pipe, [PROMPT] * job.batch, list(range(job.batch)), steps=job.draw_steps,
                size=job.resolution),
    )  # fmt: skip


def equal_rank(unet) -> int:
    """The rank at which a LoRA on all attention projections has as many parameters as the default Res-Attn."""
    tuner = sum(np.prod(shape) for shape in attach.expected_shapes(unet, TunerConfig()).values())
    layers = [m for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(tuple(TARGETS_OF_LORA))]
    return max(1, round(tuner / sum(m.in_features + m.out_features for m in layers)))


def sd15_shape() -> Path:
    """A base of Stable Diffusion 1.5's exact shape with random weights, made once; 4.3 GB."""
    folder = Path("output/sd15-shape")
    if (folder / "model_index.json").exists():
        return folder
    _say(f"making {folder}, Stable Diffusion 1.5's shape with random weights")
    part, configs = folder.with_name(f".{folder.name}.part"), bases.CONFIGS / "sd15"
    shutil.rmtree(part, ignore_errors=True)
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(AutoencoderKL.load_config(configs / "vae")),
        text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder")),
        tokenizer=CLIPTokenizer.from_pretrained(bases.CONFIGS / "tokenizer", pad_token="<|endoftext|>"),
        unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(configs / "unet")),
        scheduler=PNDMScheduler.from_pretrained(configs / "scheduler"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(part)  # fmt: skip
    part.rename(folder)
    return folder


# --------------------------------------------------------------------------------------- measuring


def alternate(jobs: list[Job], rounds: int, block: int) -> dict[str, list[float]]:
    """Seconds per image of each contestant in each round; within a round each runs `block` units in a row."""
    weights: dict[str, torch.Tensor] = {}
    contestants = {}
    for job in jobs:
        _say(f"  readying {label(job)}")
        with _quiet():
            contestants[job.who] = prepare(job)
        for name, p in contestants[job.who].unet.named_parameters():  # one copy of the frozen weights for all
            if not p.requires_grad:
                p.data = weights.setdefault(name.replace(".base_layer", ""), p.data)
    seconds = {name: [] for name in contestants}
    order = list(contestants)
    for number in range(-1, rounds):
        for name in order:
            with _quiet():
                start = time.perf_counter()
                for _ in range(block):
                    contestants[name].run()
                _synchronize()
                spent = time.perf_counter() - start
            if number >= 0:
                seconds[name].append(spent / block / jobs[0].batch)
        order.append(order.pop(0))  # nobody is always behind the same one
        shown = ", ".join(f"{n} {t[-1]:.3g} s" for n, t in seconds.items() if t)
        _say(f"  round {number + 1} of {rounds}: {shown}" if shown else "  warmed up")
    return seconds


class Peak:
    """The most memory in use during a `with`, in bytes: what torch holds on CUDA, the process's own on the CPU."""

    def __enter__(self):
        self.bytes, self._over = held(), threading.Event()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self):
        while not self._over.wait(0.002):
            self.bytes = max(self.bytes, held())

    def __exit__(self, *_):
        self._over.set()
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated()
        else:
            self._thread.join()


def held() -> int:
    """Bytes in use now."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def child(spec: dict) -> None:
    """One contestant alone in this process; writes what it took, in seconds and bytes, to `spec["result"]`."""
    started, job = spec["started"], Job(**spec["job"])
    found, before, seconds = {"imports": time.time() - started}, held(), []
    with Peak() as whole, _clocks(found):
        if job.part == "finish" and job.who != REFERENCE:
            train.fit(train_config(job), tuner_config(job))
        else:
            contestant = prepare(job)
            ready, loaded = time.time() - started, held()
            with Peak() as peak:
                for _ in range(job.repeat + 1):
                    start = time.perf_counter()
                    contestant.run()
                    _synchronize()
                    seconds.append(time.perf_counter() - start)
            contestant.finish()
            found |= {"ready": ready, "seconds": seconds[1:], "loaded": loaded - before, "peak": peak.bytes - before,
                      "working": peak.bytes - loaded}  # fmt: skip
    found |= {"total": time.time() - started, "whole": max(whole.bytes, before) - before}
    if os.environ.get("RANK", "0") == "0":
        Path(spec["result"]).write_text(json.dumps(found))


def alone(job: Job, processes: int = 1) -> dict:
    """What `child` finds for a job in a new process (or several that share it); its last words if it fails."""
    _say(f"  {label(job)} alone" + (f", {processes} processes" if processes > 1 else ""))
    result = Path(job.work) / "result.json"
    result.unlink(missing_ok=True)
    shutil.rmtree(train_config(job).output, ignore_errors=True)
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    # freed memory goes back to the system at once, so that what a process holds is what it uses
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    spec = {"job": asdict(job), "result": str(result), "started": time.time()}
    done = subprocess.run(
        [sys.executable, *many, "-m", "sdtune.bench", "--child", json.dumps(spec)], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    if done.returncode or not result.exists():
        lines = [line for line in done.stdout.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        _say(f"  failed: {lines[-1]}")
        return {"error": lines[-1]}
    return json.loads(result.read_text())


@contextmanager
def _clocks(spent: dict[str, float]):
    """Adds up, in `spent`, the seconds in the once-in-a-while work, by replacing its functions for a while."""
    watched = {"reading": (data, "read_splits"), "base": (bases, "load_base"), "encoding": (data, "encode"),
               "previews": (pipeline, "draw")}  # fmt: skip
    plain = {name: getattr(*place) for name, place in watched.items()}

    def timed(name, *args, **kwargs):
        start = time.perf_counter()
        try:
            return plain[name](*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

    for name, place in watched.items():
        setattr(*place, partial(timed, name))
    try:
        yield
    finally:
        for name, place in watched.items():
            setattr(*place, plain[name])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _quiet():
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def label(job: Job) -> str:
    if job.who == LORA and job.part == "draw":
        return "LoRA, as it is"
    return LABELS[job.who] + (", checkpointing" if job.checkpointing else "")


# --------------------------------------------------------------------------------------- the parts


def measure_alternating(job: Job, options) -> list[dict]:
    """Rows of a table: seconds per image of each contestant, and its ratio to the one that sets the mark."""
    rows, names, mark = [], TRAIN, FLOOR
    if job.part == "draw":
        names, mark = DRAW, BASE
    for batch in options.batch if job.part == "train" else options.batch[:1]:
        _say(f"{job.part}: batch {batch}, {job.resolution} px")
        block = 10 if torch.cuda.is_available() and job.part == "train" else 1
        seconds = alternate([replace(job, who=name, batch=batch) for name in names], options.rounds, block)
        for name in names:
            low, median, high = _quartiles(seconds[name])
            row = {"batch": batch, "": label(replace(job, who=name)), "s/image": median, "quartiles": f"{low:.3g} to {high:.3g}"}
            row[f"x {mark}"] = _ratio(seconds[name], seconds[mark])
            if job.part == "train":
                row["x reference's speed"] = _ratio(seconds[REFERENCE], seconds[name])
            rows.append({**row, "who": name, "seconds": seconds[name]})
    return rows


def measure_memory(job: Job, options) -> list[dict]:
    jobs = [replace(job, part=part, who=name, batch=batch) for part, names in (("train", TRAIN), ("draw", DRAW))
            for batch in (options.batch if part == "train" else options.batch[:1]) for name in names]  # fmt: skip
    jobs.insert(len(TRAIN), replace(jobs[1], checkpointing=True))
    rows = []
    for one in jobs:
        found = alone(replace(one, first_preview=True))
        row = {"": label(one), "part": one.part, "batch": one.batch, "who": one.who, "checkpointing": one.checkpointing}
        if "error" not in found:
            start = {k: found.get(k, 0.0) for k in ("imports", "base", "reading", "encoding", "previews")}
            row |= {"start-up s": found["ready"], **start} if one.part == "train" else {}
            row |= {f"{k} MB": found[k] / 1e6 for k in ("loaded", "peak", "working", "whole")}
        rows.append({**row, **({"error": found["error"]} if "error" in found else {})})
    return rows
