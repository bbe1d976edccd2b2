"""Prompts in drawing: with the clip skip of the tuners, and of any length."""

import warnings

import numpy as np
import pytest
from conftest import stir

import sdtune
from sdtune.adapters import tuner_file

PROMPT = "a girl with silver hair"


@pytest.fixture
def skipping(base, pipe, tmp_path):
    """A file of a tuner that was trained with clip skip 2."""
    sdtune.add_tuner(pipe, adapter_name="made")
    stir(pipe, "made", 0)
    path = sdtune.save_tuner(pipe, tmp_path / "made.safetensors", "made", training={"clip_skip": 2})
    sdtune.unload_tuner(pipe, "made")
    return path


def draw(pipe, prompt=PROMPT, **changes):
    cells = [sdtune.Cell(prompt, guidance=3.0, **changes)]
    return np.asarray(sdtune.draw_cells(pipe, cells, steps=1)[0], np.int16)


def test_loading_a_tuner_says_how_to_draw_with_its_clip_skip(pipe, files, skipping):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sdtune.load_tuner(pipe, files / "one.safetensors", "one")
    with pytest.warns(UserWarning, match="two was trained with clip skip 2.*draws with 1.*sdtune.encode_prompt"):
        sdtune.load_tuner(pipe, skipping, "two")


@pytest.mark.filterwarnings("ignore:two was trained")
def test_compare_draws_tuner_and_base_with_the_clip_skip_of_the_tuner(pipe, skipping):
    sdtune.load_tuner(pipe, skipping, "two")
    found = sdtune.compare(pipe, PROMPT, {"base": {}, "two": {"two": 1.0}}, guidance=3.0, steps=1)
    for name, adapters in (("base", {}), ("two", {"two": 1.0})):
        picture = np.asarray(found[name][0], np.int16)
        assert np.abs(picture - draw(pipe, adapters=adapters, clip_skip=2)).max() <= 1
        assert np.abs(picture - draw(pipe, adapters=adapters, clip_skip=1)).max() > 1


@pytest.mark.filterwarnings("ignore:two was trained")
def test_encode_prompt_makes_a_plain_call_of_the_pipeline_draw_what_compare_draws(pipe, skipping):
    import torch

    sdtune.load_tuner(pipe, skipping, "two")
    negative, long = "blurry", "cat " * 100
    own = sdtune.compare(pipe, long, {"two": {"two": 1.0}}, negative_prompt=negative, guidance=3.0, steps=1)["two"][0]
    noise = torch.Generator().manual_seed(0)
    plain = pipe(
        **sdtune.encode_prompt(pipe, long, negative), guidance_scale=3.0, num_inference_steps=1, generator=noise
    )
    assert np.abs(np.asarray(own, np.int16) - np.asarray(plain.images[0], np.int16)).max() <= 1


def test_the_end_of_a_long_prompt_counts(pipe):
    start = "cat " * 75
    assert (draw(pipe, start + "red") != draw(pipe, start + "blue sky")).any()


def test_the_file_remembers_the_clip_skip_and_an_unusable_one_counts_as_unknown(pipe, skipping):
    file = tuner_file.load(skipping)
    assert file.clip_skip == 2
    for value in ("two", 0, True, None):
        file.training["clip_skip"] = value
        assert file.clip_skip is None
    file.training = {"steps": 5}  # a run from before there was clip skip
    assert file.clip_skip == 1
