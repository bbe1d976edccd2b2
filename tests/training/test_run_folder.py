"""Nothing that a run has trained is lost: finished results, two runs at once, a full disk, damaged checkpoints."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_runs import short_run

import sdtune
from sdtune.training import checkpoints, errors, run_folder, signals

pytestmark = pytest.mark.usefixtures("without_final_check")

ROOT = Path(__file__).parents[2]


def test_a_finished_result_is_never_replaced_and_a_new_run_takes_a_new_folder(pairs, tmp_path, monkeypatch, capsys):
    result = sdtune.fit(short_run(pairs, tmp_path, steps=1))
    content = result.tuner.read_bytes()
    with pytest.raises(errors.TrainError, match="holds a finished tuner.*another --output"):
        sdtune.fit(short_run(pairs, tmp_path, steps=1, learning_rate=1e30))
    assert result.tuner.read_bytes() == content and (tmp_path / "run/checkpoints/step-000001").is_dir()

    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").mkdir()
    (tmp_path / "run").rename("output/anime")
    with pytest.raises(errors.TrainError, match="not finite"):
        sdtune.fit(short_run(pairs, tmp_path, output=None, steps=3, learning_rate=1e39))
    assert (
        "output/anime holds a finished tuner, tuner.safetensors and adapter_model.safetensors; this run writes to"
        in (capsys.readouterr().out)
    )
    assert (tmp_path / "output/anime/tuner.safetensors").read_bytes() == content
    assert list((tmp_path / "output/anime-2").glob("last-good*.safetensors"))
    content = (tmp_path / "output/anime/tuner.safetensors").read_bytes()
    with pytest.raises(
        errors.TrainError, match="output/anime-2, the last run, .*or name another.*--output output/anime"
    ):
        sdtune.fit(short_run(pairs, tmp_path, output=None, steps=2, resume=True))
    assert (tmp_path / "output/anime/tuner.safetensors").read_bytes() == content
    (tmp_path / "output/anime-2").rename(tmp_path / "elsewhere")
    resumed = sdtune.fit(short_run(pairs, tmp_path, output=None, steps=2, resume=True))
    assert resumed.tuner == Path("output/anime/tuner.safetensors")


def test_a_folder_that_cannot_be_made_is_said_and_no_other_is_tried(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").touch()
    with pytest.raises(errors.TrainError, match="the folder output/anime cannot be made.*another --output"):
        sdtune.fit(short_run(pairs, tmp_path, output=None))


def test_a_tilde_is_the_home_folder(pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sdtune.fit(short_run(pairs, tmp_path, output="~/mine", steps=1)).tuner == tmp_path / "mine/tuner.safetensors"


def test_the_last_run_is_found_where_the_clock_is_coarse_and_where_earlier_ones_are_gone(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("anime", "anime-2", "anime-10", "anime-old"):
        (tmp_path / "output" / name / "checkpoints/step-000001").mkdir(parents=True)
        (tmp_path / "output" / name / ".lock").touch()
        os.utime(tmp_path / "output" / name / ".lock", (1e9, 1e9))
    assert run_folder._last_run() == Path("output/anime-10")
    shutil.rmtree(tmp_path / "output/anime")
    shutil.rmtree(tmp_path / "output/anime-10")
    assert run_folder._last_run() == Path("output/anime-2")
    shutil.rmtree(tmp_path / "output/anime-2")
    with pytest.raises(errors.TrainError, match="there is no output/anime"):
        run_folder._last_run()


def test_keep_last_never_deletes_the_checkpoint_that_was_just_written(pairs, tmp_path):
    for step in (2, 4, 999_800, 1_000_000, 1_000_200):
        (tmp_path / f"checkpoints/step-{step:06d}").mkdir(parents=True)
    checkpoints.delete_old(tmp_path, None, 4)
    checkpoints.delete_old(tmp_path, 2, 1_000_000)  # the later one is damaged: the run has continued before it
    assert [f.name for f in checkpoints.list_checkpoints(tmp_path)] == ["step-999800", "step-1000000"]


def test_a_second_run_in_a_folder_says_which_process_has_it_and_a_dead_one_is_no_obstacle(pairs, tmp_path):
    code = f"""
