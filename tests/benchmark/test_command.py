"""That the command runs and reports; how fast anything is depends on the machine and is tested nowhere."""

import json
import os
import signal
import sys

import pytest

from sdtune.benchmark import parts
from sdtune.benchmark.candidates import CANDIDATES
from sdtune.benchmark.command import main
from sdtune.benchmark.kernel_switches import SWITCHES


def test_a_quick_run_prints_its_tables_and_writes_all_numbers(tmp_path, capsys):
    file = tmp_path / "benchmark.json"
    assert main(["train", "draw", "--quick", "--json", str(file)]) == 0
    printed, report = capsys.readouterr().out, json.loads(file.read_text())
    for part, names in CANDIDATES.items():
        rows = {row["name"]: row for row in report[part]}
        assert rows.keys() == names.keys() and all(row["s/image"] > 0 for row in rows.values())
        assert all(f"| {label} |" in printed for label in names.values())
        assert rows["floor" if part == "train" else "base"]["x floor" if part == "train" else "x base"] == 1
    answers = {row["target"]: row["answer"] for row in report["targets"]}
    assert answers["training step, batch 1: x floor's time"] in ("met", "NOT met")
    assert answers["import sdtune: s beyond importing torch"] == "not measured"
    assert report["machine"]["threads"] >= 1 and f"torch {report['machine']['torch']}" in printed


def test_the_part_kernels_compares_the_step_with_and_without_each_kernel(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SDTUNE_KERNELS", "on")
    file = tmp_path / "kernels.json"
    assert main(["kernels", "--quick", "--json", str(file)]) == 0
    rows = {row["setting"]: row for row in json.loads(file.read_text())["kernels"]}
    assert list(rows) == ["all on", *(f"without {name}" for name in SWITCHES), "all kernels off"]
    assert rows["all on"]["x all on"] == 1 and all(row["s/step"] > 0 for row in rows.values())
    printed = capsys.readouterr().out
    assert all(f"| 1 | {setting} |" in printed for setting in rows)


def test_the_part_shapes_compares_a_pixel_of_several_shapes_with_one_of_a_single_shape(tmp_path, capsys):
    file = tmp_path / "shapes.json"
    assert main(["shapes", "--quick", "--json", str(file)]) == 0
    one, three = json.loads(file.read_text())["shapes"]
    assert (one["pictures"], three["pictures"]) == ("one shape", "three shapes")
    assert one["x one shape, per pixel"] == 1 and three["x one shape, per pixel"] > 0
    assert "x one shape, per pixel" in capsys.readouterr().out


def test_the_part_kernels_refuses_to_compare_kernels_that_are_switched_off(monkeypatch, capsys):
    monkeypatch.setenv("SDTUNE_KERNELS", "off")
    with pytest.raises(SystemExit):
        main(["kernels"])
    assert "without SDTUNE_KERNELS=off" in capsys.readouterr().err


def test_a_stopped_run_reports_the_rounds_that_all_candidates_finished(monkeypatch, capsys):
    turns = iter([*[0.5] * 12, *[0.4, *[0.2] * 5], *[0.6, *[0.2] * 4, 0.1], 0.1])

    class ScriptedProcess:
        def __init__(self, job):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait_until_ready(self):
            pass

        def turn(self, units):
            seconds = next(turns, None)
            if seconds is None:
                os.kill(os.getpid(), signal.SIGTERM)
            return seconds

    monkeypatch.setattr(parts, "CandidateProcess", ScriptedProcess)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["train", "draw", "--batch", "1", "--resolution", "64", "--rounds", "7"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    printed = capsys.readouterr()
    assert "stopped in train" in printed.err and "draw:" not in printed.err
    rows = [line.split(" | ") for line in printed.out.splitlines() if line.startswith("| 1 | ")]
    assert [float(row[2]) for row in rows] == [0.2, 0.25, 0.4, 0.2, 0.2, 0.2]  # of two rounds, which begin in turns


def test_candidates_that_fail_are_reported_with_their_last_output(monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "false")
    assert main(["train", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "| 1 | all | diffusers' script, LoRA r 4: ended without any output |" in printed
    assert "| training step, batch 1: x reference's speed | at least 2.0 | not measured |" in printed


def test_bad_input_is_a_sentence_before_anything_is_measured(tmp_path, capsys):
    assert main(["imports", "--base", str(tmp_path / "nothere")]) == 1
    assert "error: " in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["imports", "--json", str(tmp_path / "file/x.json")]) == 1
    assert capsys.readouterr().err.startswith("error: [Errno")


def test_an_unknown_part_is_refused_with_the_names_of_all_parts(capsys):
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "no part named speed; possible: train, draw" in capsys.readouterr().err
