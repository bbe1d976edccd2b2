"""What a training run promises, through `sdtune.fit` on the small base."""

import base64
import copy
import io
import json

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing import event_accumulator
from training_runs import last_checkpoint, short_run

import sdtune
from sdtune.adapters import tuner_file
from sdtune.bases import load
from sdtune.bases.text_encoding import encode_texts
from sdtune.training import encoding, errors, trainer


def test_a_run_leaves_tuner_preview_losses_and_settings(pairs, tmp_path):
    config = short_run(pairs, tmp_path, trigger_words="tok style", preview_prompts=[], preview_every=2, author="Ann",
                       license="cc-by-4.0", resolution=256)  # fmt: skip
    result = sdtune.fit(config)
    assert len(result.losses) == 4 and set(result.heldout) == {0, 2, 4}
    with safe_open(result.tuner, "pt") as file:
        metadata, keys = file.metadata(), list(file.keys())
    assert all(".res_attn" not in k and k.endswith(("qkv.weight", "o.weight", "o.bias")) for k in keys)
    assert metadata["modelspec.trigger_phrase"] == "tok style"
    assert metadata["modelspec.author"] == "Ann" and metadata["modelspec.license"] == "cc-by-4.0"
    jpeg = base64.b64decode(metadata["modelspec.thumbnail"].removeprefix("data:image/jpeg;base64,"))
    thumbnail = Image.open(io.BytesIO(jpeg)).convert("L")
    assert thumbnail.size == (256, 256) and thumbnail.getextrema() != (0, 0) and len(jpeg) < 40_000
    assert json.loads(metadata["sdtune.training"])["steps_done"] == 4
    assert json.loads(metadata["sdtune.base"])["name"] == "tiny-sd"
    settings_ = json.loads(result.config.read_text())
    assert (
        settings_["train"]["learning_rate"] == settings_["resolved"]["learning_rate"] == 1e-3
        and settings_["tuner"]["rank"] == 4
    )
    preview = Image.open(result.preview)
    assert preview.width > 600 and Image.open(result.loss_plot).width > 400  # base, tuned and true columns
    assert (tmp_path / "run/previews/step-000002.png").exists()
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "tuner, found",
    [
        (dict(kind="lora", num_heads=8, length=5), "num_heads is 8, length is 5"),
        (dict(kind="res_adapter", rank=8), "rank is 8"),
        (dict(kind="res_attn_layer", qkv_bias=True), "qkv_bias is True"),
        (dict(kind="full", rank=8), "rank is 8"),
    ],
)
def test_a_setting_without_effect_on_the_kind_of_tuner_is_refused(pairs, tmp_path, tuner, found):
    with pytest.raises(errors.TrainError, match=f"^{found}, which has no effect on a tuner of kind {tuner['kind']};"):
        sdtune.fit(short_run(pairs, tmp_path), sdtune.TunerConfig(**tuner))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["res_attn", "dora"])
def test_peft_loads_the_folder_of_a_run_and_computes_what_the_tuner_file_does(base, pairs, tmp_path, kind):
    result = sdtune.fit(short_run(pairs, tmp_path, steps=2), sdtune.TunerConfig(kind=kind, ops=["attn1", "ff"]))
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 77, base.unet.config.cross_attention_dim)
    expected, found = copy.deepcopy(base.unet), copy.deepcopy(base.unet)
    sdtune.load_tuner(expected, result.tuner)
    found = PeftModel.from_pretrained(found, result.tuner.parent)
    with torch.no_grad():
        assert torch.equal(found(x, 500, text).sample, expected(x, 500, text).sample)
        assert not torch.equal(found(x, 500, text).sample, base.unet(x, 500, text).sample)
    assert (result.tuner.parent / "adapter_model.safetensors").stat().st_mode == result.tuner.stat().st_mode
    result.tuner.unlink()  # what PEFT reads is as dear
    with pytest.raises(errors.TrainError, match="holds a finished tuner, adapter_model.safetensors"):
        sdtune.fit(short_run(pairs, tmp_path, steps=2))


