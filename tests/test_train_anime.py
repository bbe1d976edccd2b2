"""`train_anime.py` as a user runs it: real processes, most of them under `accelerate launch`."""

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from transformers.hf_argparser import HfArgumentParser

import sdtune
from sdtune.adapters import tuner_file
from sdtune.kernels.cpu.heap import heap_environment
from sdtune.training import dataset
from sdtune.training.buckets import AspectBuckets
from sdtune.training.config import DEFAULT_KIND

ROOT = Path(__file__).parent.parent
QUICK = "--batch_size 2 --resolution 64 --preview_steps 1 --preview_every 0 --preview_prompts girl".split()


def finish(output: Path, **changes):
    """Trains in this process, with the settings of `launch`."""
    config = sdtune.TrainConfig(batch_size=2, resolution=64, preview_steps=1, preview_every=0, preview_prompts=["girl"],
                                output=str(output))  # fmt: skip
    return sdtune.fit(replace(config, **changes), sdtune.TunerConfig(DEFAULT_KIND))


def launch(*flags, launcher=("-m", "accelerate.commands.launch", "--cpu"), wait=True):
    """Starts a run; with `launcher=()` without Accelerate's launcher, whose imports alone take seconds."""
    command = [sys.executable, *launcher, "train_anime.py", *QUICK, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    if not wait:
        return process
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def wait_for(path: Path, process, seconds=120):
    end = time.monotonic() + seconds
    while not list(path.parent.glob(path.name)):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_launched_run_prints_where_things_are_and_the_lines_that_load_the_tuner_and_draw(tmp_path, monkeypatch):
    code, output = launch("--steps", "2", "--output", str(tmp_path / "run"))
    assert code == 0, output
    own_output = output[output.index("starting:") :]  # before it, the launcher explains its defaults
    assert not re.search("(?i)warning|torchvision|float32", own_output), output  # no messages of libraries
    for name in ("tuner.safetensors", "preview.png", "loss.png", "config.json"):
        assert str(tmp_path / "run" / name) in output and (tmp_path / "run" / name).exists()
    lines = output[output.index("from sdtune import") :].strip().splitlines()
    assert len(lines) == 4 and lines[3].startswith("compare(pipe, ")
    space = {}
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines).replace(")[", ", steps=1)["), space)
    assert (tmp_path / "picture.png").exists() and "mine" in space["pipe"].unet.peft_config


def test_two_processes_give_what_one_process_with_twice_the_batch_gives(tmp_path):
    flags = ["--steps", "3", "--output"]
    two_processes = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    code, output = launch(*flags, str(tmp_path / "two"), launcher=two_processes)
    assert code == 0, output
    finish(tmp_path / "one", steps=3, batch_size=4)
    one, two = (tmp_path / n / "checkpoints/step-000003" for n in ("one", "two"))
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    # Adam makes a full step of the sign of a gradient near zero, so single weights may differ; the sum does not
    distances = [
        (a - b).norm() / a.norm() for a, b in zip(*(load_file(f / "tuner.safetensors").values() for f in (one, two)))
    ]
    assert sum(distances) / len(distances) < 0.02


def losses(checkpoint):
    return json.loads((checkpoint / "state.json").read_text())["losses"]


@pytest.mark.parametrize("receiver", ["the whole group, as Ctrl-C", "the launcher alone"])
def test_a_signal_writes_a_checkpoint_before_the_run_ends(tmp_path, capsys, receiver):
    out = tmp_path / "run"
    process = launch("--steps", "5000", "--checkpoint_every", "3", "--output", str(out), wait=False)
    wait_for(out / "checkpoints" / "step-*", process)
    if receiver == "the launcher alone":
        process.terminate()
    else:
        os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "a checkpoint is in" in output and "--resume" in output, output
    last = int(output.split("stopped at step ")[1].split()[0])
    assert tuner_file.load(out / f"checkpoints/step-{last:06d}").tensors
    finish(out, steps=last + 1, resume=True)
    assert f"resumed at step {last}" in capsys.readouterr().out


def test_kill_9_at_any_moment_leaves_whole_checkpoints_to_resume(tmp_path, capsys):
    out = tmp_path / "run"
    process = launch("--steps", "5000", "--checkpoint_every", "1", "--output", str(out), wait=False)
    wait_for(out / "checkpoints" / "step-*3", process)
    (trainer,) = psutil.Process(process.pid).children()
    assert "GLIBC_TUNABLES" in trainer.environ() or not heap_environment()
    os.killpg(process.pid, signal.SIGKILL)  # while checkpoints are being written one after another
    process.communicate()
    whole = sorted((out / "checkpoints").glob("step-*"))
    assert all(tuner_file.load(folder).tensors for folder in whole)
    last = int(whole[-1].name[5:])
    finish(out, steps=last + 1, resume=True)
    assert f"resumed at step {last}" in capsys.readouterr().out


def test_a_line_appears_before_the_imports_that_take_seconds(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "train_anime.py", "--rank", "0"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    lines = [line.split("|")[-1].strip() for line in process.communicate()[0].splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("starting"))
    assert not {"torch", "diffusers", "transformers", "numpy"} & set(lines[:first])


def test_bad_input_ends_with_a_sentence_and_no_traceback(tmp_path, monkeypatch, capsys):
    command = [sys.executable, "train_anime.py", "--data", str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "no such folder" in done.stderr and "Traceback" not in done.stderr

    def run_and_read_error(*flags):
        monkeypatch.setattr(sys, "argv", ["train_anime.py", *flags])
        assert runpy.run_path(str(ROOT / "train_anime.py"))["main"]() != 0
        return capsys.readouterr().err

    error = run_and_read_error("--rank", "0", "--ops", "attn1", "attn9")
    assert "rank is 0" in error and "attn9" in error
    assert str(tmp_path / "base") in run_and_read_error("--base", str(tmp_path / "base"))
    assert "no flags or values for --conf" in run_and_read_error("--conf", str(tmp_path / "run.yaml"))


def test_the_bundled_tuner_and_lora_have_the_settings_of_the_documented_commands():
    text = (ROOT / "assets/results/bundled_files.md").read_text()
    for name in ("anime_res_attn", "anime_lora"):
        (line,) = re.findall(rf"^accelerate launch train_anime.py (.*--output output/{name}.*)$", text, re.MULTILINE)
        tuner, config = HfArgumentParser((sdtune.TunerConfig, sdtune.TrainConfig)).parse_args_into_dataclasses(
            shlex.split(line)
        )
        file = tuner_file.load(ROOT / f"assets/{name}.safetensors")
        given = {k: v for k, v in asdict(config).items() if v not in (None, []) and k in file.training}
        assert file.config == tuner
        assert {k: file.training[k] for k in given} == given and file.training["steps_done"] == config.steps


def test_the_bundled_pairs_are_30_and_12_of_512_px_in_one_style():
    train, test = (dataset.read_pairs(ROOT / "assets/anime", AspectBuckets(512), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (30, 12)
    captions = [pair.caption for pair in train + test]
    assert len(set(captions)) == 42 and all(c.endswith(", in anime style") for c in captions)
    assert {pair.open().size for pair in train + test} == {(512, 512)}


def test_help_lists_the_flags_without_importing_what_only_training_needs():
    code = (
        "import sys, atexit; atexit.register(lambda: print(*sorted({'diffusers', 'peft', 'numba'} & set(sys.modules))))"
    )
    script = f"{code}; sys.argv = ['train_anime.py', '--help']; import train_anime; train_anime.main()"
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "--learning_rate" in process.stdout and process.stdout.splitlines()[-1] == ""
