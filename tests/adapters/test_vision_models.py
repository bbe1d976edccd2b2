"""What tuners on the vision models of transformers promise: the base stays as it was, and a file carries the head."""

import copy
import math

import pytest
import torch
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import sdtune
from sdtune.adapters import api, tuner_file
from sdtune.adapters.export import export_to_kohya
from sdtune.adapters.peft_files import save_peft_files
from sdtune.tuners.config import ALL_KINDS

SMALL = dict(
    hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8
)
FAMILIES = {
    "vit": (ViTConfig, ViTForImageClassification),
    "deit": (DeiTConfig, DeiTForImageClassification),
    "dinov2": (Dinov2Config, Dinov2ForImageClassification),
}
NOT_THE_BASE_AT_FIRST = ("vpt", "noah", "bypass")  # trainable tokens are attended to; a bypass is a mean of all blocks


def new_model(family="vit", classes=5):
    torch.manual_seed(0)
    config, model = FAMILIES[family]
    return model(config(**SMALL, num_labels=classes)).eval()


@torch.no_grad()
def logits(model):
    return model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).logits


def stir(model, name):
    for p in api.tuner_parameters(model, name).values():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_starts_as_the_base_can_be_disabled_and_comes_back_from_its_file_with_the_head(
    family, kind, tmp_path
):
    model = new_model(family)
    before, keys = logits(model), set(model.state_dict())
    sdtune.add_tuner(model, sdtune.TunerConfig(kind=kind), "a")
    assert torch.equal(logits(model), before) != (kind in NOT_THE_BASE_AT_FIRST)
    stir(model, "a")
    model(torch.randn(2, 3, 32, 32)).logits.square().mean().backward()
    assert all(p.grad is not None for p in api.tuner_parameters(model, "a").values())
    tuned = logits(model)
    assert not torch.allclose(tuned, before, atol=1e-3)
    model.disable_adapters()
    assert torch.equal(logits(model), before)
    model.enable_adapters()
    file = sdtune.save_tuner(model, tmp_path, "a", dtype=torch.float32, labels=list("abcde"))
    sdtune.unload_tuner(model, "a")
    assert torch.equal(logits(model), before) and set(model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    sdtune.load_tuner(model, file, "b")
    assert torch.equal(logits(model), tuned)
    assert tuner_file.load(file).labels == list("abcde")


def test_a_file_with_more_classes_than_the_base_brings_its_own_head(tmp_path):
    model, nine = new_model(), new_model(classes=9)
    sdtune.add_tuner(nine, adapter_name="a")
    stir(nine, "a")
    sdtune.load_tuner(model, sdtune.save_tuner(nine, tmp_path, "a", dtype=torch.float32), "nine")
    assert torch.equal(logits(model), logits(nine))
    model.disable_adapters()
    assert logits(model).shape == (2, 5)


def test_of_several_adapters_the_chosen_one_is_active_and_a_lora_returns_the_layers_it_wrapped():
    model = new_model()
    before, found = logits(model), {}
    for kind in ("lora", "res_attn", "vpt"):
        sdtune.add_tuner(model, sdtune.TunerConfig(kind=kind), kind)
        stir(model, kind)
        found[kind] = logits(model)
    for kind in found:
        model.set_adapter(kind)
        assert torch.equal(logits(model), found[kind])
    sdtune.unload_tuner(model, "vpt")
    model.set_adapter("lora")
    sdtune.unload_tuner(model, "lora")
    assert torch.equal(logits(model), found["res_attn"])
    assert not any("lora" in type(m).__module__ for m in model.modules())
    sdtune.unload_tuner(model, "res_attn")
    assert torch.equal(logits(model), before)


def test_gradients_are_the_same_under_gradient_checkpointing():
    found = []
    for checkpointing in (False, True):
        model = new_model().train()
        sdtune.add_tuner(model, adapter_name="a")
        stir(model, "a")
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(torch.ones(2, 3, 32, 32)).logits.square().mean().backward()
        found.append([p.grad for p in api.tuner_parameters(model, "a").values()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found))


def test_tokens_of_vpt_are_attended_to_and_dropped_after_each_block():
    model = new_model()
    sdtune.add_tuner(model, sdtune.TunerConfig(kind="vpt", length=7), "a")
    prompts = api.tuner_parameters(model, "a")
    seen = []
    model.vit.layers[1].mlp.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    assert model(torch.ones(1, 3, 32, 32), output_hidden_states=True).hidden_states[-1].shape[1] == 17
    assert seen == [17 + 7]
    assert {k: tuple(p.shape) for k, p in prompts.items() if "vit" in k} == {
        f"vit.layers.{i}.prompt": (7, 48) for i in range(3)
    }


def test_a_bypass_sends_no_gradient_through_the_backbone():
    model = new_model().train().requires_grad_(False)
    sdtune.add_tuner(model, sdtune.TunerConfig(kind="bypass"), "a")
    blocks = []
    for layer in model.vit.layers:
        layer.register_forward_hook(lambda m, args, out: blocks.append(args[0].requires_grad))
    model(torch.ones(2, 3, 32, 32)).logits.sum().backward()
    assert blocks == [False] * 3


PAPER = {  # the paper's Table 1a and 2, and the methods' own papers: parameters without the head, of ViT-B/16
    "ssf": (dict(kind="ssf"), 205_824),
    "lora r 8 on q and v": (dict(kind="lora", rank=8, ops=["attn1"]), 294_912),
    "adapter 96 behind each ff": (dict(kind="adapter", length=96, ops=["ff"]), 1_779_840),
    "res_attn 8x8": (dict(rank=8, num_heads=8, ops=["attn1"]), 2_368_512),
    "res_attn 8x4": (dict(rank=8, num_heads=4, ops=["attn1"]), 1_188_864),
    "res_attn 4x4": (dict(rank=4, num_heads=4, ops=["attn1"]), 599_040),
    "res_attn 2x4": (dict(rank=2, num_heads=4, ops=["attn1"]), 304_128),
    "vpt of 10 tokens": (dict(kind="vpt", length=10), 12 * 768 * 10),
    "noah, 5 each": (dict(kind="noah", rank=5, length=5), 12 * (4 * 768 * 5 + 2 * 768 * 5 + 5 + 768 + 768 * 5)),
    "linear": (dict(kind="linear"), 0),
}


@pytest.mark.parametrize("row", PAPER)
def test_parameters_on_vit_b_16_are_those_of_the_formulas(row):
    settings, expected = PAPER[row]
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(num_labels=100))
    counts = {k: math.prod(s) for k, s in api.expected_shapes(model, sdtune.TunerConfig(**settings)).items()}
    assert sum(counts.values()) == expected + 76_900  # the head of 100 classes
    assert counts["classifier.weight"] == 76_800


