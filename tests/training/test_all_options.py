"""A run as people with thirty anime pictures train: portraits, masks, tags, clip skip 2, preservation, together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ANIME
from PIL import Image
from safetensors.torch import load_file
from training_runs import have_equal_tensors

import sdtune
from sdtune.adapters import tuner_file

ROOT = Path(__file__).parents[2]
STEPS = 8
FLAGS = f"""--steps {STEPS} --checkpoint_every 1 --batch_size 2 --resolution 64 --learning_rate 1e-3
    --clip_skip 2 --trigger_words sks --shuffle_tags --keep_tokens 1 --tag_dropout 0.3 --caption_variants 3
    --mask_weight 0 --preserve 0.5 --ema_decay 0.9
    --preview_every 0 --preview_steps 1 --preview_prompts waves""".split()


@pytest.fixture
def portraits(tmp_path):
    """Pictures of 2:3 in three sizes with tags in two captions; one is partly transparent and one has a mask."""
    folder = tmp_path / "portraits"
    folder.mkdir()
    sizes = (80, 120), (64, 96), (120, 180), (64, 96)
    for i, (path, size) in enumerate(zip(sorted((ANIME / "train").glob("*.png")), sizes)):
        picture = Image.open(path).convert("RGBA").crop((86, 0, 427, 512)).resize(size)
        if i == 0:
            picture.putalpha(Image.linear_gradient("L").resize(size))
        picture.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"1girl, {{red|blue}} dress, smile, number {i}\na girl, smiling")
    mask = Image.new("L", sizes[1])
    mask.paste(255, (0, 0, 64, 48))
    mask.save(folder / "1-mask.png")
    return folder


def start(data: Path, output: Path, *flags: str) -> subprocess.Popen:
    """Starts train_anime.py, which writes what it prints into a file beside its output."""
    with open(output.with_suffix(".log"), "a") as log:
        return subprocess.Popen(
            [sys.executable, "train_anime.py", *FLAGS, "--data", str(data), "--output", str(output), *flags],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def kill_after_a_checkpoint(process: subprocess.Popen, output: Path) -> int:
    """Kills a run with SIGKILL as soon as it has its second checkpoint; returns the step of the last one."""
    while not (output / "checkpoints/step-000002").is_dir():
        assert process.poll() is None, output.with_suffix(".log").read_text()
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return len(list(output.glob("checkpoints/step-*")))


def test_a_killed_run_resumes_to_the_same_bits_and_its_tuner_draws_2_to_3_in_plain_diffusers(portraits, tmp_path, pipe):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    undisturbed, process = start(portraits, straight), start(portraits, killed)
    step = kill_after_a_checkpoint(process, killed)
    assert 2 <= step < STEPS and not (killed / "tuner.safetensors").exists()
    resumed = start(portraits, killed, "--resume")
    for process, output in ((undisturbed, straight), (resumed, killed)):
        assert process.wait() == 0, output.with_suffix(".log").read_text()
    assert f"resumed at step {step}" in killed.with_suffix(".log").read_text()
    for file in ("tuner.safetensors", f"checkpoints/step-{STEPS:06}/tuner.safetensors"):
        assert have_equal_tensors(load_file(straight / file), load_file(killed / file))

    tuner = killed / "tuner.safetensors"
    assert tuner_file.load(tuner).clip_skip == 2
    with pytest.warns(UserWarning, match="clip skip 2"):
        sdtune.load_tuner(pipe, tuner, "mine")
    options = dict(guidance_scale=3.0, num_inference_steps=2, width=64, height=96)

    def draw(**kwargs) -> np.ndarray:
        noise = torch.Generator().manual_seed(0)
        drawn = pipe(**sdtune.encode_prompt(pipe, "sks 1girl", **kwargs), generator=noise, **options).images[0]
        assert drawn.size == (64, 96)
        return np.asarray(drawn, np.int16)

    wanted = sdtune.compare(pipe, "sks 1girl", {"mine": {"mine": 1.0}}, guidance=3.0, steps=2, width=64, height=96)
    assert np.abs(draw() - np.asarray(wanted["mine"][0], np.int16)).max() <= 1
    assert np.array_equal(draw(), draw(clip_skip=2))  # taken from the file
    assert np.abs(draw() - draw(clip_skip=1)).max() > 1