def test_the_saved_file_draws_what_training_drew_and_not_what_the_base_draws(pairs, tmp_path, capsys):
    sdtune.fit(short_run(pairs, tmp_path))
    assert "draws the preview with the file (difference 0.00 of 255)" in capsys.readouterr().out


def test_a_picture_with_a_nan_loss_is_named_and_the_last_good_weights_are_kept(pairs, tmp_path, monkeypatch):
    encode = encoding.encode

    def encode_with_nan(given, *args):
        encoded = encode(given, *args)
        if len(given) == 5:
            encoded.buckets[0].mean[3] = float("nan")
        return encoded

    monkeypatch.setattr(encoding, "encode", encode_with_nan)
    with pytest.raises(errors.TrainError, match="not finite.*for 3.png") as error:
        sdtune.fit(short_run(pairs, tmp_path))
    assert "0.png" not in str(error.value)
    file = tuner_file.load(tmp_path / "run")
    assert all(torch.isfinite(t).all() for t in file.tensors.values())


def test_weights_that_the_last_update_made_infinite_are_not_saved(pairs, tmp_path):
    with pytest.raises(errors.TrainError, match="weights are not finite after step 1.*of step 0"):
        sdtune.fit(short_run(pairs, tmp_path, learning_rate=1e39, steps=1))
    assert all(torch.isfinite(t).all() for t in tuner_file.load(tmp_path / "run").tensors.values())


def test_a_diverging_run_keeps_the_last_weights_with_a_finite_loss(pairs, tmp_path):
    with pytest.raises(errors.TrainError, match="not finite"):
        sdtune.fit(short_run(pairs, tmp_path, learning_rate=1e30, steps=8))
    tuner_file.load(tmp_path / "run")


def test_a_loss_that_is_not_finite_in_the_midst_of_a_run_leaves_weights_of_a_finite_one(pairs, tmp_path, monkeypatch):
    plain, seen = trainer.training_loss, []

    def third_is_nan(*args):
        seen.append(None)
        return plain(*args) * (float("nan") if len(seen) == 3 else 1)

    monkeypatch.setattr(trainer, "training_loss", third_is_nan)
    with pytest.raises(errors.TrainError, match="not finite at step 3.*of step 1"):
        sdtune.fit(short_run(pairs, tmp_path))
    file = tuner_file.load(tmp_path / "run")
    monkeypatch.setattr(trainer, "training_loss", plain)
    expected = sdtune.fit(short_run(pairs, tmp_path, output=str(tmp_path / "whole"), checkpoint_every=1))
    before = tuner_file.load(
        expected.tuner.parent / "checkpoints/step-000001"
    ).tensors  # with which the last finite loss was computed
    assert all(torch.equal(file.tensors[k], t.half()) for k, t in before.items())


def test_captions_are_encoded_as_the_settings_say(pairs, tmp_path):
    config = short_run(pairs, tmp_path, clip_skip=2, max_tokens=150, flip=True, trigger_words="tok style")
    prepared = trainer.Trainer(config, sdtune.TunerConfig())
    prepared.close()
    encoded, pipe = prepared.encoded, sdtune.load_base("tiny-sd")
    texts = [f"tok style {(pairs / f'train/{name[:-4]}.txt').read_text()}" for name in encoded.names]
    expected = encode_texts(texts, pipe.tokenizer, pipe.text_encoder, 2, chunks=2)
    assert expected.shape[1] == 154
    assert torch.allclose(encoded.text[encoded.first_texts], expected, atol=1e-5)
    assert all(bucket.mean.shape[1] == 2 for bucket in encoded.buckets)
    assert not torch.equal(encoded.buckets[0].mean[:, 0], encoded.buckets[0].mean[:, 1])


