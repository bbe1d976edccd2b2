"""What the trainer promises, through `sdtune.fit` on the real small base."""

import json
import os
import signal
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import sdtune
from sdtune.adapters import api, tuner_file
from sdtune.bases import load
from sdtune.training import dataset, encoding, errors, launch, loss, sample_step, trainer


def small(pairs, tmp_path, **changes):
    """A run of a few seconds."""
    values = {
        "data": str(pairs), "output": str(tmp_path / "run"), "steps": 4, "batch_size": 2, "preview_steps": 1,
        "preview_every": 0, "preview_prompts": ["a girl with blue hair"], "learning_rate": 1e-3,
    }  # fmt: skip
    return sdtune.TrainConfig(**{**values, **changes})


def weights(folder):
    return load_file(sorted(folder.glob("checkpoints/step-*"))[-1] / "tuner.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_leaves_tuner_preview_losses_and_settings(pairs, tmp_path):
    result = sdtune.fit(small(pairs, tmp_path, trigger_words="tok style", preview_prompts=[], preview_every=2))
    assert len(result.losses) == 4 and set(result.heldout) == {0, 2, 4}
    with safe_open(result.tuner, "pt") as file:
        metadata, keys = file.metadata(), list(file.keys())
    assert all(".res_attn" not in k and k.endswith(("qkv.weight", "o.weight", "o.bias")) for k in keys)
    assert metadata["modelspec.trigger_phrase"] == "tok style"
    assert json.loads(metadata["sdtune.training"])["steps_done"] == 4
    assert json.loads(metadata["sdtune.base"])["name"] == "tiny-sd"
    settings_ = json.loads(result.config.read_text())
    assert settings_["train"]["learning_rate"] == 1e-3 and settings_["tuner"]["rank"] == 4
    preview = Image.open(result.preview)
    assert preview.width > 600 and Image.open(result.loss_plot).width > 400  # base, tuned and true columns
    assert (tmp_path / "run/previews/step-000002.png").exists()
    assert not list(tmp_path.rglob("*.part"))


def test_the_saved_file_draws_what_training_drew_and_not_what_the_base_draws(pairs, tmp_path, capsys):
    sdtune.fit(small(pairs, tmp_path))
    assert "draws the preview (difference 0.00 of 255)" in capsys.readouterr().out


def test_stopping_at_10_and_resuming_gives_the_weights_of_20_straight_steps_bit_for_bit(pairs, tmp_path, monkeypatch):
    changes = dict(steps=20, lr_scheduler="cosine", lr_warmup_steps=3, caption_dropout=0.5, noise_offset=0.1, flip=True)
    tuner = sdtune.TunerConfig(attn_drop=0.1, proj_drop=0.1)
    sdtune.fit(small(pairs, tmp_path / "straight", **changes), tuner)

    step = trainer.Trainer.step

    def step_and_press_ctrl_c(self):
        step(self)
        if self.done == 10:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer.Trainer, "step", step_and_press_ctrl_c)
    with pytest.raises(errors.Stopped, match="stopped at step 10 of 20.*--resume") as stop:
        sdtune.fit(small(pairs, tmp_path / "broken", **changes), tuner)
    assert stop.value.signum == signal.SIGINT
    monkeypatch.setattr(trainer.Trainer, "step", step)
    torch.rand(7)  # resuming does not depend on the state of the process
    result = sdtune.fit(small(pairs, tmp_path / "broken", **changes, resume=True), tuner)
    assert same(weights(tmp_path / "straight/run"), weights(tmp_path / "broken/run"))
    assert len(result.losses) == 20


def test_an_unfinished_run_is_not_overwritten_and_resuming_names_what_has_changed(pairs, tmp_path):
    with pytest.raises(errors.TrainError, match="nothing to resume"):
        sdtune.fit(small(pairs, tmp_path, resume=True))
    sdtune.fit(small(pairs, tmp_path, steps=1))
    (tmp_path / "run/tuner.safetensors").unlink()  # as after kill -9
    with pytest.raises(errors.TrainError, match="stopped at step 1.*--resume"):
        sdtune.fit(small(pairs, tmp_path))
    with pytest.raises(errors.TrainError, match="batch_size was 2 and is 3; seed was 0 and is 5"):
        sdtune.fit(small(pairs, tmp_path, batch_size=3, seed=5, resume=True))
    assert len(sdtune.fit(small(pairs, tmp_path, steps=2, resume=True)).losses) == 2


