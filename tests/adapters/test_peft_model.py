"""Tuners through PEFT's and diffusers' own functions: the same bits as through `load_tuner`."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model, mapping

import sdtune
from sdtune.adapters import api, peft_registration, tuner_file
from sdtune.adapters.peft_files import save_peft_files
from sdtune.tuners.config import KINDS


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


@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_the_same_bits_as_load_tuner_and_saves_and_loads(base, kind, tmp_path):
    unet = copy.deepcopy(base.unet)
    without = predict(unet)
    model = get_peft_model(unet, sdtune.ResAttnConfig(kind=kind))
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

    save_peft_files(tmp_path, tuner_file.load(file))  # what a training run leaves for PEFT
    assert torch.equal(predict(PeftModel.from_pretrained(copy.deepcopy(base.unet), tmp_path)), tuned)

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
    unet.add_adapter(sdtune.ResAttnConfig(rank=2), "one")
    unet.add_adapter(sdtune.ResAttnConfig(kind="res_adapter"), "two")
    stir(unet)
    unet.set_adapters(["one", "two"], [0.5, 1.0])
    assert api.tuner_config(unet, "one") == sdtune.TunerConfig(rank=2)
    assert not torch.allclose(predict(unet), predict(base.unet), atol=1e-3)
    unet.disable_adapters()
    assert torch.equal(predict(unet), predict(base.unet))


def test_peft_switches_between_tuners_and_removes_one(base):
    unet = copy.deepcopy(base.unet)
    without = predict(unet)
    model = get_peft_model(unet, sdtune.ResAttnConfig(rank=2))
    model.add_adapter("second", sdtune.ResAttnConfig(kind="res_adapter", ops=["attn1"]))
    stir(model)
    model.set_adapter("default")
    first = predict(model)
    model.set_adapter("second")
    second = predict(model)
    assert not torch.allclose(first, second, atol=1e-3) and not torch.allclose(second, without, atol=1e-3)
    model.delete_adapter("default")
    assert torch.equal(predict(model), second)
    assert [n for n in unet.peft_config] == ["second"]


def test_fields_out_of_range_are_refused():
    with pytest.raises(ValueError, match="rank is 0"):
        sdtune.ResAttnConfig(rank=0)
    with pytest.raises(ValueError, match="kind is 'dora', a method of PEFT; use PEFT's LoraConfig with use_dora=True"):
        sdtune.ResAttnConfig(kind="dora")


FRESH = """
import importlib.util, sys
import sdtune
importlib.util.find_spec("peft")  # what diffusers and transformers do to know whether it is installed
assert "peft" not in sys.modules and "torch" not in sys.modules
import peft
print(peft.get_peft_config(dict(peft_type="SDTUNE", rank=2)).tuner, "diffusers" in sys.modules)
"""


def test_after_import_sdtune_peft_knows_tuners_as_soon_as_it_is_imported_itself():
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "TunerConfig(kind='res_attn', rank=2" in done.stdout and done.stdout.split()[-1] == "False"


def test_where_peft_is_imported_already_tuners_are_registered_at_once(monkeypatch):
    for entries in (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING):
        monkeypatch.delitem(entries, "SDTUNE")
    peft_registration.register_with_peft()
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["SDTUNE"] is sdtune.ResAttnConfig
    assert "SDTUNE" in mapping.PEFT_TYPE_TO_TUNER_MAPPING


def test_an_entry_of_somebody_else_is_left(monkeypatch):
    monkeypatch.setitem(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "SDTUNE", dict)
    monkeypatch.setitem(mapping.PEFT_TYPE_TO_TUNER_MAPPING, "SDTUNE", list)
    peft_registration.register_with_peft()
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["SDTUNE"] is list


def test_a_version_of_peft_without_these_dictionaries_is_a_warning_not_an_error(monkeypatch):
    monkeypatch.delattr(mapping, "PEFT_TYPE_TO_CONFIG_MAPPING")
    with pytest.warns(UserWarning, match="sdtune could not make its tuners known to this version of PEFT"):
        peft_registration.register_with_peft()
