"""Runs that are stopped and resumed, through `sdtune.fit` on the small base."""

import os
import signal

import pytest
import torch
from accelerate import Accelerator
from training_runs import have_equal_tensors, last_checkpoint, short_run

import sdtune
from sdtune.adapters import tuner_file
from sdtune.training import errors, trainer

pytestmark = pytest.mark.usefixtures("without_final_check")


def test_stopping_at_10_and_resuming_gives_the_weights_of_20_straight_steps_bit_for_bit(pairs, tmp_path, monkeypatch):
    changes = dict(steps=20, lr_scheduler="cosine", lr_warmup_steps=3, caption_dropout=0.5, noise_offset=0.1, flip=True)
    tuner = sdtune.TunerConfig(attn_drop=0.1, proj_drop=0.1)
    sdtune.fit(short_run(pairs, tmp_path / "straight", **changes), tuner)

    step = trainer.Trainer.step

    def step_and_press_ctrl_c(self):
        step(self)
        if self.done == 10:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer.Trainer, "step", step_and_press_ctrl_c)
    with pytest.raises(errors.Stopped, match="stopped at step 10 of 20.*--resume") as stop:
        sdtune.fit(short_run(pairs, tmp_path / "broken", **changes), tuner)
    assert stop.value.signum == signal.SIGINT
    monkeypatch.setattr(trainer.Trainer, "step", step)
    torch.rand(7)  # resuming does not depend on the state of the process
    result = sdtune.fit(short_run(pairs, tmp_path / "broken", **changes, resume=True), tuner)
    assert have_equal_tensors(last_checkpoint(tmp_path / "straight/run"), last_checkpoint(tmp_path / "broken/run"))
    assert len(result.losses) == 20


def test_an_unfinished_run_is_not_overwritten_and_resuming_names_what_has_changed(pairs, tmp_path):
    with pytest.raises(errors.TrainError, match="nothing to resume"):
        sdtune.fit(short_run(pairs, tmp_path, resume=True))
    sdtune.fit(short_run(pairs, tmp_path, steps=1))
    for file in (tmp_path / "run").glob("*.safetensors"):  # as after kill -9
        file.unlink()
    with pytest.raises(errors.TrainError, match="stopped at step 1.*--resume"):
        sdtune.fit(short_run(pairs, tmp_path))
    with pytest.raises(errors.TrainError, match="batch_size was 2 and is 3; seed was 0 and is 5"):
        sdtune.fit(short_run(pairs, tmp_path, batch_size=3, seed=5, resume=True))
    assert len(sdtune.fit(short_run(pairs, tmp_path, steps=2, resume=True)).losses) == 2


def test_more_steps_continue_on_their_own_schedule(pairs, tmp_path):
    straight, rates = trainer.Trainer(short_run(pairs, tmp_path / "straight", steps=6), sdtune.TunerConfig()), []
    for _ in range(6):
        rates.append(straight.optimizer.param_groups[0]["lr"])
        straight.step()
    straight.close()
    sdtune.fit(short_run(pairs, tmp_path, steps=3))  # its rate has come down to 0
    resumed = trainer.Trainer(short_run(pairs, tmp_path, steps=6, resume=True), sdtune.TunerConfig())
    resumed.close()
    assert resumed.done == 3 and resumed.optimizer.param_groups[0]["lr"] == rates[3] > 0


def test_a_full_memory_is_no_damage_of_a_checkpoint(pairs, tmp_path, monkeypatch):
    sdtune.fit(short_run(pairs, tmp_path, steps=1))

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Accelerator, "load_state", fail)
    with pytest.raises(torch.OutOfMemoryError):
        sdtune.fit(short_run(pairs, tmp_path, steps=2, resume=True))


def test_a_nan_loss_right_after_resuming_keeps_the_weights_of_the_checkpoint(pairs, tmp_path, monkeypatch):
    sdtune.fit(short_run(pairs, tmp_path, steps=2))
    saved = tuner_file.load(tmp_path / "run/checkpoints/step-000002").tensors
    monkeypatch.setattr(trainer, "training_loss", lambda *args: torch.full((2,), float("nan"), requires_grad=True))
    with pytest.raises(errors.TrainError, match="not finite at step 3.*of step 2"):
        sdtune.fit(short_run(pairs, tmp_path, steps=4, resume=True))
    file = tuner_file.load(tmp_path / "run")
    assert file.training["steps_done"] == 2
    assert all(torch.equal(file.tensors[k], t.half()) for k, t in saved.items())