def test_a_picture_with_a_nan_loss_is_named_and_the_last_good_weights_are_kept(pairs, tmp_path, monkeypatch):
    encode = encoding.encode

    def poisoned(given, *args):
        encoded = encode(given, *args)
        if len(given) == 5:
            encoded.mean[3] = float("nan")
        return encoded

    monkeypatch.setattr(dataset, "encode", poisoned)
    with pytest.raises(errors.TrainError, match="not finite.*for 3.png") as error:
        sdtune.fit(small(pairs, tmp_path))
    assert "0.png" not in str(error.value)
    file = sdtune.store.load(tmp_path / "run")
    assert all(torch.isfinite(t).all() for t in file.tensors.values())


def test_a_nan_loss_right_after_resuming_keeps_the_weights_of_the_checkpoint(pairs, tmp_path, monkeypatch):
    sdtune.fit(small(pairs, tmp_path, steps=2))
    saved = sdtune.store.load(tmp_path / "run/checkpoints/step-000002").tensors
    monkeypatch.setattr(trainer, "training_loss", lambda *args: torch.full((2,), float("nan"), requires_grad=True))
    with pytest.raises(errors.TrainError, match="not finite at step 3.*of step 2"):
        sdtune.fit(small(pairs, tmp_path, steps=4, resume=True))
    file = sdtune.store.load(tmp_path / "run")
    assert file.training["steps_done"] == 2
    assert all(torch.equal(file.tensors[k], t.half()) for k, t in saved.items())


def test_weights_that_the_last_update_has_spoilt_are_not_saved(pairs, tmp_path):
    with pytest.raises(errors.TrainError, match="weights are not finite after step 1.*of step 0"):
        sdtune.fit(small(pairs, tmp_path, learning_rate=1e39, steps=1))
    assert all(torch.isfinite(t).all() for t in sdtune.store.load(tmp_path / "run").tensors.values())


def test_a_learning_rate_that_blows_up_keeps_weights_that_had_a_finite_loss(pairs, tmp_path):
    with pytest.raises(errors.TrainError, match="not finite"):
        sdtune.fit(small(pairs, tmp_path, learning_rate=1e30, steps=8))
    sdtune.store.load(tmp_path / "run")


def test_all_data_problems_are_told_before_a_model_is_loaded(pairs, tmp_path, monkeypatch):
    (pairs / "train/0.txt").unlink()
    (pairs / "train/1.txt").write_text(" ")
    (pairs / "train/2.png").write_bytes(b"no picture")
    monkeypatch.setattr(load, "load_base", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(sdtune.DataError) as error:
        sdtune.fit(small(pairs, tmp_path))
    assert len(error.value.problems) == 3
    assert not (tmp_path / "run").exists()


def test_gradients_are_clipped_before_the_update(pairs, tmp_path, monkeypatch):
    norms, update = [], torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        norms.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm().item())
        return update(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    sdtune.fit(small(pairs, tmp_path, max_grad_norm=0))
    free, norms[:] = norms[:], []
    sdtune.fit(small(pairs, tmp_path, max_grad_norm=1e-4))
    assert min(free) > 1e-3 and norms == pytest.approx([1e-4] * 4, rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        dict(batch_size=2, gradient_accumulation_steps=2),
        dict(batch_size=4, gradient_checkpointing=True),
    ],
    ids=["accumulation", "checkpointing"],
)
def test_accumulation_and_checkpointing_change_memory_not_the_result(pairs, tmp_path, changes):
    plain = sdtune.fit(small(pairs, tmp_path / "plain", batch_size=4))
    other = sdtune.fit(small(pairs, tmp_path / "other", **changes))
    assert other.losses == pytest.approx(plain.losses, rel=1e-4)


def test_bf16_trains_on_cpu_and_fp16_says_what_it_needs(pairs, tmp_path):
    result = sdtune.fit(small(pairs, tmp_path, mixed_precision="bf16"))
    assert all(t.dtype == torch.float32 for t in weights(tmp_path / "run").values()) and len(result.losses) == 4
    saving = small(pairs, tmp_path / "saving", mixed_precision="bf16", gradient_checkpointing=True)
    assert sdtune.fit(saving).losses == pytest.approx(result.losses, rel=0.02)
    if not torch.cuda.is_available():
        with pytest.raises(errors.TrainError, match="fp16"):
            sdtune.fit(small(pairs, tmp_path, mixed_precision="fp16"))


