"""The benchmark's targets."""

from sdtune.benchmark import report
from sdtune.benchmark.candidates import RES_ATTN


def test_a_target_is_met_or_not_or_not_measured():
    rows = [{"batch": 1, "name": RES_ATTN, "speed x reference": 2.5, "x floor": 1.2}]
    answers = {row["target"]: row["answer"] for row in report.check_targets({"train": rows}, cuda=True)}
    assert answers["training step, batch 1: x reference's speed"] == "met"
    assert answers["training step, batch 1: x floor's time"] == "NOT met"
    assert answers["fp16, batch 1, checkpointing: MB"] == "not measured"
