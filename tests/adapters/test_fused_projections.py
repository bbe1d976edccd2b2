"""With fused projections the layers of queries, keys and values are not called; adapters on them would do nothing."""

import pytest
import torch
from conftest import picture, stir

import sdtune


@pytest.mark.parametrize("kind", ["res_attn_layer", "lora", "full"])
def test_an_adapter_on_projections_and_their_fusion_exclude_each_other(pipe, base, kind):
    config = sdtune.TunerConfig(kind=kind)
    sdtune.add_tuner(pipe, config, "x")
    stir(pipe, "x", 0, 0.01)
    tuned = picture(pipe)
    with pytest.raises(ValueError, match="the projections cannot be fused while 'x' is on them"):
        pipe.fuse_qkv_projections()
    assert torch.equal(picture(pipe), tuned)
    sdtune.unload_tuner(pipe, "x")
    pipe.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"are fused, .* call pipe.unfuse_qkv_projections\(\) first"):
        sdtune.add_tuner(pipe, config, "x")
    assert pipe.get_list_adapters() == {}
    assert torch.allclose(picture(pipe), picture(base), atol=1e-2)
    pipe.unfuse_qkv_projections()
    sdtune.add_tuner(pipe, config, "x")


def test_a_lora_of_another_tool_and_fused_projections_exclude_each_other(pipe, files):
    sdtune.load_tuner(pipe, files / "lora", "x")
    with pytest.raises(ValueError, match="cannot be fused while 'x'"):
        pipe.fuse_qkv_projections()
    sdtune.unload_tuner(pipe, "x")
    pipe.fuse_qkv_projections()
    with pytest.raises(sdtune.TunerFileError, match="cannot be loaded: this UNet's projections .* are fused"):
        sdtune.load_tuner(pipe, files / "lora", "x")
    assert pipe.get_list_adapters() == {}


def test_a_tuner_beside_whole_operations_draws_the_same_with_fused_projections(pipe, files):
    sdtune.load_tuner(pipe, files / "one.safetensors", "one")
    alone = picture(pipe)
    pipe.fuse_qkv_projections()
    assert torch.allclose(picture(pipe), alone, atol=1e-2)