import json, os, sys, time
from filelock import FileLock
os.makedirs({str(tmp_path / "run")!r})
lock = FileLock({str(tmp_path / "run/.lock")!r})
lock.acquire()
open({str(tmp_path / "run/.lock")!r}, "w").write(json.dumps(dict(process=os.getpid())))
print("locked", flush=True)
time.sleep(600)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(errors.TrainError, match=f"is in use: process {other.pid} trains there"):
        sdtune.fit(short_run(pairs, tmp_path, steps=1))
    assert os.listdir(tmp_path / "run") == [".lock"]
    other.kill()
    other.wait()
    assert sdtune.fit(short_run(pairs, tmp_path, steps=1)).tuner.exists()


def test_previews_of_a_run_that_died_early_are_removed(pairs, tmp_path):
    (tmp_path / "run/previews").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "run/previews/step-000100.png")
    sdtune.fit(short_run(pairs, tmp_path, steps=1))
    assert not list((tmp_path / "run/previews").iterdir())


def test_a_full_disk_is_one_line_and_the_finished_tuner_is_whole(pairs, tmp_path, monkeypatch):
    save, error = (
        torch.save,
        RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 775168 vs 775056"),
    )

    def save_or_fail(value, file, *args, **kwargs):
        save(value, file, *args, **kwargs)
        if "step-000002" in str(file):
            raise error

    monkeypatch.setattr(torch, "save", save_or_fail)
    with pytest.raises(errors.DiskFullError, match="the disk of .*run is full") as caught:
        sdtune.fit(short_run(pairs, tmp_path, steps=2, checkpoint_every=1))
    assert "Whole there: tuner.safetensors and the checkpoint of step 1. Free some space" in str(caught.value)
    assert "--resume" in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "run/checkpoints") == ["step-000001"]

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(errors.DiskFullError, match="a checkpoint needs .* MB, and 0.0 MB are free"):
        sdtune.fit(short_run(pairs, tmp_path / "b", steps=1))
    monkeypatch.undo()
    monkeypatch.setattr(Image.Image, "save", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full", "x")))
    with pytest.raises(errors.DiskFullError, match="Whole there: tuner.safetensors and the checkpoint of step 1"):
        sdtune.fit(short_run(pairs, tmp_path / "c", steps=1))
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("name, size", [("state.json", 0), ("optimizer.bin", 1000), ("custom_checkpoint_0.pkl", 0),
                                        ("tuner.safetensors", None), ("random_states_0.pkl", -1)])  # fmt: skip
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(finished, pairs, tmp_path, capsys, name, size):
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run/checkpoints/step-000002" / name
    content = bytearray(file.read_bytes())
    if size == -1:
        file.unlink()
    elif size is None:
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[:size])
    lines = []
    assert checkpoints.find_checkpoint(tmp_path / "run", lines.append).name == "step-000001"
    assert name in lines[0] and "step-000002 is damaged" in lines[0]
    if name == "optimizer.bin":
        sdtune.fit(short_run(pairs, tmp_path, steps=2, resume=True))
        assert "resumed at step 1" in capsys.readouterr().out
        assert (tmp_path / "run/checkpoints/step-000002" / name).stat().st_size == len(content)
        for folder in (tmp_path / "run/checkpoints").iterdir():
            (folder / name).write_bytes(b"")
        with pytest.raises(errors.TrainError, match="optimizer.bin is empty.*there is no whole one"):
            sdtune.fit(short_run(pairs, tmp_path, steps=3, resume=True))


@pytest.mark.parametrize("changes", [{"step": "a"}, {"step": -1}, {"losses": []}, {"losses": "ab"}, {"digests": "a"},
                                     {"heldout": {"x": 1}}, {"settings": None}, None])  # fmt: skip
