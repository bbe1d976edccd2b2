"""Candidates in processes of their own: what they measure, the environment that they have, and how they fail."""

import json
import sys
import time
from dataclasses import replace

import pytest

from sdtune.benchmark import child, parts, processes
from sdtune.benchmark.candidates import BYPASS, CANDIDATES, FLOOR, LORA, REFERENCE, RES_ATTN, RES_ATTN_LAYER, Job


def job(tmp_path, **changes) -> Job:
    anime = str(parts.ROOT / "assets/anime")
    plain = Job("train", RES_ATTN, "tiny-sd", anime, str(tmp_path), 64, 1, "no", repetitions=1, sampling_steps=1)
    return replace(plain, **changes)


def test_a_candidate_alone_in_a_process_measures_its_start_up_and_its_memory(tmp_path):
    found = processes.run_alone(job(tmp_path))
    assert found["peak"] >= found["loaded"] > 0 and found["whole"] >= found["peak"] and len(found["seconds"]) == 1
    assert all(0 < found[name] < found["ready"] for name in ("imports", "base", "reading", "encoding"))


def test_only_our_trainer_and_the_floor_have_the_heap_settings_of_train_anime(tmp_path, monkeypatch):
    monkeypatch.setattr(processes.heap, "heap_environment", lambda: {"HEAP": "1"})
    with_settings = [(part, name) for part, names in CANDIDATES.items() for name in names
                     if "HEAP" in processes.child_environment(job(tmp_path, part=part, name=name))]  # fmt: skip
    assert with_settings == [("train", name) for name in (RES_ATTN, RES_ATTN_LAYER, BYPASS, LORA, FLOOR)]


def test_any_tuner_can_be_measured_alone(tmp_path):
    tuner = {"kind": "dora", "ops": ["attn1"]}
    train, draw = (processes.run_alone(job(tmp_path, part=part, name="any", tuner=tuner)) for part in ("train", "draw"))
    assert train["peak"] > 0 and len(train["seconds"]) == len(draw["seconds"]) == 1
    _, config = job(tmp_path, name="any", tuner=tuner).configs()
    assert config.kind == "dora" and config.ops == ["attn1"]


@pytest.mark.parametrize("name", [REFERENCE, RES_ATTN])
def test_a_whole_run_of_each_trainer_saves_what_it_learned(tmp_path, name):
    child.measure_alone(job(tmp_path, part="finish", name=name), time.time(), str(tmp_path / "x.json"))
    assert json.loads((tmp_path / "x.json").read_text())["total"] > 0
    assert list(tmp_path.rglob("*.safetensors"))


def test_a_candidate_alone_that_fails_returns_its_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    assert "error" in processes.run_alone(job(tmp_path))


def test_a_candidate_that_fails_to_start_raises_with_the_end_of_its_output(tmp_path):
    with (
        processes.CandidateProcess(job(tmp_path, base="nowhere")) as process,
        pytest.raises(RuntimeError, match="sdtune, Res-Attn: .*no file or folder nowhere"),
    ):
        process.wait_until_ready()
