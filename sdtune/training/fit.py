"""`fit` trains a tuner on images and their captions: it makes a `Trainer` and calls it step by step."""

import signal
from collections.abc import Callable

from .. import extras
from ..adapters import hub, tuner_file
from ..tuners.config import TunerConfig, settings_without_effect
from . import checkpoints, run_folder
from .accelerator import max_over_processes
from .config import TrainConfig
from .errors import Stopped, TrainError
from .signals import CatchSignals
from .trainer import Result, Trainer


def fit(
    config: TrainConfig, tuner: TunerConfig | None = None, on_step: Callable[[int, float], bool | None] | None = None
) -> Result:
    """Trains a tuner on a folder of images with captions.

    Writes into `config.output`, by default the first free one of output/anime, output/anime-2, ...:
    tuner.safetensors, preview.png, loss.png, config.json, heldout.json, checkpoints/ and previews/, and for PEFT
    adapter_config.json with adapter_model.safetensors.

    Args:
        tuner: what to train; by default what `config.init` holds, else `TunerConfig()`, which is Algorithm 1; the
            default of train_anime.py and the page is `config.DEFAULT_KIND`.
        on_step: called after each step with the number of finished steps and the last loss (on a GPU, after the next
            step has begun). If it returns True, the run stops as it does after a signal.

    Raises:
        extras.MissingPackages: if a package of the extra `train` is not installed.
        DataError, BaseError: before any training, with everything that is wrong with the data or the base.
        Stopped: after a signal, once a checkpoint has been written.
        TrainError: if a setting of the tuner has no effect on its kind; if the output folder holds what an earlier run
            has trained and `resume` is off, or is in use; if there is nothing to resume, if the disk is full, or if the
            loss is not finite; in that case the last good weights are in the output folder.
    """
    extras.check("train")
    if tuner is None:
        tuner = tuner_file.load(config.init).config if config.init else TunerConfig()
    elif not (config.init or config.resume) and (unused := settings_without_effect(tuner)):
        found = ", ".join(f"{name} is {getattr(tuner, name)!r}" for name in unused)
        raise TrainError(f"{found}, which has no effect on a tuner of kind {tuner.kind}; leave it out")
    with run_folder.RunFolder() as folder:
        return _run(Trainer(config, tuner, folder), on_step)


def _run(trainer: Trainer, on_step: Callable[[int, float], bool | None] | None) -> Result:
    config = trainer.config
    with CatchSignals() as signals:
        # a resumed run may have been stopped after its checkpoint was written and before its preview was drawn
        ended = trainer.done and trainer.preview_and_check_stopping()
        while trainer.done < config.steps and not ended:
            known_losses = len(trainer.losses)
            trainer.step()
            checkpoint_due = trainer.done % config.checkpoint_every == 0 or trainer.done == config.steps
            if checkpoint_due:
                trainer.read_pending_losses()
            has_new_loss = len(trainer.losses) > known_losses
            stop_requested = on_step and has_new_loss and on_step(len(trainer.losses), trainer.losses[-1])
            if trainer.done == config.steps:
                trainer.save_result()
            own = signals.number or (signal.SIGTERM if stop_requested else 0)
            stop = max_over_processes(trainer.accelerator, own)
            if checkpoint_due or stop:
                trainer.write_checkpoint()
            if stop:
                trainer.close()
                raise Stopped(
                    f"stopped at step {trainer.done} of {config.steps}; a checkpoint is in "
                    f"{trainer.output / checkpoints.FOLDER}. Continue with the same command and --resume", stop
                )  # fmt: skip
            ended = trainer.preview_and_check_stopping()
    result = trainer.finish()
    if result.main and config.push_to_hub:
        try:
            print(f"pushed to {hub.push_to_hub(trainer.output, config.push_to_hub)}", flush=True)
        except Exception as error:  # the hub's client raises many kinds; the result is on the disk whatever it was
            print(hub.how_to_push_again(trainer.output, config.push_to_hub, error), flush=True)
    return result
