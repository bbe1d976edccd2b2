"""The stopping rule in a run, through `sdtune.fit` on the small base."""

import pytest
import torch
from training_runs import have_equal_tensors, short_run

import sdtune
from sdtune.adapters import api, tuner_file
from sdtune.training import errors, heldout, trainer

pytestmark = pytest.mark.usefixtures("without_final_check")


def test_a_run_that_memorises_stops_and_keeps_the_tuner_from_before_that(pairs, tmp_path, monkeypatch, capsys):
    curve, weights = iter([0.3, 0.2, 0.1, 0.15, 0.2]), []  # of the base, and after steps 2, 4, 6, 8

    def denoising_errors(unet, scheduler, images):
        found = api.tuner_parameters(unet, trainer.ADAPTER_NAME)
        weights.append({k: p.detach().half() for k, p in found.items()})
        mean = next(curve)
        return torch.tensor([mean, mean + 0.01])

    monkeypatch.setattr(heldout, "denoising_errors", denoising_errors)
    result = sdtune.fit(short_run(pairs, tmp_path, steps=40, stop_when="memorising"))
    assert result.steps == 4 and len(result.losses) == 8
    assert "the held-out loss has risen since step 4" in capsys.readouterr().out
    file = tuner_file.load(result.tuner)
    assert file.training["steps_done"] == 4
    assert have_equal_tensors(file.tensors, weights[2])


def test_the_best_step_is_kept_even_if_the_base_is_better_and_that_is_said(pairs, tmp_path, monkeypatch, capsys):
    curve = iter([0.1, 0.2, 0.3, 0.4])  # of the base, and after steps 2, 4, 6
    monkeypatch.setattr(heldout, "denoising_errors", lambda *_: torch.tensor([mean := next(curve), mean + 0.01]))
    result = sdtune.fit(short_run(pairs, tmp_path, steps=40, stop_when="memorising"))
    assert result.steps == 2 and tuner_file.load(result.tuner).training["steps_done"] == 2
    assert "step 2, with the lowest held-out loss; that of the base is lower still" in capsys.readouterr().out


def test_a_stopping_rule_needs_held_out_images(pairs, tmp_path):
    (pairs / "test").rename(pairs.parent / "elsewhere")
    with pytest.raises(errors.TrainError, match="has none; move some pairs"):
        sdtune.fit(short_run(pairs, tmp_path, stop_when="memorising"))
