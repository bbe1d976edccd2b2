"""A run as people with thirty anime pictures train: portraits, masks, tags, clip skip 2, preservation, together."""

import numpy as np
import pytest
import torch
from conftest import ANIME
from PIL import Image
from training_runs import have_equal_tensors, last_checkpoint, short_run

import sdtune
from sdtune.training import trainer


@pytest.fixture
def portraits(tmp_path_factory):
    """Four pictures of 128 x 192 px with tags, of which one is partly transparent and one has a mask."""
    folder = tmp_path_factory.mktemp("portraits")
    for i, path in enumerate(sorted((ANIME / "train").glob("*.png"))[:4]):
        picture = Image.open(path).convert("RGBA").resize((192, 192)).crop((32, 0, 160, 192))
        if i == 0:
            picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        picture.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"1girl, {{red|blue}} dress, smile, number {i}\na girl")
    Image.new("L", (128, 192), 255).save(folder / "1-mask.png")
    return folder


def test_a_killed_run_resumes_to_the_same_bits_and_its_tuner_draws_2_to_3_in_plain_diffusers(
    portraits, tmp_path, monkeypatch
):
    changes = dict(clip_skip=2, shuffle_tags=True, keep_tokens=1, caption_variants=3, mask_weight=0.2, preserve=0.5,
                   trigger_words="sks", caption_dropout=0.0, ema_decay=0.9, resolution=128, steps=3)  # fmt: skip
    sdtune.fit(short_run(portraits, tmp_path / "straight", **changes))
    step = trainer.Trainer.step

    def step_or_stop(self):
        if self.done == 2:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(trainer.Trainer, "step", step_or_stop)
    with pytest.raises(KeyboardInterrupt):
        sdtune.fit(short_run(portraits, tmp_path / "broken", **changes, checkpoint_every=1))
    monkeypatch.setattr(trainer.Trainer, "step", step)
    result = sdtune.fit(short_run(portraits, tmp_path / "broken", **changes, checkpoint_every=1, resume=True))
    assert have_equal_tensors(last_checkpoint(tmp_path / "straight/run"), last_checkpoint(tmp_path / "broken/run"))

    pipe = sdtune.load_base("tiny-sd")
    with pytest.warns(UserWarning, match="clip skip 2"):
        sdtune.load_tuner(pipe, result.tuner, "mine")
    size = dict(width=128, height=192)
    wanted = sdtune.compare(pipe, "sks 1girl", {"mine": {"mine": 1.0}}, guidance=3.0, steps=2, **size)["mine"][0]
    noise = torch.Generator().manual_seed(0)
    drawn = pipe(
        **sdtune.encode_prompt(pipe, "sks 1girl"), guidance_scale=3.0, num_inference_steps=2, generator=noise, **size
    ).images[0]
    assert drawn.size == (128, 192)
    assert np.abs(np.asarray(drawn, np.int16) - np.asarray(wanted, np.int16)).max() <= 1
