"""That files which earlier versions of sdtune wrote, for the 128 px base, still load."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

import sdtune
from sdtune.adapters import tuner_file

DATA = Path(__file__).parents[1] / "data"
FILES = sorted(DATA.glob("*.safetensors"))


@pytest.fixture
def old_unet() -> UNet2DConditionModel:
    """The UNet of the 128 px base, with random weights."""
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(json.loads((DATA / "tiny-sd-128-unet.json").read_text())).eval()


def test_there_are_old_files_of_tuners_and_loras():
    assert {tuner_file.load(path).config.kind for path in FILES} == {"res_attn", "lora"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_old_file_loads_into_the_unet_that_it_was_trained_on_and_has_an_effect(old_unet, path):
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 77, old_unet.config.cross_attention_dim)
    with torch.no_grad():
        before = old_unet(x, 500, text).sample
        sdtune.load_tuner(old_unet, path, "old")
        assert not torch.allclose(old_unet(x, 500, text).sample, before, atol=1e-3)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_old_file_either_fits_todays_base_or_is_refused_with_the_base_that_it_was_made_for(pipe, path):
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    try:
        sdtune.load_tuner(pipe, path, "old")
    except sdtune.TunerFileError as error:
        assert "does not fit this UNet" in str(error) and "trained on" in str(error)
        assert pipe.unet.state_dict().keys() == before.keys()
