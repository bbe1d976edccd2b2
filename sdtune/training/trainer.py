"""The trainer: image-prompt pairs and a base in, a tuner file, previews and a loss curve out.

`fit` reads like the method: the once-in-a-while work first (read, encode, attach, resume), the single
training step last (`_Trainer.step`). Accelerate gives device, precision, loss scaling, clipping, several processes,
checkpoints and trackers. The whole encoded set lies on the device, and there is no DataLoader. A GPU is not waited
for: a step's losses are looked at when the next one is under way.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm.auto import tqdm

from .. import kernels
from ..adapters import api, state, tuner_file
from ..bases import load, properties
from ..inference import compare, grids, plots
from ..kernels.cpu import heap
from ..kernels.cuda import graphs
from ..tuners.config import FULL, TunerConfig
from . import dataset, encoding, launch, stopping
from .config import TrainConfig
from .errors import Stopped, TrainError
from .flat_weights import FlatWeights
from .loss import AttentionInFp32, denoising_errors, training_loss
from .memory import MemorySavingHooks
from .sample_step import sample_step

NAME = "tuner"  # the adapter's name while it trains


@dataclass
class Result:
    """Where a finished run left its files, and its losses; `main` is False in all processes but the first.

    `heldout` is the mean loss on the held-out pictures by step, `steps` the step whose tuner was kept.
    """

    main: bool
    tuner: Path
    preview: Path
    loss_plot: Path
    config: Path
    losses: list[float]
    heldout: dict[int, float]
    steps: int


def fit(
    config: TrainConfig, tuner: TunerConfig | None = None, on_step: Callable[[int, float], bool | None] | None = None
) -> Result:
    """Trains a tuner on a folder of image-prompt pairs.

    Leaves in `config.output`: tuner.safetensors, preview.png, loss.png, config.json, checkpoints/, previews/.

    Args:
        on_step: gets the steps done and the last loss after each (on a GPU after the next one has begun); returning
            True stops the run as a signal does.

    Raises:
        DataError, BaseError: before any training, with everything that is wrong with the data or the base.
        Stopped: after a signal, once a checkpoint is written.
        TrainError: if the output folder holds an unfinished run and `resume` is off, if there is nothing to
            resume, or if the loss is not finite; the last good weights are in the output folder then.
    """
    trainer = Trainer(config, tuner or TunerConfig())
    with launch.CatchSignals() as caught:
        over = trainer.done and trainer.look()  # a checkpoint is written before its step is looked at
        while trainer.done < config.steps and not over:
            known = len(trainer.losses)
            trainer.step()
            due = trainer.done % config.checkpoint_every == 0 or trainer.done == config.steps
            if due:
                trainer.settle()
            new = len(trainer.losses) > known
            asked = signal.SIGTERM if on_step and new and on_step(len(trainer.losses), trainer.losses[-1]) else 0
            stop = trainer.anywhere(caught.number or asked)
            if due or stop:
                trainer.checkpoint()
            if stop:
                trainer.close()
                raise Stopped(
                    f"stopped at step {trainer.done} of {config.steps}; a checkpoint is in {trainer.checkpoints}. "
                    "Continue with the same command and --resume", stop
                )  # fmt: skip
            over = trainer.look()
    return trainer.finish()


class Trainer:
    """The state of a run. `fit` is the order of things; each method here is one of them."""

    def __init__(self, config: TrainConfig, tuner: TunerConfig):
        self.config, self.tuner, self.output = config, tuner, Path(config.output)
        self.checkpoints = self.output / "checkpoints"
        resolution = config.resolution or load.native_resolution(config.base)
        self.accelerator = _accelerator(config)
        self.main = self.accelerator.is_main_process
        say = self._say = lambda text: print(text, flush=True) if self.main else None

        pairs, heldout = dataset.read_splits(config.data, resolution, say)
        if config.stop_when and not heldout:
            raise TrainError(
                f"--stop_when {config.stop_when} watches held-out pictures, and {config.data} has none; move some "
                "pairs, say one of five, into a folder test/ beside train/"
            )
        start = self._latest_checkpoint()
        say(f"{len(pairs)} pairs from {config.data}" + (f", {len(heldout)} held out" if heldout else ""))
        say(f"loading the base {config.base}")

        set_seed(config.seed)
        device = self.accelerator.device
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision, torch.float32)
        self.pipe = pipe = load.load_base(config.base)
        self.base = properties.describe_base(pipe)
        long = encoding.truncated_captions(pairs, pipe.tokenizer, config.trigger_words)
        if long:
            say(f"{len(long)} captions are longer than the text encoder reads and are cut: {', '.join(long[:5])}")
        for model in (pipe.vae, pipe.text_encoder, pipe.unet):
            model.requires_grad_(False).eval()
        pipe.vae.to(device)
        pipe.text_encoder.to(device)
        models = (pipe.vae, pipe.tokenizer, pipe.text_encoder, resolution)
        self.data = encoding.encode(pairs, *models, config.flip, config.trigger_words).to(device, half)
        self.heldout = heldout and encoding.encode(heldout, *models, False, config.trigger_words).to(device, half)
        pipe.vae.to("cpu")
        pipe.text_encoder.to("cpu")

        self.unet = kernels.to_channels_last(pipe.unet.to(device, half))
        api.add_tuner(self.unet, tuner, NAME)
        self.weights = FlatWeights(api.tuner_parameters(self.unet, NAME))
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        # a mode does not reach into what gradient checkpointing computes again
        in_fp32 = device.type == "cpu" and half != torch.float32 and not config.gradient_checkpointing
        self.attention = AttentionInFp32 if in_fp32 else nullcontext
        # a step takes 1 % longer, and 2 % on a small UNet, for whose memory nobody on a CPU would pay them
        spared = device.type == "cpu" and properties.is_small(self.unet)
        self.frugal = nullcontext() if tuner.kind == FULL or spared else MemorySavingHooks(self.unet)
        self.learn = graphs.CudaGraphed(self._learn) if device.type == "cuda" else self._learn
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        # the published rate; for a UNet as small as tiny-sd's a higher one did better on pairs left out of training
        usual_rate = (3e-3 if properties.is_small(self.unet) else 1e-4) * (0.1 if tuner.kind == FULL else 1)
        rate = config.learning_rate or usual_rate
        usual = properties.default_guidance(self.unet)
        self.guidance = usual if config.guidance_scale is None else config.guidance_scale
        self.optimizer = torch.optim.AdamW([self.weights.vector], lr=rate, weight_decay=config.weight_decay, fused=True)
        name = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
        self.rate = get_scheduler(
            name, self.optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=config.steps
        )
        self.optimizer = self.accelerator.prepare(self.optimizer)
        self.accelerator.register_for_checkpointing(self.rate)

        self.prompts = config.preview_prompts or [p.caption for p in (heldout or pairs)[:4]]
        if config.trigger_words and not config.preview_prompts:
            self.prompts = [f"{config.trigger_words} {p}" for p in self.prompts]
        self.true = [] if config.preview_prompts else [p.open() for p in (heldout or pairs)[:4]]
        self.settings = {k: v for k, v in asdict(config).items() if k not in ("output", "resume")}
        self.settings |= {"resolution": resolution, "learning_rate": rate}
        self.settings |= {"mixed_precision": self.accelerator.mixed_precision}
        self.settings |= {"processes": self.accelerator.num_processes}
        self.done, self.kept_step, self.losses = 0, 0, []
        self.heldout_losses: dict[int, list[float]] = {}  # step -> loss of each held-out picture
        self.best: tuple[int, torch.Tensor] | None = None  # with stop_when: of the lowest held-out loss, with its step
        self.good, self.good_step = self.weights.vector.detach().clone(), 0
        self.fine = torch.ones((), dtype=torch.bool, device=device)  # whether all losses have been finite
        self.ahead: tuple | None = None  # what the next step learns from
        self.pending: tuple | None = None  # the last step's losses, on their way here
        if start:
            self._restore(start)
        self.accelerator.wait_for_everyone()
        if self.main:
            if not start:  # only now that all has been loaded does an earlier, finished run go
                shutil.rmtree(self.checkpoints, ignore_errors=True)
                (self.output / tuner_file.FILE_NAME).unlink(missing_ok=True)
            text = {"train": self.settings, "tuner": asdict(tuner), "versions": tuner_file.library_versions()}
            tuner_file.write_text(self.output / "config.json", json.dumps(text, indent=2) + "\n")
        if config.report_to:
            flat = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in self.settings.items()}
            self.accelerator.init_trackers("sdtune", {**flat, **{k: str(v) for k, v in asdict(tuner).items()}})
        count = self.weights.vector.numel()
        precision = self.accelerator.mixed_precision.replace("no", "fp32")
        predicts = self.scheduler.config.prediction_type
        say(f"{count:,} trainable parameters on {device} in {precision}; the base predicts {predicts}")
        self.before: list = []  # the base's preview, drawn when the first comparison with it is due
        _set_mode(self.unet, training=True)
        self.bar = tqdm(total=config.steps, initial=self.done, desc="training", unit="step", disable=not self.main)

    def step(self) -> None:
        """One optimizer step: predict, weigh, back-propagate, average over processes, clip, update; draw the next."""
        config, accelerator, vector = self.config, self.accelerator, self.weights.vector
        index, batches = self.ahead or self._batches(self.done)
        losses = torch.cat([accelerator.gather(self.learn(**batch)) for batch in batches])
        self.fine &= torch.isfinite(losses).all()
        torch.where(self.fine, vector.detach(), self.good, out=self.good)
        if accelerator.num_processes > 1:
            vector.grad.copy_(accelerator.reduce(vector.grad, "mean"))
        if config.max_grad_norm:
            accelerator.clip_grad_norm_([vector], config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        rate = self.rate.get_last_lr()[0]
        self.rate.step()  # also where loss scaling has left the weights as they were, so that it ends where it should
        self.ahead = self._batches(self.done + 1)
        self.settle()
        here = torch.cuda.Event() if losses.is_cuda else None
        self.pending = self.done, index, rate, losses.to("cpu", non_blocking=True), here
        self.done = self.kept_step = self.done + 1
        here.record() if here else self.settle()

    def settle(self) -> None:
        """Waits for the losses of the last step that was begun, and looks at them."""
        if not self.pending:
            return
        (step, index, rate, losses, here), self.pending = self.pending, None
        if here:
            here.synchronize()
        bad = ~torch.isfinite(losses)
        if bad.any():
            names = list(dict.fromkeys(self.data.names[i] for i in index[bad].tolist()))
            every = " (every picture of the batch: the learning rate may be too high)" if bad.all() else ""
            self._give_up(f"the loss is not finite at step {step + 1}, for {', '.join(names)}{every}")
        self.good_step = step
        self.losses.append(losses.mean().item())
        recent = self.losses[-20:]
        self.bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", lr=f"{rate:.1e}", refresh=False)
        self.bar.update()
        if self.config.report_to:
            self.accelerator.log({"loss": self.losses[-1], "lr": rate}, step=step + 1)

    def _batches(self, step: int) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
        """The numbers of a step's pictures, in all processes, and what `_learn` takes for each batch of this one."""
        config, encoded, ranks = self.config, self.data, self.accelerator.num_processes
        size, parts = config.batch_size, config.gradient_accumulation_steps
        drawn = sample_step(config, step, ranks * size * parts, encoded, self.scheduler.config.num_train_timesteps)
        batches = []
        for part in range(parts):
            first = (part * ranks + self.accelerator.process_index) * size
            own = {name: self._to_device(x[first : first + size]) for name, x in vars(drawn).items()}
            index, flip = own["index"], own["flip"]
            latents = encoded.mean[index, flip] + encoded.std[index, flip] * own["latent"]
            states = torch.where(own["drop"][:, None, None], encoded.empty, encoded.text[index])
            batches.append(dict(latents=latents, noise=own["noise"], timesteps=own["timestep"], states=states))
        return drawn.index, batches

    def _to_device(self, x: torch.Tensor) -> torch.Tensor:
        device = self.accelerator.device
        return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)

    def _learn(self, latents, noise, timesteps, states) -> torch.Tensor:
        """The loss of each picture of a batch (B,); adds its gradient to that of the weights."""
        self.weights.renew()
        with self.attention(), self.frugal:
            known = latents, noise, timesteps, states
            loss = training_loss(self.unet, self.scheduler, *known, self.config.min_snr_gamma)
            self.accelerator.backward(loss.mean() / self.config.gradient_accumulation_steps)
        self.weights.gather()
        return loss.detach()

    def _give_up(self, why: str) -> None:
        """Saves the last weights that gave a finite loss, and raises."""
        self.weights.vector.data.copy_(self.good)
        self.kept_step = self.good_step
        path = self._save_tuner(self.output / "last-good.safetensors") if self.main else self.output
        self.close()
        raise TrainError(
            f"{why}. The last good weights, of step {self.kept_step}, are in {path}. Look at these pictures, lower "
            "--learning_rate, or use --mixed_precision bf16 or no"
        )

    def look(self) -> bool:
        """Draws the preview and watches for memorising, where they are due; whether the run should end."""
        every = self.config.preview_every
        if every and self.done % every == 0 and self.done < self.config.steps:
            self.preview(self.output / "previews" / f"step-{self.done:06d}.png")
        return bool(self.config.stop_when and self.anywhere(self.memorises()))

    def memorises(self) -> bool:
        """Whether the run has begun to memorise, measured 20 times a run; keeps the weights that were best."""
        if self.done % max(1, self.config.steps // 20):
            return False
        with _Evaluating(self):
            self._measure_heldout()
        begun = stopping.first_memorising_step(self.heldout_losses)
        if begun is not None:
            self.bar.close()
            self._say(f"stopped at step {self.done}: the held-out loss has risen since step {begun}")
        return begun is not None

    def anywhere(self, number: int) -> int:
        """The greatest number of any process, 0 for none, the same answer in all of them."""
        if self.accelerator.num_processes == 1:
            return number
        device = self.accelerator.device
        return int(self.accelerator.gather(torch.tensor([number], device=device)).max())

    # ------------------------------------------------------------------------- once in a while

    def checkpoint(self) -> None:
        """Writes checkpoints/step-N: the fp32 tuner, optimizer, schedule, scaler, RNG states and losses."""
        self.settle()
        if not torch.isfinite(self.weights.vector).all():
            self._give_up(f"the weights are not finite after step {self.done}")
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() < 1:
            self._give_up(f"the gradients overflow in fp16 at step {self.done}, however small the loss is scaled")
        final = self.checkpoints / f"step-{self.done:06d}"
        part = self.checkpoints / f".step-{self.done:06d}.part"
        if self.main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            self._save_tuner(part / tuner_file.FILE_NAME, torch.float32)
            if self.best:
                torch.save(self.best, part / "best.pt")
            state = {"step": self.done, "losses": self.losses, "heldout": self.heldout_losses,
                     "settings": self.settings, "tuner": asdict(self.tuner)}  # fmt: skip
            tuner_file.write_text(part / "state.json", json.dumps(state))
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(part))
        self.accelerator.wait_for_everyone()
        if self.main:
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
        self.accelerator.wait_for_everyone()

    def _latest_checkpoint(self) -> Path | None:
        found = sorted(self.checkpoints.glob("step-*/state.json"))
        finished = (self.output / tuner_file.FILE_NAME).exists()
        if self.config.resume:
            if not found:
                raise TrainError(f"nothing to resume: {self.checkpoints} holds no checkpoint; start without --resume")
            return found[-1].parent
        if found and not finished:
            raise TrainError(
                f"{self.output} holds a run that stopped at step {int(found[-1].parent.name[5:])}. Continue it with "
                "--resume, or give another --output, or delete the folder"
            )
        return None

    def _restore(self, folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        free = {"steps", "checkpoint_every", "preview_every", "preview_prompts", "preview_steps", "guidance_scale",
                "report_to", "data", "base"}  # fmt: skip
        now = {**self.settings, **json.loads(json.dumps(asdict(self.tuner)))}
        then = {**state["settings"], **state["tuner"]}
        differ = [k for k in now if k not in free and then.get(k) != now[k]]
        changed = [f"{k} was {then.get(k)!r} and is {now[k]!r}" for k in differ]
        if changed:
            raise TrainError(f"{folder} cannot be resumed with other settings: {'; '.join(changed)}")
        file = tuner_file.load(folder)
        tuner_file.check_fits(file, {k: tuple(p.shape) for k, p in self.weights.named.items()}, folder)
        for name, p in self.weights.named.items():
            p.copy_(file.tensors[name])
        self.accelerator.load_state(str(folder))
        self.done = self.kept_step = self.good_step = state["step"]
        self.losses = state["losses"]
        self.heldout_losses = {int(k): v for k, v in state["heldout"].items()}
        self.good.copy_(self.weights.vector.detach())
        if (folder / "best.pt").exists():
            self.best = torch.load(folder / "best.pt", map_location=self.accelerator.device, weights_only=True)
        if self.done > self.config.steps:
            raise TrainError(f"{folder} is past --steps {self.config.steps}; give more steps")
        self._say(f"resumed at step {self.done}")

    def _save_tuner(self, path: Path, dtype: torch.dtype = torch.float16) -> Path:
        training = {**self.settings, "steps_done": self.kept_step, "images": len(self.data.names)}
        file = tuner_file.TunerFile(self.tuner, self.weights.named, self.base, self.config.trigger_words, training)
        return tuner_file.save(path, file, dtype)

    def _draw(self, pipe, adapters: dict[str, float], count: int | None = None) -> list:
        """The first `count` preview prompts, prompt i from the noise of seed i."""
        cells = [compare.Cell(p, i, adapters, self.guidance) for i, p in enumerate(self.prompts[:count])]
        steps, side = self.config.preview_steps, self.settings["resolution"]
        return compare.draw_cells(pipe, cells, steps=steps, size=side, title="preview")

    def preview(self, path: Path) -> list:
        """Measures the held-out loss; in the main process draws the preview prompts and writes the labelled grid."""
        with _Evaluating(self):
            if self.heldout and self.done not in self.heldout_losses:
                self._measure_heldout()
            if not self.main:
                return []
            with self.accelerator.autocast():
                after = self._draw(self.pipe, {NAME: 1.0})
                self.before = self.before or self._draw(self.pipe, {})
        columns = ["base", f"tuned, step {self.kept_step}"] + (["true picture"] if self.true else [])
        rows = [list(row) for row in zip(self.before, after, *([self.true] if self.true else []))]
        path.parent.mkdir(parents=True, exist_ok=True)
        grids.write_png(grids.make_grid(rows, columns, self.prompts), path)
        if self.config.report_to and self.done in self.heldout_losses:
            self.accelerator.log({"held-out loss": self.heldout_means()[self.done]}, step=self.done)
        return after

    def _measure_heldout(self) -> None:
        if 0 not in self.heldout_losses:  # the base's, not before the first step, which should come soon
            with state.adapters_disabled(self.unet):
                self.heldout_losses[0] = self._heldout_errors()
        self.heldout_losses[self.done] = self._heldout_errors()
        means = self.heldout_means()
        if self.config.stop_when and self.done and means[self.done] == min(means.values()):
            self.best = self.done, self.weights.vector.detach().clone()

    def _heldout_errors(self) -> list[float]:
        return denoising_errors(self.unet, self.scheduler, self.heldout).tolist()

    def heldout_means(self) -> dict[int, float]:
        return {step: sum(losses) / len(losses) for step, losses in self.heldout_losses.items()}

    def finish(self) -> Result:
        """Saves the tuner, loads the file into a fresh pipeline, and checks that it draws what it should."""
        self.settle()
        self.bar.close()
        self.learn = None  # a recording holds memory
        if self.heldout and self.done not in self.heldout_losses:
            with _Evaluating(self):
                self._measure_heldout()
        if self.best:
            self.kept_step = self.best[0]
            self._say(f"keeping the tuner of step {self.kept_step}, with the lowest held-out loss")
            self.weights.vector.data.copy_(self.best[1])
        path, preview, plot = (self.output / n for n in (tuner_file.FILE_NAME, "preview.png", "loss.png"))
        if self.main:
            self._save_tuner(path)
            weights = self.weights.vector.data
            weights.copy_(weights.half())  # those of the file, so that its pictures can be compared
        after = self.preview(preview)
        if self.main:
            title = f"{self.output.name}: {len(self.losses)} steps"
            plots.plot_losses(plot, self.losses, self.heldout_means(), title)
            self.pipe.to("cpu")
            self._verify(path, after)
        self.close()
        config, heldout = self.output / "config.json", self.heldout_means()
        return Result(self.main, path, preview, plot, config, self.losses, heldout, self.kept_step)

    def _verify(self, path: Path, after: list) -> None:
        dtype, fresh = self.unet.dtype, load.load_base(self.config.base)
        api.load_tuner(fresh, path, NAME)
        fresh.to(self.accelerator.device)
        fresh.unet.to(dtype)
        with self.accelerator.autocast():
            drawn = self._draw(fresh, {NAME: 1.0}, 1)
        same, other = grids.mean_difference(drawn[0], after[0]), grids.mean_difference(drawn[0], self.before[0])
        if other == 0:
            raise TrainError(f"{path} was written, but it changes nothing: a fresh pipeline draws the base's picture")
        rounding = 0.0 if dtype == torch.float32 else 2.0  # in half precision a batch of one rounds otherwise
        if same > 0.2 * other + rounding:
            raise TrainError(
                f"{path} was written, but a fresh pipeline does not draw the preview with it: it differs by {same:.2f} "
                f"grey levels, and from the base's picture by {other:.2f}"
            )
        self._say(f"checked: the file, loaded into a fresh pipeline, draws the preview (difference {same:.2f} of 255)")

    def close(self) -> None:
        self.bar.close()
        self.accelerator.end_training()


class _Evaluating:
    """While previews are drawn: all models on the device, evaluation mode, the training RNG untouched."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def __enter__(self):
        pipe, self.random = self.trainer.pipe, torch.get_rng_state()
        self.trainer.weights.renew()
        _set_mode(pipe.unet, training=False)
        for module in (pipe.vae, pipe.text_encoder):
            module.to(self.trainer.accelerator.device)

    def __exit__(self, *_):
        _set_mode(self.trainer.pipe.unet, training=True)
        for module in (self.trainer.pipe.vae, self.trainer.pipe.text_encoder):
            module.to("cpu")
        torch.set_rng_state(self.random)


def _set_mode(unet, training: bool) -> None:
    """Of what is trained alone: in training, diffusers' own layers would copy pictures into another order."""
    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            module.train(training)


def _accelerator(config: TrainConfig) -> Accelerator:
    precision = config.mixed_precision
    if precision is None and torch.cuda.is_available() and not launch.is_precision_chosen():
        precision = "fp16"
    AcceleratorState._reset_state()  # of an earlier run in this process, which may have had another precision
    try:
        accelerator = Accelerator(
            mixed_precision=precision, log_with=config.report_to, project_dir=config.output,
            cpu=not torch.accelerator.is_available(),  # else several processes without a GPU would not see each other
        )  # fmt: skip
    except ValueError as error:
        raise TrainError(f"Accelerate refuses this set-up: {error}") from error
    if accelerator.device.type == "cpu":
        if accelerator.mixed_precision == "fp16":
            raise TrainError("fp16 mixed precision needs a GPU; this run is on the CPU, where bf16 or no will do")
        heap.keep_freed_memory()
        if accelerator.num_processes == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ:
            # `accelerate launch` without --cpu sets OMP_NUM_THREADS=1, with GPUs in mind
            torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    return accelerator
