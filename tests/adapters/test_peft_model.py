"""Tuners through PEFT's and diffusers' own functions: the same bits as through `load_tuner`."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model, mapping

import sdtune
from sdtune.adapters import api


def predict(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 77, 192, generator=generator)
    with torch.no_grad():
        return unet(x, 500, text).sample


def stir(unet) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, p in unet.named_parameters():
        if ".tuners." in name:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("kind", ["res_attn", "res_attn_text", "res_adapter", "res_prefix", "res_prompt"])
def test_peft_gives_the_same_bits_as_load_tuner_and_saves_and_loads(base, kind, tmp_path):
    unet = copy.deepcopy(base.unet)
    without = predict(unet)
    model = get_peft_model(unet, sdtune.TunerPeftConfig(kind=kind, ops=["attn1", "attn2", "ff"]))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".tuners.default." in n for n in trainable)
    stir(model)
    tuned = predict(model)
    assert not torch.allclose(tuned, without, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(predict(model), without)

    file = sdtune.save_tuner(unet, tmp_path / "tuner.safetensors", "default", dtype=torch.float32)
    other = copy.deepcopy(base.unet)
    sdtune.load_tuner(other, file)
    assert torch.equal(predict(other), tuned)

    model.save_pretrained(tmp_path / "peft")
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["kind"] == kind
    for name in ("default", "another"):
        again = PeftModel.from_pretrained(copy.deepcopy(base.unet), tmp_path / "peft", adapter_name=name)
        assert torch.equal(predict(again), tuned)
    with pytest.raises(ValueError, match="the tuner 'default' cannot be fused into the base's weights"):
        model.merge_and_unload()
    assert torch.equal(predict(model.unload()), without)


def test_diffusers_add_adapter_takes_the_configuration(base):
    unet = copy.deepcopy(base.unet)
    unet.add_adapter(sdtune.TunerPeftConfig(rank=2), "one")
    unet.add_adapter(sdtune.TunerPeftConfig(kind="res_adapter"), "two")
    stir(unet)
    unet.set_adapters(["one", "two"], [0.5, 1.0])
    assert api.tuner_config(unet, "one") == sdtune.TunerConfig(rank=2)
    assert not torch.allclose(predict(unet), predict(base.unet), atol=1e-3)
    unet.disable_adapters()
    assert torch.equal(predict(unet), predict(base.unet))


def test_fields_out_of_range_are_refused_and_another_entry_of_that_name_is_left(monkeypatch):
    with pytest.raises(ValueError, match="rank is 0"):
        sdtune.TunerPeftConfig(rank=0)
    from sdtune.adapters import peft_model

    monkeypatch.setitem(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, peft_model.PEFT_TYPE, dict)
    monkeypatch.setitem(mapping.PEFT_TYPE_TO_TUNER_MAPPING, peft_model.PEFT_TYPE, list)
    peft_model.register()
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_model.PEFT_TYPE] is list
