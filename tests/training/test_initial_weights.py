"""Runs that start from the tuner of an earlier run."""

import pytest
import torch
from training_runs import short_run

import sdtune
from sdtune.adapters import api, tuner_file
from sdtune.training import errors
from sdtune.training.initial_weights import load_initial_weights

pytestmark = pytest.mark.usefixtures("without_final_check")

OPS = ["attn1", "conv"]


def predict(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(x, 500, text).sample


@pytest.mark.parametrize(
    "old, new",
    [
        (sdtune.TunerConfig(qkv_bias=True), sdtune.TunerConfig(qkv_bias=True)),
        (sdtune.TunerConfig(), sdtune.TunerConfig(rank=6)),
        (sdtune.TunerConfig(qkv_bias=True), sdtune.TunerConfig(rank=5, num_heads=6, qkv_bias=True)),
        (sdtune.TunerConfig(kind="lora", rank=2), sdtune.TunerConfig(kind="lora", rank=3)),
        (sdtune.TunerConfig(kind="dora", ops=OPS), sdtune.TunerConfig(kind="dora", rank=6, ops=OPS)),
        (sdtune.TunerConfig(kind="res_attn_conv"), sdtune.TunerConfig(kind="res_attn_conv", rank=6)),
        (sdtune.TunerConfig(kind="res_attn_layer"), sdtune.TunerConfig(kind="res_attn_layer", rank=5, num_heads=6)),
        (sdtune.TunerConfig(kind="res_prefix"), sdtune.TunerConfig(kind="res_prefix")),
    ],
    ids=["the same", "rank", "rank, heads and bias", "lora", "dora", "res_attn_conv", "res_attn_layer", "res_prefix"],
)  # fmt: skip
def test_a_tuner_that_is_kept_or_grown_predicts_what_it_predicted_and_all_of_it_can_learn(pipe, tmp_path, old, new):
    unet = pipe.unet
    sdtune.add_tuner(pipe, old, "old")
    generator = torch.Generator().manual_seed(1)
    for p in api.tuner_parameters(pipe, "old").values():
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    wanted = predict(unet)
    path = sdtune.save_tuner(pipe, tmp_path / "old.safetensors", "old", dtype=torch.float32)
    sdtune.unload_tuner(pipe, "old")
    base = predict(unet)
    sdtune.add_tuner(pipe, new, "new")
    parameters = api.tuner_parameters(pipe, "new")
    load_initial_weights(str(path), new, {k: p.data for k, p in parameters.items()})
    found = predict(unet)
    assert (found - wanted).norm() < 1e-4 * (wanted - base).norm()
    unet(
        torch.randn(1, 4, 16, 16), 500, torch.randn(1, 77, unet.config.cross_attention_dim)
    ).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for k, p in parameters.items() if "k.bias" not in k)


def test_a_tuner_of_another_shape_is_refused_with_what_differs(pipe, files):
    path = str(files / "two.safetensors")
    for config, difference in (
        (sdtune.TunerConfig(rank=2, ops=["attn1", "ff"]), "rank is 2 and was 4"),
        (sdtune.TunerConfig(kind="lora", ops=["attn1", "ff"]), "kind is 'lora' and was 'res_attn'"),
        (sdtune.TunerConfig(), "ops is .'attn1', 'attn2', 'ff'. and was .'attn1', 'ff'."),
    ):
        with pytest.raises(errors.TrainError, match=f"another shape: {difference}.*Leave these settings out"):
            load_initial_weights(path, config, {})
    with pytest.raises(tuner_file.TunerFileError, match="does not fit this UNet"):
        load_initial_weights(path, sdtune.TunerConfig(ops=["attn1", "ff"]), {"a.b": torch.zeros(2)})


def test_a_run_starts_from_a_file_and_resumes_without_it(pairs, tmp_path, files):
    path = tmp_path / "start.safetensors"
    path.write_bytes((files / "two.safetensors").read_bytes())
    start = tuner_file.load(path)
    changes = dict(init=str(path), resolution=64, learning_rate=1e-9)
    result = sdtune.fit(short_run(pairs, tmp_path, steps=1, **changes))
    file = tuner_file.load(result.tuner)
    assert file.config == start.config and file.training["init"] == str(path)
    assert all(torch.equal(file.tensors[k], t) for k, t in start.tensors.items())
    path.unlink()
    resumed = sdtune.fit(short_run(pairs, tmp_path, steps=3, resume=True, **changes), start.config)
    assert len(resumed.losses) == 3
    with pytest.raises(tuner_file.TunerFileError, match="there is no file or folder"):
        sdtune.fit(short_run(pairs, tmp_path / "other", steps=1, **changes))
