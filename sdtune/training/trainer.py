"""The training loop: `Trainer.step` is one training step; `fit.fit` calls it over and over.

All images and captions are encoded once, before the first step, and stay on the device, so there is no DataLoader.
Accelerate provides the device, mixed precision, gradient clipping, several processes and experiment trackers. Read
`fit.fit` first, then `Trainer.__init__` (what happens once) and `Trainer.step` (what happens over and over).
"""

import json
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers import DDPMScheduler
from tqdm.auto import tqdm

from .. import kernels
from ..adapters import api, hub, peft_files, tuner_file
from ..adapters.operations import ADAPTER_PATHS
from ..bases import load, properties
from ..inference import grids, plots
from ..kernels.cuda import graphs
from ..tuners.config import TunerConfig
from . import checkpoints, gradient_start, initial_weights, preservation, run_folder, setup
from .accelerator import create_accelerator, max_over_processes
from .buckets import AspectBuckets
from .checkpoints import CheckpointState
from .config import TrainConfig
from .errors import TrainError
from .flat_weights import FlatWeights
from .heldout import HeldOutLoss
from .loss import PendingLosses, training_loss
from .previews import evaluation_mode, set_training_mode
from .random_choices import draw_random_choices

ADAPTER_NAME = "tuner"  # the name of the adapter in the UNet while it is trained


@dataclass
class Result:
    """What a finished run has written, and its losses.

    Attributes:
        main: whether this is the first process; the others have written nothing.
        tuner, preview, loss_plot, config: the files in the output folder.
        losses: the training loss of each step.
        heldout: step -> mean loss on the held-out images; step 0 is the base without a tuner.
        steps: the step whose tuner was kept.
    """

    main: bool
    tuner: Path
    preview: Path
    loss_plot: Path
    config: Path
    losses: list[float]
    heldout: dict[int, float]
    steps: int