def test_what_does_not_fit_is_refused_in_a_sentence_and_changes_nothing(tmp_path):
    model, dino = new_model(), new_model("dinov2")
    keys = set(model.state_dict())
    sdtune.add_tuner(dino, adapter_name="a")
    file = sdtune.save_tuner(dino, tmp_path, "a")
    with pytest.raises(sdtune.TunerFileError, match="trained on unknown, which is dinov2; this model is vit"):
        sdtune.load_tuner(model, file)
    with pytest.raises(sdtune.TunerFileError, match="a Stable Diffusion UNet; this model is vit"):
        sdtune.load_tuner(model, "assets/anime_res_attn.safetensors")
    with pytest.raises(ValueError, match="lacks the operations conv; leave them out"):
        sdtune.add_tuner(model, sdtune.TunerConfig("res_attn_conv", ops=["attn1", "conv"]))
    with pytest.raises(ValueError, match=r"lacks the operations vit\.layers\.0\.attn2"):
        sdtune.add_tuner(model, sdtune.TunerConfig(ops=["attn2"]))
    with pytest.raises(ValueError, match="can be on attn1 and ff, not on attn2"):
        sdtune.add_tuner(model, sdtune.TunerConfig(kind="lora", ops=["attn2"]))
    with pytest.raises(ValueError, match="linear is for vision transformers with a classification head"):
        sdtune.add_tuner(ViTModel(ViTConfig(**SMALL)), sdtune.TunerConfig(kind="linear"))
    assert set(model.state_dict()) == keys and not hasattr(model, "peft_config")


@pytest.mark.parametrize("kind", ["adapter", "ssf", "bypass"])
def test_adapter_ssf_and_bypass_start_as_the_base_on_a_unet_too(pipe, kind):
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 9, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        before = pipe.unet(x, 500, text).sample
        sdtune.add_tuner(pipe, sdtune.TunerConfig(kind=kind), "a")
        assert torch.equal(pipe.unet(x, 500, text).sample, before)
        stir(pipe.unet, "a")
        assert not torch.equal(pipe.unet(x, 500, text).sample, before)


@pytest.mark.parametrize("kind", ["linear", "noah", "oft", "ia3"])
def test_what_is_for_vision_models_alone_is_refused_on_a_unet(base, kind):
    with pytest.raises(ValueError, match=f"{kind} is for vision transformers"):
        sdtune.add_tuner(base.unet, sdtune.TunerConfig(kind=kind))


def test_what_is_for_stable_diffusion_alone_refuses_a_tuner_of_a_vision_model(tmp_path):
    model = new_model()
    sdtune.add_tuner(model, sdtune.TunerConfig(kind="lora"), "a")
    file = sdtune.save_tuner(model, tmp_path, "a")
    for call in (lambda: export_to_kohya(file), lambda: sdtune.push_to_hub(tmp_path, "owner/name")):
        with pytest.raises(sdtune.TunerFileError, match="which is vit; this model is a Stable Diffusion UNet"):
            call()


@pytest.mark.parametrize("kind", ["adapter", "ssf", "vpt", "bypass"])
def test_kinds_for_comparisons_come_back_from_a_file_on_a_unet_and_leave_no_files_of_peft(base, tmp_path, kind):
    unet = copy.deepcopy(base.unet)
    sdtune.add_tuner(unet, sdtune.TunerConfig(kind=kind), "a")
    stir(unet, "a")
    file = sdtune.save_tuner(unet, tmp_path, "a", dtype=torch.float32)
    save_peft_files(tmp_path, tuner_file.load(file))
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    weights = {k: p.detach().clone() for k, p in api.tuner_parameters(unet, "a").items()}
    sdtune.unload_tuner(unet, "a")
    sdtune.load_tuner(unet, file, "b")
    assert all(torch.equal(p, weights[k]) for k, p in api.tuner_parameters(unet, "b").items())
