"""The runs: how a learning rate is chosen, and what does not depend on the order of measurements."""

from pathlib import Path

import pytest
import torch

import sdtune
from sdtune.evaluation import runs
from sdtune.evaluation.tasks import ROOT, Task


@pytest.mark.parametrize(
    ("similarity", "chosen", "tried"),
    [
        ([0.1, 0.2, 0.3, 0.2], 1e-2, [3e-3, 1e-2, 3e-2]),
        ([0.1, 0.4, 0.3, 0.2], 3e-3, [1e-3, 3e-3, 1e-2]),
        ([0.1, 0.2, 0.3, 0.4], 3e-2, [3e-3, 1e-2, 3e-2]),
        ([0.3, 0.2, None, None], 1e-3, [1e-3, 3e-3, 1e-2]),
        ([None] * 4, None, [1e-3, 3e-3, 1e-2]),
    ],
)
def test_rates_are_tried_where_validation_drawings_become_more_similar(similarity, chosen, tried, monkeypatch):
    evaluation = object.__new__(runs.Evaluation)
    evaluation.settings, evaluation.world = runs.Settings(rates=[3e-2, 1e-2, 3e-3, 1e-3]), 1
    of_rate = dict(zip([1e-3, 3e-3, 1e-2, 3e-2], similarity))

    def train(_self, task, name, config, rate, seed):
        found = of_rate[round(rate * scale, 9)]
        return {"failed": None if found else "the loss is not finite", "similarity": found}

    monkeypatch.setattr(runs.Evaluation, "train", train)
    evaluation.methods = {"res_attn": sdtune.TunerConfig(), "full": sdtune.TunerConfig(kind="full")}
    for name, scale in (("res_attn", 1), ("full", 10)):
        task = Task("task", Path(), [], [])
        found = evaluation.choose_rate(task, name)
        assert found["rate"] == (chosen and pytest.approx(chosen / scale))
        assert [float(r) * scale for r in found["rates"]] == pytest.approx(tried)


def test_held_out_pictures_are_the_same_whatever_was_measured_before(tmp_path):
    settings = runs.Settings(tasks=[str(ROOT / "assets/anime")], methods=["res_attn"], prompts=2, output=str(tmp_path))
    evaluation = runs.Evaluation(settings, precision="bf16")
    (task,) = evaluation.tasks
    alone, true = evaluation.encoded(task), evaluation.model.reconstruct(task.test)
    task.encoded = None
    with evaluation.model.autocast():
        assert torch.equal(evaluation.encoded(task).buckets[0].mean, alone.buckets[0].mean)
        assert torch.equal(evaluation.encoded(task).text, alone.text)
        assert [i.tobytes() for i in evaluation.model.reconstruct(task.test)] == [i.tobytes() for i in true]