class Trainer:
    """The state of a run. `fit` calls the public methods in order.

    Attributes:
        done: how many optimizer steps are done.
        losses: the training loss of each step that has been read from the device.
        weights: what is trained, as one fp32 vector.
    """

    def __init__(self, config: TrainConfig, tuner: TunerConfig, folder: run_folder.RunFolder | None = None):
        self.config, self.tuner, self.folder = config, tuner, folder or run_folder.RunFolder()
        buckets = AspectBuckets(config.resolution or load.native_resolution(config.base), config.square)
        self.accelerator = accelerator = create_accelerator(config)
        self.is_main, device = accelerator.is_main_process, accelerator.device
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        starts_from_gradients = gradient_start.is_wanted(config, tuner)

        # data
        pairs, heldout = setup.read_pairs(config, buckets, self._print)
        self.output, checkpoint = self.folder.claim(config, accelerator, self._print)
        project = accelerator.project_configuration
        project.project_dir = project.logging_dir = str(self.output)
        self._print(f"{len(pairs)} pairs from {config.data}" + (f", {len(heldout)} held out" if heldout else ""))

        # the frozen base
        self._print(f"loading the base {config.base}")
        set_seed(config.seed)
        self.pipe = pipe = load.load_base(config.base)
        self.base = properties.describe_base(pipe)
        self.digests = setup.collect_digests(pipe, pairs, heldout)
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        for model in (pipe.vae, pipe.text_encoder, pipe.unet):
            model.requires_grad_(False).eval()
        self.encoded, encoded_heldout = setup.encode_pairs(
            config, pipe, pairs, heldout, buckets, device, dtype, self._print
        )

        # the tuner in its UNet
        self.unet = unet = kernels.to_channels_last(pipe.unet.to(device, dtype), ADAPTER_PATHS)
        api.add_tuner(unet, tuner, ADAPTER_NAME)
        self.weights = FlatWeights(api.tuner_parameters(unet, ADAPTER_NAME))
        if config.init and not checkpoint:
            initial_weights.load_initial_weights(config.init, tuner, self.weights.named)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.attention_precision = setup.attention_precision(config, unet)
        self.saved_tensor_hooks = setup.saved_tensor_hooks(unet, tuner)
        use_graph = device.type == "cuda" and kernels.is_enabled()
        self.train_on_batch = graphs.CudaGraphed(self._compute_gradients) if use_graph else self._compute_gradients
        if starts_from_gradients and not checkpoint and not gradient_start.start_from_gradients(self):
            self._print("note: the first batches had no finite gradient, so the tuner starts at random")

        # optimizer, previews, held-out loss
        learning_rate = config.learning_rate or setup.default_learning_rate(config, unet, tuner)
        optimizer, self.lr_scheduler = setup.create_optimizer(config, self.weights.vector, learning_rate)
        self.optimizer = accelerator.prepare(optimizer)
        accelerator.register_for_checkpointing(self.lr_scheduler)
        self.average = setup.create_average(config, self.weights.vector)
        if self.average:
            accelerator.register_for_checkpointing(self.average)
        self.previews = setup.create_previews(config, pipe, ADAPTER_NAME, accelerator, heldout or pairs, buckets)
        self.heldout = HeldOutLoss(unet, self.scheduler, encoded_heldout, keep_best=bool(config.stop_when))
        self.settings = setup.collect_settings(config, buckets.resolution, learning_rate, accelerator)

        # progress
        self.done, self.kept_step, self.losses = 0, 0, []
        self.good_weights, self.good_step = self.weights.vector.detach().clone(), 0  # the last with a finite loss
        self.all_finite = torch.ones((), dtype=torch.bool, device=device)  # whether all losses have been finite
        self.next_batches: tuple | None = None
        self.pending: PendingLosses | None = None
        if checkpoint:
            self._restore(checkpoint)
        accelerator.wait_for_everyone()
        if self.is_main:
            setup.prepare_output(self.output, config, self.settings, tuner, self.done if checkpoint else None)
            run_folder.require_space(self.output, setup.checkpoint_bytes(self.weights.vector, config), "a checkpoint")
        if config.report_to:
            setup.start_trackers(accelerator, self.settings, tuner)
        for line in setup.describe_preservation(config):
            self._print(f"note: {line}")
        self._print(setup.describe_run(self.weights.vector, accelerator, self.scheduler))
        set_training_mode(unet, True)
        self.bar = tqdm(total=config.steps, initial=self.done, desc="training", unit="step", disable=not self.is_main)

    def _print(self, text: str) -> None:
        if self.is_main:
            with suppress(OSError):  # a terminal that was closed must not end the run
                print(text, flush=True)

    # ----------------------------------------------------------------------------------- the training step

    def step(self) -> None:
        """One training step: loss and gradients of each batch, averaged over processes, clipped; update of the weights.

        On a GPU it returns before the device has finished. The losses of a step are read during the next one.
        """
        accelerator, vector = self.accelerator, self.weights.vector
        images, batches = self.next_batches or self.sample_batches(self.done)
        losses = self.add_gradients(batches)
        self._keep_good_weights(losses)
        if self.config.max_grad_norm:
            accelerator.clip_grad_norm_([vector], self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        if self.average:
            self.average.step([vector])
        # Prodigy multiplies the schedule by the rate that it has found
        learning_rate = self.lr_scheduler.get_last_lr()[0] * self.optimizer.param_groups[0].get("d", 1.0)
        self.lr_scheduler.step()  # also where loss scaling skipped the update, so that the schedule ends on time

        self.next_batches = self.sample_batches(self.done + 1)
        self.read_pending_losses()
        copied = torch.cuda.Event() if losses.is_cuda else None
        on_cpu = losses.to("cpu", non_blocking=True)
        self.pending = PendingLosses(self.done, images, learning_rate, on_cpu, copied)
        self.done = self.kept_step = self.done + 1
        if copied:
            copied.record()
        else:
            self.read_pending_losses()

    def add_gradients(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Adds the mean gradient of these batches of every process to that of the weights; the loss of each image."""
        accelerator, vector = self.accelerator, self.weights.vector
        losses = torch.cat([accelerator.gather(self.train_on_batch(**batch)) for batch in batches])
        if accelerator.num_processes > 1:
            vector.grad.copy_(accelerator.reduce(vector.grad, "mean"))
        return losses

    def sample_batches(self, step: int) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
        """The image numbers of a step, for all processes together, and this process's arguments of `train_on_batch`."""
        config, encoded, processes = self.config, self.encoded, self.accelerator.num_processes
        size, count = config.batch_size, config.gradient_accumulation_steps
        timesteps = self.scheduler.config.num_train_timesteps
        sample = draw_random_choices(config, step, processes * size * count, encoded, timesteps)
        bucket, batches = encoded.buckets[sample.bucket], []
        tensors = {name: x for name, x in vars(sample).items() if name != "bucket"}
        for i in range(count):
            first = (i * processes + self.accelerator.process_index) * size
            own = {name: self._to_device(x[first : first + size]) for name, x in tensors.items()}
            place, flip = own["place"], own["flip"]
            latents = bucket.mean[place, flip] + bucket.std[place, flip] * own["posterior_noise"]
            states = torch.where(own["drop_caption"][:, None, None], encoded.empty, encoded.text[own["text"]])
            batches.append(dict(latents=latents, noise=own["noise"], timesteps=own["timestep"], states=states))
            if bucket.weight is not None:
                batches[-1]["weight"] = bucket.weight[place, flip]
            if config.preserve:
                plain = encoded.empty if encoded.plain is None else encoded.plain[own["image"]]
                batches[-1]["kept_states"] = torch.where(own["preserve_empty"][:, None, None], encoded.empty, plain)
        return sample.image, batches

    def _to_device(self, x: torch.Tensor) -> torch.Tensor:
        device = self.accelerator.device
        return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)

    def _compute_gradients(self, latents, noise, timesteps, states, weight=None, kept_states=None) -> torch.Tensor:
        """The loss of each image of a batch, (B,); adds the gradient of their mean to `self.weights.vector.grad`."""
        self.weights.copy_to_model()
        with self.attention_precision(), self.saved_tensor_hooks:
            losses = training_loss(
                self.unet, self.scheduler, latents, noise, timesteps, states, self.config.min_snr_gamma, weight
            )
            self.accelerator.backward(losses.mean() / self.config.gradient_accumulation_steps)
            if kept_states is not None:
                kept = preservation.preservation_loss(self.unet, self.scheduler, latents, noise, timesteps, kept_states)
                factor = self.config.preserve / self.config.gradient_accumulation_steps
                self.accelerator.backward(kept.mean() * factor)
        self.weights.collect_gradients()
        return losses.detach()

    def _keep_good_weights(self, losses: torch.Tensor) -> None:
        """Copies the weights, before their update, if all losses so far are finite; does not wait for the GPU."""
        self.all_finite &= torch.isfinite(losses).all()
        torch.where(self.all_finite, self.weights.vector.detach(), self.good_weights, out=self.good_weights)

    def read_pending_losses(self) -> None:
        """Waits for the losses of the last step, checks that they are finite, and logs them.

        Raises:
            TrainError: if a loss is not finite, naming the images; the last good weights have been saved then.
        """
        if not self.pending:
            return
        (step, images, learning_rate, losses, copied), self.pending = self.pending, None
        if copied:
            copied.synchronize()
        bad = ~torch.isfinite(losses)
        if bad.any():
            names = list(dict.fromkeys(self.encoded.names[i] for i in images[bad].tolist()))
            every = " (every picture of the batch: the learning rate may be too high)" if bad.all() else ""
            self._save_good_weights_and_raise(
                f"the loss is not finite at step {step + 1}, for {', '.join(names)}{every}"
            )
        self.good_step = step
        self.losses.append(losses.mean().item())
        recent = self.losses[-20:]
        self.bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", lr=f"{learning_rate:.1e}", refresh=False)
        self.bar.update()
        if self.config.report_to:
            self.accelerator.log({"loss": self.losses[-1], "lr": learning_rate}, step=step + 1)

    # ------------------------------------------------------------------------- previews and the stopping rule

    def preview_and_check_stopping(self) -> bool:
        """Draws a preview and measures the held-out loss, where they are due. Returns whether the run should end."""
        every = self.config.preview_every
        if every and self.done % every == 0 and self.done < self.config.steps:
            self._draw_preview(self.output / "previews" / f"step-{self.done:06d}.png")
        return bool(self.config.stop_when and max_over_processes(self.accelerator, self._is_memorising()))

    def _is_memorising(self) -> bool:
        """Whether the held-out loss has risen; it is measured 20 times in a run."""
        if self.done % max(1, self.config.steps // 20):
            return False
        with self._evaluation_mode():
            self.heldout.measure(self.done, self.weights.vector)
        best_step = self.heldout.memorising_since()
        if best_step is None:
            return False
        self.bar.close()
        self._print(f"stopped at step {self.done}: the held-out loss has risen since step {best_step}")
        return True

    def _draw_preview(self, path: Path) -> list:
        """Measures the held-out loss, draws the preview prompts into a grid, and returns the images of the tuner.

        Only the main process draws; in the others the list is empty.
        """
        with self._evaluation_mode():
            self.heldout.measure(self.done, self.weights.vector)
            tuned = self.previews.draw_grid(path, f"tuned, step {self.kept_step}") if self.is_main else []
        if self.is_main and self.config.report_to:
            if self.done in self.heldout.losses:
                self.accelerator.log({"held-out loss": self.heldout.means()[self.done]}, step=self.done)
            setup.log_preview(self.accelerator, path, self.done)
        return tuned

    @contextmanager
    def _evaluation_mode(self):
        with self._averaged_weights():
            self.weights.copy_to_model()
            with evaluation_mode(self.pipe, self.accelerator.device):
                yield

    @contextmanager
    def _averaged_weights(self):
        """A context in which the weights are their moving average, if there is one; what is done to them is undone."""
        if not (self.average or self.heldout.best):
            yield
            return
        trained = self.weights.vector.detach().clone()
        if self.average:
            self.average.copy_to([self.weights.vector])
        try:
            yield
        finally:
            self.weights.vector.data.copy_(trained)

    # ------------------------------------------------------------------------------------------- checkpoints

    def write_checkpoint(self) -> None:
        """Writes checkpoints/step-N: the tuner in fp32, optimizer, schedule, loss scale, random states and losses.

        Raises:
            TrainError: if the weights are not finite; the last good ones have been saved then.
        """
        self.read_pending_losses()
        self._check_weights()
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() < 1:
            self._save_good_weights_and_raise(
                f"the gradients overflow in fp16 at step {self.done}, however small the loss is scaled"
            )
        state = CheckpointState(
            self.done, self.losses, self.heldout.losses, self.settings, asdict(self.tuner), self.heldout.best,
            self.digests,
        )  # fmt: skip
        if self.is_main:
            needed = setup.checkpoint_bytes(self.weights.vector, self.config)
            run_folder.require_space(self.output, needed, f"the checkpoint of step {self.done}")
        with checkpoints.new_checkpoint(self.output, self.done, self.accelerator) as folder:
            if self.is_main:
                if self.average:
                    self._save_tuner(folder / checkpoints.TRAINED_NAME, torch.float32)
                with self._averaged_weights():
                    self._save_tuner(folder / tuner_file.FILE_NAME, torch.float32)
                checkpoints.write_state(folder, state)
        if self.is_main:
            checkpoints.delete_old(self.output, self.config.keep_last, self.done)

    def _check_weights(self) -> None:
        if not torch.isfinite(self.weights.vector).all():
            self._save_good_weights_and_raise(f"the weights are not finite after step {self.done}")

    def save_result(self) -> None:
        """Writes the tuner file after the last step, before the last checkpoint, which may find the disk full."""
        self.read_pending_losses()
        self._check_weights()
        with self._evaluation_mode():
            self.heldout.measure(self.done, self.weights.vector)
        with self._averaged_weights():
            if self.heldout.best:
                self.kept_step, best_weights = self.heldout.best
                self.weights.vector.data.copy_(best_weights)
            if self.is_main:
                self._save_tuner(self.output / tuner_file.FILE_NAME)
        self.kept_step = self.done

    def _restore(self, folder: Path) -> None:
        """Continues from a checkpoint that was written with the same settings."""
        state = checkpoints.load(folder, self.accelerator, self.weights.named, self.settings, asdict(self.tuner))
        checkpoints.drop_what_changed(state, self.digests, self._print)
        setup.continue_schedule(self.lr_scheduler)
        if self.average:
            self.average.to(self.accelerator.device)
        self.done = self.kept_step = self.good_step = state.step
        self.losses = state.losses
        self.heldout.losses, self.heldout.best = state.heldout, state.best
        self.good_weights.copy_(self.weights.vector.detach())
        if self.done > self.config.steps:
            raise TrainError(f"{folder} is past --steps {self.config.steps}; give more steps")
        self._print(f"resumed at step {self.done}")

    def _save_tuner(self, path: Path, dtype: torch.dtype = torch.float16, thumbnail: str = "") -> Path:
        config = self.config
        training = {**self.settings, "preview_prompts": self.previews.prompts}
        training |= {"steps_done": self.kept_step, "images": len(self.encoded.names)}
        file = tuner_file.TunerFile(
            self.tuner, self.weights.named, self.base, config.trigger_words, training,
            author=config.author, license=config.license, thumbnail=thumbnail,
        )  # fmt: skip
        return tuner_file.save(path, file, dtype)

    def _save_good_weights_and_raise(self, problem: str) -> None:
        """Saves the last weights that gave a finite loss as last-good.safetensors, and raises a TrainError."""
        self.weights.vector.data.copy_(self.good_weights)
        self.kept_step = self.good_step
        path = self._save_tuner(run_folder.new_last_good_path(self.output)) if self.is_main else self.output
        self.close()
        raise TrainError(
            f"{problem}. The last good weights, of step {self.kept_step}, are in {path}. Look at these pictures, lower "
            "--learning_rate, or use --mixed_precision bf16 or no"
        )

    # ----------------------------------------------------------------------------------- after the last step

    def finish(self) -> Result:
        """Saves the tuner, draws the last preview, and checks that the file draws the same in a fresh pipeline."""
        self.read_pending_losses()
        self.bar.close()
        self.train_on_batch = None  # a captured CUDA graph holds memory
        with self._evaluation_mode():
            self.heldout.measure(self.done, self.weights.vector)
        if self.heldout.best:
            self.kept_step, best_weights = self.heldout.best
            self._print(self.heldout.describe_best())
            self.weights.vector.data.copy_(best_weights)
        elif self.average:
            self.average.copy_to([self.weights.vector])
        self.average = None  # what is drawn and saved from here on are these weights
        path, preview, plot = (self.output / n for n in (tuner_file.FILE_NAME, "preview.png", "loss.png"))
        if self.is_main:
            self._save_tuner(path)
            weights = self.weights.vector.data
            weights.copy_(weights.half())  # the file is fp16; the preview is drawn with exactly its weights
        tuned = self._draw_preview(preview)
        if self.config.preserve or self.config.trigger_words:
            with self._evaluation_mode():
                change = preservation.measure_change(self.unet, self.scheduler, self.encoded)
            self._print(preservation.describe_change(change, self.config.preserve))
        if self.is_main:
            self._save_tuner(path, thumbnail=grids.thumbnail(tuned[0]))
            peft_files.save_peft_files(self.output, tuner_file.load(path))
            tuner_file.write_text(self.output / hub.HELDOUT_NAME, json.dumps(self.heldout.means()) + "\n")
            plots.plot_losses(plot, self.losses, self.heldout.means(), f"{self.output.name}: {len(self.losses)} steps")
            self.pipe.to("cpu")
            difference = self.previews.verify_file(path, self.config.base, tuned[0])
            self._print(
                f"checked: a fresh pipeline draws the preview with the file (difference {difference:.2f} of 255)"
            )
        self.close()
        files = path, preview, plot, self.output / "config.json"
        return Result(self.is_main, *files, self.losses, self.heldout.means(), self.kept_step)

    def close(self) -> None:
        """Ends the progress bar and the trackers."""
        self.bar.close()
        self.accelerator.end_training()