def test_all_data_problems_are_reported_before_a_model_is_loaded(pairs, tmp_path, monkeypatch):
    (pairs / "train/0.txt").unlink()
    (pairs / "train/1.txt").write_text(" ")
    (pairs / "train/2.png").write_bytes(b"no picture")
    monkeypatch.setattr(load, "load_base", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(sdtune.DataError) as error:
        sdtune.fit(short_run(pairs, tmp_path))
    assert len(error.value.problems) == 3
    assert not (tmp_path / "run").exists()


def test_gradients_are_clipped_before_the_update(pairs, tmp_path, monkeypatch):
    norms, update = [], torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        norms.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm().item())
        return update(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    sdtune.fit(short_run(pairs, tmp_path, max_grad_norm=0))
    free, norms[:] = norms[:], []
    sdtune.fit(short_run(pairs, tmp_path / "clipped", max_grad_norm=1e-4))
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
    plain = sdtune.fit(short_run(pairs, tmp_path / "plain", batch_size=4))
    other = sdtune.fit(short_run(pairs, tmp_path / "other", **changes))
    assert other.losses == pytest.approx(plain.losses, rel=1e-4)


def test_bf16_trains_on_cpu_and_fp16_says_what_it_needs(pairs, tmp_path):
    result = sdtune.fit(short_run(pairs, tmp_path, mixed_precision="bf16"))
    assert all(t.dtype == torch.float32 for t in last_checkpoint(tmp_path / "run").values()) and len(result.losses) == 4
    saving = short_run(pairs, tmp_path / "saving", mixed_precision="bf16", gradient_checkpointing=True)
    assert sdtune.fit(saving).losses == pytest.approx(result.losses, rel=0.02)
    if not torch.cuda.is_available():
        with pytest.raises(errors.TrainError, match="fp16"):
            sdtune.fit(short_run(pairs, tmp_path, mixed_precision="fp16"))


def test_tensorboard_gets_losses_and_previews_in_the_folder_of_the_run(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output/anime/checkpoints/step-000001").mkdir(parents=True)  # an earlier run
    result = sdtune.fit(short_run(pairs, tmp_path, report_to="tensorboard", output=None))
    written = sorted(tmp_path.rglob("events.out.tfevents.*"), key=lambda path: len(path.parts))  # the settings last
    assert result.tuner.parent.name == "anime-2" and all("anime-2" in path.parts for path in written)
    found = event_accumulator.EventAccumulator(str(written[0]))
    found.Reload()
    tags = found.Tags()
    assert [event.value for event in found.Scalars("loss")] == pytest.approx(result.losses, rel=1e-4)
    assert "held-out loss" in tags["scalars"] and tags["images"], tags


@pytest.mark.parametrize(
    "shape, expected",
    [("constant", [0.5, 1, 1, 1, 1]), ("linear", [0.5, 1, 0.75, 0.5, 0.25]), ("cosine", [0.5, 1, 0.854, 0.5, 0.146])],
)
def test_the_learning_rate_follows_warm_up_and_schedule(pairs, tmp_path, monkeypatch, shape, expected):
    rates, step = [], torch.optim.AdamW.step

    def noted(optimizer, *args, **kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    sdtune.fit(short_run(pairs, tmp_path, steps=6, lr_scheduler=shape, lr_warmup_steps=2))
    assert [r / 1e-3 for r in rates[1:]] == pytest.approx(expected, abs=1e-3)


def test_a_dropped_caption_is_the_empty_one(pairs, tmp_path, monkeypatch):
    seen, plain = {}, trainer.training_loss

    def noted(unet, scheduler, latents, noise, timesteps, states, gamma=0.0, weight=None):
        if gamma:
            seen.setdefault(dropout, []).append(states)
        return plain(unet, scheduler, latents, noise, timesteps, states, gamma, weight)

    monkeypatch.setattr(trainer, "training_loss", noted)
    for dropout in (0.0, 1.0):
        sdtune.fit(short_run(pairs, tmp_path / str(dropout), steps=1, caption_dropout=dropout))
    (kept,), (dropped,) = seen[0.0], seen[1.0]
    assert torch.equal(dropped[0], dropped[1]) and not torch.equal(kept[0], kept[1])
    pipe = sdtune.load_base("tiny-sd")
    empty = encoding.encode_text([""], pipe.tokenizer, pipe.text_encoder)
    assert torch.allclose(dropped[:1], empty, atol=1e-5)