def test_a_state_that_no_run_has_written_is_damage(finished, tmp_path, changes):
    shutil.copytree(finished, tmp_path / "run")
    last = tmp_path / "run/checkpoints/step-000002"
    state = json.loads((last / "state.json").read_text())
    (last / "state.json").write_text(json.dumps([] if changes is None else state | changes))
    (last / "files.json").unlink()  # as before there were manifests
    lines = []
    assert checkpoints.find_checkpoint(tmp_path / "run", lines.append).name == "step-000001"
    assert "state.json: " in lines[0]


def test_a_manifest_of_another_kind_is_damage_and_a_file_in_a_checkpoint_s_place_is_replaced(finished, pairs, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    last = tmp_path / "run/checkpoints/step-000002"
    for content in ("[]", "null", '{"state.json": 5}', "[" * 100_000):
        (last / "files.json").write_text(content)
        assert "files.json" in checkpoints.find_damage(last)
    shutil.rmtree(last)
    last.write_text("not a folder")
    assert sdtune.fit(short_run(finished.parent / "data", tmp_path, steps=2, resume=True)).steps == 2
    assert checkpoints.find_damage(last) is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of two steps with two checkpoints, on pairs of its own."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "data").mkdir()
    for i in range(5):
        Image.effect_noise((128, 128), 40 + i).convert("RGB").save(folder / f"data/{i}.png")
        (folder / f"data/{i}.txt").write_text(f"noise {i}")
    sdtune.fit(short_run(folder / "data", folder, steps=2, checkpoint_every=1))
    return folder / "run"


def test_resuming_with_other_pictures_says_so_and_never_joins_their_heldout_losses(pairs, tmp_path, capsys):
    settings = dict(checkpoint_every=1, stop_when="memorising")
    sdtune.fit(short_run(pairs, tmp_path, steps=2, **settings))
    (pairs / "test/1.txt").unlink()
    (pairs / "test/1.png").unlink()
    (pairs / "train/0.txt").write_text("another caption")
    capsys.readouterr()
    result = sdtune.fit(short_run(pairs, tmp_path, steps=3, resume=True, **settings))
    out = capsys.readouterr().out
    assert "the training pictures or captions are not those of the checkpoint: 1 changed (0.png)" in out
    assert "the held-out pictures or captions are not those of the checkpoint: 1 gone (1.png)" in out
    state = json.loads((tmp_path / "run/checkpoints/step-000003/state.json").read_text())
    digests = state["digests"]
    assert "are dropped" in out and {len(losses) for losses in state["heldout"].values()} == {1}
    assert set(result.heldout) == {0, 2, 3}  # measured anew
    assert checkpoints.describe_changes({**digests, "base": "x"}, digests)["base"].startswith("the weights of the base")


def test_a_second_signal_ends_a_run_as_usual():
    with pytest.raises(KeyboardInterrupt), signals.CatchSignals() as caught:
        os.kill(os.getpid(), signal.SIGINT)
        assert caught.number == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_ends_a_run_with_a_checkpoint_and_under_nohup_it_goes_on(pairs, tmp_path):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.CatchSignals() as caught:
            os.kill(os.getpid(), signal.SIGHUP)
            assert caught.number == 0
    finally:
        signal.signal(signal.SIGHUP, old)
    flags = "--steps 5000 --batch_size 1 --resolution 64 --preview_every 0 --checkpoint_every 2000".split()
    command = [sys.executable, "train_anime.py", "--data", str(pairs), "--output", str(tmp_path / "run"), *flags]
    with open(tmp_path / "log.txt", "wb") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + 120
        while b"loss=" not in (tmp_path / "log.txt").read_bytes() and run.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        run.send_signal(signal.SIGHUP)
        assert run.wait(60) == 128 + signal.SIGHUP, (tmp_path / "log.txt").read_text()
    assert checkpoints.list_checkpoints(tmp_path / "run")


def test_a_tracker_that_is_not_installed_is_refused_before_any_work(pairs, tmp_path):
    for name, match in (("aim", "not installed"), ("nothing", "no such tracker; possible are aim")):
        with pytest.raises(errors.TrainError, match=match):
            sdtune.fit(short_run(pairs, tmp_path, report_to=name))
    assert not (tmp_path / "run").exists() and run_folder.describe_content(tmp_path) == ""