def test_a_run_that_memorises_stops_and_keeps_the_tuner_from_before_that(pairs, tmp_path, monkeypatch, capsys):
    curve, seen = {0: 0.3, 2: 0.2, 4: 0.1, 6: 0.15, 8: 0.2}, {}

    def errors(self):
        seen[self.done] = {k: p.detach().half() for k, p in self.weights.named.items()}
        return [curve[self.done], curve[self.done] + 0.01]

    monkeypatch.setattr(trainer.Trainer, "_heldout_errors", errors)
    result = sdtune.fit(small(pairs, tmp_path, steps=40, stop_when="memorising"))
    assert result.steps == 4 and len(result.losses) == 8
    assert "the held-out loss has risen since step 4" in capsys.readouterr().out
    file = tuner_file.load(result.tuner)
    assert file.training["steps_done"] == 4
    assert same(file.tensors, seen[4])
    (pairs / "test").rename(pairs.parent / "elsewhere")
    with pytest.raises(errors.TrainError, match="has none; move some pairs"):
        sdtune.fit(small(pairs, tmp_path / "other", stop_when="memorising"))


def test_tensorboard_gets_losses_through_accelerate(pairs, tmp_path):
    sdtune.fit(small(pairs, tmp_path, report_to="tensorboard"))
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_wrong_settings_are_listed_at_once():
    with pytest.raises(ValueError) as error:
        sdtune.TrainConfig(steps=0, learning_rate=-1, caption_dropout=2, resolution=100, lr_scheduler="zigzag")
    assert all(
        word in str(error.value) for word in ("steps", "learning_rate", "caption_dropout", "resolution", "zigzag")
    )


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 40), batch=st.integers(1, 12), ranks=st.integers(1, 3), steps=st.integers(1, 12),
    seed=st.integers(0, 2**40),
)  # fmt: skip
def test_every_picture_is_seen_equally_often_by_any_number_of_processes(count, batch, ranks, steps, seed):
    encoded = encoding.Encoded(["x"] * count, torch.zeros(count, 2, 4, 2, 2), None, None, None)
    config = sdtune.TrainConfig(seed=seed)
    drawn = [sample_step.sample_step(config, s, ranks * batch, encoded, 1000) for s in range(steps)]
    seen = Counter(i for d in drawn for i in d.index.tolist())
    assert max(seen.values()) - min(seen[i] for i in range(count)) <= 1
    again = sample_step.sample_step(config, steps - 1, ranks * batch, encoded, 1000)
    assert torch.equal(again.noise, drawn[-1].noise) and torch.equal(again.timestep, drawn[-1].timestep)
    assert all(((d.timestep >= 0) & (d.timestep < 1000)).all() for d in drawn)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_weighted_error_of_noise_or_velocity(prediction):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                              prediction_type=prediction)  # fmt: skip
    x, noise, guess = torch.randn(3, 3, 4, 8, 8)
    t = torch.tensor([5, 400, 900])
    a = scheduler.alphas_cumprod[t].view(3, 1, 1, 1)
    target = noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * x
    snr = (a / (1 - a)).flatten()
    weight = snr.clamp(max=5) / (snr if prediction == "epsilon" else snr + 1)
    plain = (guess - target).pow(2).mean((1, 2, 3))

    def unet(noisy, *_, **__):
        assert torch.allclose(noisy, a.sqrt() * x + (1 - a).sqrt() * noise)
        return (guess,)

    states = torch.zeros(3, 1, 1)
    assert torch.allclose(loss.training_loss(unet, scheduler, x, noise, t, states), plain)
    assert torch.allclose(loss.training_loss(unet, scheduler, x, noise, t, states, 5.0), plain * weight, rtol=1e-4)


def test_a_noise_offset_moves_each_channel_as_a_whole():
    encoded = encoding.Encoded(["x"] * 3, torch.zeros(3, 1, 4, 8, 8), None, None, None)
    with_it, without = (
        sample_step.sample_step(sdtune.TrainConfig(noise_offset=offset), 0, 3, encoded, 1000).noise
        for offset in (0.5, 0.0)
    )
    moved = (with_it - without).flatten(2)
    assert torch.allclose(moved, moved[:, :, :1].expand_as(moved), atol=1e-5) and moved[..., 0].unique().numel() == 12


