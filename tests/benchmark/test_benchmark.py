"""That the benchmark runs and reports; how fast anything is depends on the machine and is tested nowhere."""

import json
import os
import signal
import sys
import time
from dataclasses import asdict

import pytest

from sdtune.benchmark import measure


def job(tmp_path, **changes):
    data = str(measure.ROOT / "assets/anime")
    plain = measure.Job("train", measure.RES_ATTN, "tiny-sd", data, str(tmp_path), 64, 1, "no", repeat=1, draw_steps=1)
    return measure.replace(plain, **changes)


def test_a_quick_run_prints_its_tables_and_writes_all_numbers(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert measure.main(["train", "draw", "--quick", "--json", str(file)]) == 0
    printed, report = capsys.readouterr().out, json.loads(file.read_text())
    for part, names in measure.CANDIDATES.items():
        rows = {row["who"]: row for row in report[part]}
        assert rows.keys() == names.keys() and all(row["s/image"] > 0 for row in rows.values())
        assert all(f"| {label} |" in printed for label in names.values())
        assert rows["floor" if part == "train" else "base"]["x floor" if part == "train" else "x base"] == 1
    answers = {row["target"]: row["answer"] for row in report["targets"]}
    assert answers["training step, batch 1: x floor's time"] in ("met", "NOT met")
    assert answers["import sdtune: s beyond importing torch"] == "not measured"
    assert report["machine"]["threads"] >= 1 and f"torch {report['machine']['torch']}" in printed


def test_a_contestant_alone_in_a_process_tells_its_start_up_and_its_memory(tmp_path):
    found = measure.alone(job(tmp_path))
    assert found["peak"] >= found["loaded"] > 0 and found["whole"] >= found["peak"] and len(found["seconds"]) == 1
    assert all(0 < found[name] < found["ready"] for name in ("imports", "base", "reading", "encoding"))


def test_only_what_trains_with_us_and_the_floor_has_the_heap_of_train_anime(tmp_path, monkeypatch):
    monkeypatch.setattr(measure.heap, "heap_environment", lambda: {"CALM": "1"})
    calm = [(part, who) for part, names in measure.CANDIDATES.items() for who in names
            if "CALM" in measure._environment(job(tmp_path, part=part, who=who))]  # fmt: skip
    assert calm == [("train", measure.RES_ATTN), ("train", measure.LORA), ("train", measure.FLOOR)]


def test_a_bench_that_is_stopped_reports_the_rounds_that_were_whole(monkeypatch, capsys):
    turns = iter([*[0.5] * 8, *[0.4, 0.2, 0.2, 0.2], *[0.6, 0.2, 0.2, 0.1], 0.1])

    class Contestant:
        def __init__(self, job):
            self.answer = lambda: "ready"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def turn(self, units):
            seconds = next(turns, None)
            if seconds is None:
                os.kill(os.getpid(), signal.SIGTERM)
            return seconds

    monkeypatch.setattr(measure, "_Process", Contestant)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert measure.main(["train", "draw", "--batch", "1", "--resolution", "64", "--rounds", "7"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    told = capsys.readouterr()
    assert "stopped in train" in told.err and "draw:" not in told.err
    rows = [line.split(" | ") for line in told.out.splitlines() if line.startswith("| 1 | ")]
    assert [float(row[2]) for row in rows] == [0.2, 0.25, 0.4, 0.2]  # of two rounds, which begin in turns


def test_any_tuner_can_be_measured_alone(tmp_path):
    tuner = {"kind": "dora", "ops": ["attn1"]}
    train, draw = (measure.alone(job(tmp_path, part=part, who="any", tuner=tuner)) for part in ("train", "draw"))
    assert train["peak"] > 0 and len(train["seconds"]) == len(draw["seconds"]) == 1
    config, kind = job(tmp_path, who="any", tuner=tuner).trainer()
    assert kind.kind == "dora" and kind.ops == ["attn1"]


@pytest.mark.parametrize("who", [measure.REFERENCE, measure.RES_ATTN])
def test_a_whole_run_of_each_trainer_saves_what_it_learned(tmp_path, who):
    spec = {"job": asdict(job(tmp_path, part="finish", who=who)), "result": str(tmp_path / "x.json")}
    measure.child({**spec, "started": time.time()})
    assert json.loads((tmp_path / "x.json").read_text())["total"] > 0
    assert list(tmp_path.rglob("*.safetensors"))


def test_a_contestant_that_fails_is_told_of_and_does_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    assert "error" in measure.alone(job(tmp_path))


def test_a_contestant_that_fails_in_its_turn_is_told_of_with_its_last_words(tmp_path, monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="sdtune, Res-Attn: .*no file or folder nowhere"):
        measure.alternate([job(tmp_path, base="nowhere")], rounds=1)
    monkeypatch.setattr(sys, "executable", "false")
    assert measure.main(["train", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "| 1 | all | diffusers' script, LoRA r 4: ended without a word |" in printed
    assert "| training step, batch 1: x reference's speed | at least 2.0 | not measured |" in printed


def test_a_target_is_met_or_not_or_not_measured():
    rows = [{"batch": 1, "who": measure.RES_ATTN, "speed x reference": 2.5, "x floor": 1.2}]
    answers = {row["target"]: row["answer"] for row in measure.judge({"train": rows}, cuda=True)}
    assert answers["training step, batch 1: x reference's speed"] == "met"
    assert answers["training step, batch 1: x floor's time"] == "NOT met"
    assert answers["fp16, batch 1, checkpointing: MB"] == "not measured"


def test_an_unknown_part_is_refused_with_those_that_there_are(capsys):
    with pytest.raises(SystemExit):
        measure.main(["speed"])
    assert "no part named speed; possible: train, draw" in capsys.readouterr().err
