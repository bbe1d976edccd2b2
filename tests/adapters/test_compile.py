"""A tuner acts in a compiled UNet as in an uncompiled one, whatever was done first and however it was compiled."""

import copy

import pytest
import torch
from conftest import picture, stir
from diffusers import UNet2DConditionModel

import sdtune
from sdtune.adapters import per_sample

OPTIONS = dict(num_inference_steps=1, guidance_scale=1.0, height=64, width=64)


def compile_unet(pipe, how: str) -> None:
    """Compiles with the backend "eager", which traces and guards as every backend does and needs no C++ compiler."""
    if how == "compile_repeated_blocks":
        pipe.unet._repeated_blocks = ["BasicTransformerBlock"]  # those of FluxTransformer2DModel and others
        pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    elif how == "torch.compile":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        pipe.unet.compile(backend="eager", fullgraph=how == "fullgraph")


@pytest.fixture(scope="module")
def small(base, tmp_path_factory):
    """A pipeline with a UNet of one transformer block, which compiles quickly, and a folder with two tuners for it."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        cross_attention_dim=base.unet.config.cross_attention_dim,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tuners")
    pipe = copy.deepcopy(base)
    pipe.unet = unet.eval().requires_grad_(False)
    for seed, name in enumerate(("one", "two")):
        tuned = copy.deepcopy(pipe)
        sdtune.add_tuner(tuned, sdtune.TunerConfig(rank=2), name)
        stir(tuned, name, seed, 0.5)
        sdtune.save_tuner(tuned, folder / f"{name}.safetensors", name)
    return pipe, folder


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


STEPS = {
    "compile": None,
    "load": lambda p, files: sdtune.load_tuner(p, files / "one.safetensors", "one"),
    "weight": lambda p, files: p.set_adapters("one", 0.4),
    "disable": lambda p, files: p.disable_lora(),
    "enable": lambda p, files: p.enable_lora(),
    "load another": lambda p, files: sdtune.load_tuner(p, files / "two.safetensors", "two"),
    "mix": lambda p, files: p.set_adapters(["one", "two"], [0.5, 1.5]),
    "unload": lambda p, files: sdtune.unload_tuner(p, "one"),
    "unload all": lambda p, files: (sdtune.unload_tuner(p, "two"), sdtune.unload_tuner(p, "one")),
}
ORDERS = {
    "torch.compile": ["compile", "load", "weight", "disable", "enable", "load another", "mix", "unload all"],
    "fullgraph": ["load", "compile", "weight", "unload", "load another"],
    "compile_repeated_blocks": ["compile", "load", "load another", "unload all", "load", "disable", "enable", "weight"],
}


@pytest.mark.parametrize("how", ORDERS)
def test_all_verbs_do_in_a_compiled_unet_what_they_do_in_an_uncompiled_one(small, how):
    base, files = small
    compiled, plain = copy.deepcopy(base), copy.deepcopy(base)
    before = None
    for name in ORDERS[how]:
        if name == "compile":
            compile_unet(compiled, how)
        else:
            STEPS[name](compiled, files)
            STEPS[name](plain, files)
        now = picture(compiled, **OPTIONS)
        assert (now - picture(plain, **OPTIONS)).abs().max() < 1e-5, name
        assert before is None or name == "compile" or (now - before).abs().max() > 1e-3, f"{name} has changed nothing"
        before = now


def test_a_tuner_that_was_loaded_first_acts_after_compiling_and_its_weight_per_call_counts(small):
    base, files = small
    pipe = copy.deepcopy(base)
    sdtune.load_tuner(pipe, files / "one.safetensors", "one")
    wanted = {s: picture(pipe, **OPTIONS, cross_attention_kwargs={"scale": s}) for s in (0.5,)}
    compile_unet(pipe, "compile_repeated_blocks")
    for scale, picture_there in wanted.items():
        own = picture(pipe, **OPTIONS, cross_attention_kwargs={"scale": scale})
        assert (own - picture_there).abs().max() < 1e-5, scale


def test_columns_of_a_compiled_unet_are_drawn_one_after_another(small):
    base, files = small
    pipe = copy.deepcopy(base)
    sdtune.load_tuner(pipe, files / "one.safetensors", "one")
    assert per_sample.can_share_a_pass(pipe.unet, ["one"])
    compile_unet(pipe, "fullgraph")  # it cannot trace that each sample has its own weights
    assert not per_sample.can_share_a_pass(pipe.unet, ["one"])