@pytest.mark.parametrize(
    "shape, expected",
    [("constant", [0.5, 1, 1, 1, 1]), ("linear", [0.5, 1, 0.75, 0.5, 0.25]), ("cosine", [0.5, 1, 0.854, 0.5, 0.146])],
)
def test_the_rate_rises_and_falls_as_asked(pairs, tmp_path, monkeypatch, shape, expected):
    rates, step = [], torch.optim.AdamW.step

    def noted(optimizer, *args, **kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    sdtune.fit(small(pairs, tmp_path, steps=6, lr_scheduler=shape, lr_warmup_steps=2))
    assert [r / 1e-3 for r in rates[1:]] == pytest.approx(expected, abs=1e-3)


def test_a_dropped_caption_is_the_empty_one(pairs, tmp_path, monkeypatch):
    seen, plain = {}, trainer.training_loss

    def noted(unet, scheduler, latents, noise, timesteps, states, gamma=0.0):
        if gamma:
            seen.setdefault(dropout, []).append(states)
        return plain(unet, scheduler, latents, noise, timesteps, states, gamma)

    monkeypatch.setattr(trainer, "training_loss", noted)
    for dropout in (0.0, 1.0):
        sdtune.fit(small(pairs, tmp_path / str(dropout), steps=1, caption_dropout=dropout))
    (kept,), (dropped,) = seen[0.0], seen[1.0]
    assert torch.equal(dropped[0], dropped[1]) and not torch.equal(kept[0], kept[1])
    pipe = sdtune.load_base("tiny-sd")
    empty = encoding.encode_text([""], pipe.tokenizer, pipe.text_encoder)
    assert torch.allclose(dropped[:1], empty, atol=1e-5)


def test_attention_in_fp32_changes_a_bf16_gradient_by_rounding_only():
    unet = sdtune.load_base("tiny-sd").unet.requires_grad_(False)
    api.add_tuner(unet, sdtune.TunerConfig(), "tuner")
    parameters = list(api.tuner_parameters(unet, "tuner").values())
    torch.manual_seed(0)
    for p in parameters:
        torch.nn.init.normal_(p, std=0.05)
    scheduler = DDPMScheduler.from_pretrained(load.TINY_SD / "scheduler")
    latents, noise = torch.randn(2, 2, unet.config.in_channels, 16, 16)
    states = torch.randn(2, 77, unet.config.cross_attention_dim, dtype=torch.bfloat16)
    timesteps = torch.tensor([100, 700])

    def gradient(attention, dtype=torch.bfloat16) -> torch.Tensor:
        unet.to(dtype)
        with attention():
            loss.training_loss(unet, scheduler, latents, noise, timesteps, states.to(dtype)).mean().backward()
        found = torch.cat([p.grad.flatten().float() for p in parameters])
        for p in parameters:
            p.grad = None
        return found

    exact = gradient(nullcontext, torch.float32)
    plain, fast = gradient(nullcontext), gradient(loss.AttentionInFp32)
    assert not torch.equal(plain, fast)
    assert (fast - exact).norm() <= 1.2 * (plain - exact).norm() < 0.3 * exact.norm()


@pytest.mark.parametrize("environment, command, config, chosen", [
    ({}, None, False, False),
    ({"ACCELERATE_MIXED_PRECISION": "no"}, None, False, True),
    ({"ACCELERATE_MIXED_PRECISION": "no"}, "python accelerate launch train_anime.py", False, False),
    ({"ACCELERATE_MIXED_PRECISION": "no"}, "python -m accelerate.commands.launch train_anime.py", False, False),
    ({"ACCELERATE_MIXED_PRECISION": "no"}, "python accelerate launch --mixed_precision=no x.py", False, True),
    ({"ACCELERATE_MIXED_PRECISION": "no"}, "python accelerate launch --config-file a.yaml x.py", False, True),
    ({"ACCELERATE_MIXED_PRECISION": "no"}, "python accelerate launch train_anime.py", True, True),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "python accelerate launch train_anime.py", False, True),
])  # fmt: skip
def test_the_precision_that_accelerate_takes_for_want_of_a_choice_is_no_choice(
    environment, command, config, chosen, monkeypatch, tmp_path
):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    parent = SimpleNamespace(cmdline=lambda: (command or "bash").split())
    monkeypatch.setattr(launch.psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
    file = tmp_path / "default_config.yaml"
    file.touch() if config else None
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(file))
    assert launch.is_precision_chosen() is chosen
