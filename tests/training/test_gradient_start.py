"""Runs whose tuner starts in the directions on which the loss depends most."""

import copy

import pytest
import torch
from training_runs import have_equal_tensors, last_checkpoint, short_run

import sdtune
from sdtune.training import errors
from sdtune.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("without_final_check")

LAYER, LORA = sdtune.TunerConfig("res_attn_layer"), sdtune.TunerConfig("lora", ops=["attn1", "ff", "conv"])
FIRST, SECOND = (".down.weight", ".lora_A.weight"), (".o.weight", ".lora_B.weight")


def prepared(pairs, folder, tuner, **changes) -> Trainer:
    """A trainer before its first step."""
    trainer = Trainer(short_run(pairs, folder, **changes), tuner)
    trainer.close()
    return trainer


def gradient_of_second_projections(trainer) -> float:
    """How steeply the loss of batches that did not make the start falls with `o`."""
    for step in range(20, 24):
        trainer.add_gradients(trainer.sample_batches(step)[1])
    found = [g for name, g in trainer.weights.gradients.items() if name.endswith(SECOND)]
    return torch.cat([g.flatten() for g in found]).norm().item()


@pytest.mark.parametrize("tuner", [LAYER, LORA], ids=["res_attn_layer", "lora"])
def test_the_tuner_is_zero_and_the_loss_depends_more_on_it(base, pairs, tmp_path, tuner):
    ours = prepared(pairs, tmp_path / "gradients", tuner, gradient_start=True)
    for name, weight in ours.weights.named.items():
        if name.endswith(FIRST):
            rows = weight.flatten(1)
            if tuner is LORA:
                rows = rows / rows.norm(dim=1).mean()
            if not name.startswith("mid_block"):  # where few tokens give few directions at 64 px
                assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-4)
        if name.endswith(SECOND):
            assert not weight.any()
    assert not ours.weights.vector.grad.any()
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 77, base.unet.config.cross_attention_dim)
    untuned = copy.deepcopy(ours.unet)
    untuned.disable_adapters()
    with torch.no_grad():
        assert torch.equal(ours.unet(x, 500, text).sample, untuned(x, 500, text).sample)

    random = prepared(pairs, tmp_path / "random", tuner, gradient_start=False)
    with torch.no_grad():  # rows of the same length, in random directions
        for name, weight in random.weights.named.items():
            if name.endswith(FIRST):
                length = ours.weights.named[name].flatten(1).norm(dim=1).mean()
                if tuner is LORA and not name.startswith("mid_block"):
                    assert torch.isclose(length, weight.flatten(1).norm(dim=1).mean(), rtol=1e-4)
                weight.copy_(length * torch.linalg.qr(torch.randn_like(weight.flatten(1)).T)[0].T.view_as(weight))
    assert gradient_of_second_projections(ours) > 1.5 * gradient_of_second_projections(random)


def test_it_is_how_res_attn_on_layers_starts_and_no_other_kind(pairs, tmp_path):
    wanted = prepared(pairs, tmp_path / "wanted", LAYER, gradient_start=True).weights.vector
    assert torch.equal(prepared(pairs, tmp_path / "layer", LAYER).weights.vector, wanted)
    assert not torch.equal(prepared(pairs, tmp_path / "off", LAYER, gradient_start=False).weights.vector, wanted)
    lora = prepared(pairs, tmp_path / "lora", LORA).weights.vector
    assert torch.equal(prepared(pairs, tmp_path / "lora-off", LORA, gradient_start=False).weights.vector, lora)


def test_rows_beyond_the_width_of_the_input_stay_random_and_can_learn(pairs, tmp_path):
    trainer = prepared(pairs, tmp_path, sdtune.TunerConfig("res_attn_layer", rank=60))  # 240 rows; the widths are 96 up
    widest = [w for name, w in trainer.weights.named.items() if name.endswith(".down.weight") and w.shape[1] == 96]
    assert widest and all(w.any(dim=1).all() for w in widest)


def test_a_layer_on_which_the_loss_does_not_depend_stays_random(pairs, tmp_path):
    """At 64 px the innermost attention has one token, whose attention is 1 whatever q and k are."""
    ours = prepared(pairs, tmp_path / "ours", LAYER).weights.named
    random = prepared(pairs, tmp_path / "random", LAYER, gradient_start=False).weights.named
    first = [name for name in ours if name.endswith(FIRST)]
    same = {name for name in first if torch.equal(ours[name], random[name])}
    assert same == {f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{x}.down.weight" for x in "qk"}


def test_a_resumed_run_keeps_its_start(pairs, tmp_path):
    sdtune.fit(short_run(pairs, tmp_path / "broken", checkpoint_every=2, steps=2, lr_scheduler="constant"), LAYER)
    sdtune.fit(short_run(pairs, tmp_path / "broken", steps=4, lr_scheduler="constant", resume=True), LAYER)
    sdtune.fit(short_run(pairs, tmp_path / "whole", steps=4, lr_scheduler="constant"), LAYER)
    assert have_equal_tensors(last_checkpoint(tmp_path / "broken/run"), last_checkpoint(tmp_path / "whole/run"))


def test_without_a_finite_gradient_the_start_is_random_and_the_run_says_so(pairs, tmp_path, monkeypatch, capsys):
    random = prepared(pairs, tmp_path / "random", LAYER, gradient_start=False).weights.vector
    compute = Trainer._compute_gradients

    def without_gradient(self, **batch):
        losses = compute(self, **batch)
        self.weights.vector.grad.fill_(float("nan"))
        return losses

    monkeypatch.setattr(Trainer, "_compute_gradients", without_gradient)
    assert torch.equal(prepared(pairs, tmp_path / "nan", LAYER).weights.vector, random)
    assert "the first batches had no finite gradient, so the tuner starts at random" in capsys.readouterr().out


def test_it_is_refused_where_it_has_no_meaning(pairs, files, tmp_path):
    with pytest.raises(errors.TrainError, match="gradient_start is for res_attn_layer, lora, dora.*is res_attn;"):
        sdtune.fit(short_run(pairs, tmp_path, gradient_start=True))
    with pytest.raises(errors.TrainError, match="is for a fresh tuner, and this run starts from .*one.safetensors"):
        sdtune.fit(short_run(pairs, tmp_path, gradient_start=True, init=str(files / "one.safetensors")), LAYER)
    assert not (tmp_path / "run").exists()
