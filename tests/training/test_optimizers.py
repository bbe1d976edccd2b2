"""Prodigy, the moving average of the weights, preservation, and how many checkpoints are kept."""

import pytest
import torch
from training_runs import have_equal_tensors, last_checkpoint, short_run

import sdtune
from sdtune.adapters import tuner_file
from sdtune.training import preservation, trainer

pytestmark = pytest.mark.usefixtures("without_final_check")

RUNS = ("straight", "broken")


def interrupt_at(monkeypatch, last: int):
    step = trainer.Trainer.step

    def step_or_stop(self):
        if self.done == last:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(trainer.Trainer, "step", step_or_stop)
    return lambda: monkeypatch.setattr(trainer.Trainer, "step", step)


def test_with_all_of_them_a_killed_run_resumes_to_the_same_bits(pairs, tmp_path, monkeypatch):
    changes = dict(optimizer="prodigy", learning_rate=None, ema_decay=0.5, preserve=0.3, trigger_words="sks",
                   caption_dropout=0.0, resolution=128, checkpoint_every=1, keep_last=2)  # fmt: skip
    straight = sdtune.fit(short_run(pairs, tmp_path / "straight", **changes))
    let_go = interrupt_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        sdtune.fit(short_run(pairs, tmp_path / "broken", **changes))
    let_go()
    resumed = sdtune.fit(short_run(pairs, tmp_path / "broken", **changes, resume=True))
    assert resumed.losses == straight.losses
    for name in ("tuner.safetensors", "trained.safetensors"):
        one, other = (
            tuner_file.load(tmp_path / n / "run/checkpoints/step-000004", name) for n in ("straight", "broken")
        )
        assert have_equal_tensors(one.tensors, other.tensors)
    assert have_equal_tensors(tuner_file.load(straight.tuner).tensors, tuner_file.load(resumed.tuner).tensors)
    kept = sorted(folder.name for folder in (tmp_path / "broken/run/checkpoints").iterdir())
    assert kept == ["step-000003", "step-000004"]


def test_the_file_holds_the_moving_average_of_the_weights_after_each_step(pairs, tmp_path, monkeypatch):
    weights, step = [], trainer.Trainer.step

    def noted(self):
        step(self)
        weights.append({name: tensor.clone() for name, tensor in self.weights.named.items()})

    monkeypatch.setattr(trainer.Trainer, "step", noted)
    result = sdtune.fit(short_run(pairs, tmp_path, ema_decay=0.3, resolution=64))
    average = weights[0]
    for number, now in enumerate(weights[1:], 1):
        decay = min(0.3, (1 + number) / (10 + number))
        average = {name: decay * average[name] + (1 - decay) * now[name] for name in now}
    saved, checkpoint = tuner_file.load(result.tuner).tensors, last_checkpoint(tmp_path / "run")
    for name, wanted in average.items():
        torch.testing.assert_close(saved[name].float(), wanted, rtol=2e-3, atol=1e-5)
        torch.testing.assert_close(checkpoint[f"unet.{name}"], wanted)
    assert any((average[n] - weights[-1][n]).abs().max() > 1e-5 for n in average)


def test_prodigy_finds_a_rate(pairs, tmp_path, monkeypatch):
    rates, read = [], trainer.Trainer.read_pending_losses

    def noted(self):
        if self.pending:
            rates.append(self.pending.learning_rate)
        read(self)

    monkeypatch.setattr(trainer.Trainer, "read_pending_losses", noted)
    # the factor spares the test the hundred steps that Prodigy takes from its first rate, 1e-6
    changes = dict(optimizer="prodigy", learning_rate=100.0, lr_scheduler="constant", resolution=64, steps=12)
    result = sdtune.fit(short_run(pairs, tmp_path, **changes))
    assert rates == sorted(rates) and rates[-1] > rates[0] > 0
    assert tuner_file.load(result.tuner).training["optimizer"] == "prodigy"


def test_preservation_pulls_the_prediction_back_to_the_bases_where_trigger_words_are_missing(pairs, tmp_path, capsys):
    changes = dict(trigger_words="sks", caption_dropout=0.0, steps=6, learning_rate=3e-3, resolution=64)
    measured = {}
    for weight in (0.0, 20.0):
        sdtune.fit(short_run(pairs, tmp_path / str(weight), preserve=weight, **changes))
        (line,) = [text for text in capsys.readouterr().out.splitlines() if "without the trigger words the" in text]
        measured[weight] = float(line.split(" by ")[1].split("%")[0])
    assert measured[20.0] < 0.8 * measured[0.0]


def test_the_preservation_loss_of_a_fresh_tuner_is_zero_and_its_gradient_comes_from_the_tuned_prediction_alone(pipe):
    from diffusers import DDPMScheduler

    sdtune.add_tuner(pipe, adapter_name="a")
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    given = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    states = torch.randn(2, 77, pipe.unet.config.cross_attention_dim)
    loss = preservation.preservation_loss(pipe.unet, scheduler, *given, states)
    assert loss.shape == (2,) and loss.abs().max() < 1e-9 and loss.requires_grad
    assert pipe.get_active_adapters() == ["a"]


def test_what_preserve_means_with_other_settings_is_said(pairs, tmp_path, capsys):
    sdtune.fit(short_run(pairs, tmp_path, steps=1, preserve=1.0, caption_dropout=0.1, resolution=64))
    out = capsys.readouterr().out
    assert "for the empty caption only, since there are no --trigger_words" in out
    assert "--caption_dropout 0 ends this contradiction" in out


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(ema_decay=1.0), "ema_decay is 1.0; it must be at least 0 and below 1"),
        (dict(keep_last=0), "keep_last is 0; it must be at least 1"),
        (dict(preserve=-1), "preserve is -1; it must be at least 0"),
        (dict(optimizer="sgd"), "optimizer is 'sgd'; possible: adamw, prodigy"),
    ],
)
def test_options_out_of_range_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        sdtune.TrainConfig(**options)
