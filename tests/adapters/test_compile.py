"""A tuner acts in a compiled UNet, and stops acting when it is unloaded, whenever it was compiled."""

import copy

import pytest
import torch
from conftest import picture

import sdtune


@pytest.mark.parametrize("how", ["unet.compile", "torch.compile"])
def test_a_tuner_acts_in_a_compiled_unet_from_loading_to_unloading(pipe, base, files, how):
    torch._dynamo.reset()
    options = dict(num_inference_steps=1, guidance_scale=1.0)
    plain = picture(base, **options)
    if how == "unet.compile":
        pipe.unet.compile(backend="eager")
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    picture(pipe, **options)
    sdtune.load_tuner(pipe, files / "one.safetensors", "one")
    uncompiled = copy.deepcopy(base)
    sdtune.load_tuner(uncompiled, files / "one.safetensors", "one")
    wanted = picture(uncompiled, **options)
    effect = (wanted - plain).abs().max()
    assert (picture(pipe, **options) - wanted).abs().max() < effect / 20
    if how == "unet.compile":
        pipe.disable_lora()
        assert (picture(pipe, **options) - plain).abs().max() < effect / 20
    sdtune.unload_tuner(pipe, "one")
    assert (picture(pipe, **options) - plain).abs().max() < effect / 20
    torch._dynamo.reset()
