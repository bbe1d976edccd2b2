"""A tuner is an adapter like any other: what diffusers' LoRA tests (tests/lora/utils.py) promise, on the real base."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import sdtune

OFF = dict(num_inference_steps=2, output_type="np", guidance_scale=3.0)


@pytest.fixture(scope="session")
def base():
    return sdtune.load_base("tiny-sd")


@pytest.fixture
def pipe(base):
    return copy.deepcopy(base)


def picture(pipe, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe("a cat face", generator=generator, **{**OFF, **kwargs}).images)


def stir(pipe, name, seed):
    """Gives a fresh tuner weights that show."""
    generator = torch.Generator().manual_seed(seed)
    for n, p in sdtune.attach.parameters_of(sdtune.pipeline.unet_of(pipe), name).items():
        if ".o." in n:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)


@pytest.fixture(scope="session")
def files(base, tmp_path_factory):
    """A tuner, a second one, and a LoRA of UNet and text encoder as diffusers saves it."""
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("one", "two")):
        pipe = copy.deepcopy(base)
        sdtune.add_tuner(pipe, sdtune.TunerConfig(ops=["attn1", "ff"] if seed else ["attn1", "attn2", "ff"]), name)
        stir(pipe, name, seed)
        sdtune.save_tuner(pipe, folder / f"{name}.safetensors", name)
    pipe, layers = copy.deepcopy(base), {}
    torch.manual_seed(3)
    for part, model, targets in (
        ("unet", pipe.unet, ["to_q", "to_k", "to_v", "to_out.0"]),
        ("text_encoder", pipe.text_encoder, ["q_proj", "v_proj"]),
    ):
        model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
        layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    StableDiffusionPipeline.save_lora_weights(folder / "lora", **layers)
    return folder


@pytest.fixture
def tuned(pipe, files):
    sdtune.load_tuner(pipe, files / "one.safetensors", "one")
    return pipe


@pytest.mark.parametrize("ops", [["attn1"], ["attn2"], ["ff"], ["block"], ["attn1", "attn2", "ff"]])
def test_a_fresh_tuner_changes_nothing_and_renames_nothing(pipe, ops):
    before, keys = picture(pipe), {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    sdtune.add_tuner(pipe, sdtune.TunerConfig(ops=ops), "new")
    assert torch.equal(picture(pipe), before)
    after = pipe.unet.state_dict()
    assert keys.keys() < after.keys() and all(torch.equal(after[k], v) for k, v in keys.items())
    assert all(".res_tuner." in k for k in after.keys() - keys.keys())
    stir(pipe, "new", 0)
    assert not torch.equal(picture(pipe), before)


def test_scale_disable_and_weights_work_as_for_a_lora(tuned, base):
    plain, full = picture(base), picture(tuned)
    assert not torch.equal(plain, full)
    assert torch.equal(picture(tuned, cross_attention_kwargs={"scale": 0.0}), plain)
    half = picture(tuned, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(picture(tuned), full)
    tuned.set_adapters("one", 0.5)
    assert torch.equal(picture(tuned), half) and not torch.equal(half, full)
    picture(tuned, cross_attention_kwargs={"scale": 0.0})  # the weight of set_adapters survives the call
    assert torch.equal(picture(tuned), half)
    tuned.disable_lora()
    assert torch.equal(picture(tuned), plain)
    tuned.enable_lora()
    assert torch.equal(picture(tuned), half)
    tuned.unet.disable_adapters()
    assert torch.equal(picture(tuned), plain)


def test_per_block_weights_reach_only_their_blocks(tuned, base):
    everywhere = {"down": 1.0, "mid": 1.0, "up": 1.0}
    tuned.set_adapters("one", {"unet": everywhere})
    full = picture(tuned)
    tuned.set_adapters("one", {"unet": {k: 0.0 for k in everywhere}})
    assert torch.equal(picture(tuned), picture(base))
    tuned.set_adapters("one", {"unet": {**everywhere, "mid": 0.0}})
    without_mid = picture(tuned)
    assert not torch.equal(without_mid, full) and not torch.equal(without_mid, picture(base))
    tuned.set_adapters("one", {"unet": {"up": {"block_1": [0.3, 0.6]}}})
    assert not torch.equal(picture(tuned), full)


def test_two_tuners_mix_by_weight(tuned, files, base):
    one = picture(tuned)
    sdtune.load_tuner(tuned, files / "two.safetensors", "two")
    assert tuned.get_active_adapters() == ["two"] and tuned.get_list_adapters() == {"unet": ["one", "two"]}
    two = picture(tuned)
    tuned.set_adapters(["one", "two"], [1.0, 0.0])
    assert torch.equal(picture(tuned), one)
    tuned.set_adapters(["one", "two"], [0.0, 1.0])
    assert torch.equal(picture(tuned), two)
    tuned.set_adapters(["one", "two"], [0.7, 0.4])
    assert not any(torch.equal(picture(tuned), p) for p in (one, two, picture(base)))
    residual = {}
    holder = tuned.unet.mid_block.attentions[0].transformer_blocks[0].attn1.res_tuner
    x = torch.randn(1, 16, 224)
    for names, weights in ((["one"], [0.7]), (["two"], [0.4]), (["one", "two"], [0.7, 0.4])):
        tuned.set_adapters(names, weights)
        residual[len(residual)] = holder(x)
    torch.testing.assert_close(residual[0] + residual[1], residual[2])


def test_deleting_unloading_and_loading_again(tuned, files, base):
    full = picture(tuned)
    sdtune.load_tuner(tuned, files / "two.safetensors", "two")
    tuned.delete_adapters("two")
    tuned.set_adapters("one")
    assert torch.equal(picture(tuned), full)
    tuned.delete_adapters("one")
    assert torch.equal(picture(tuned), picture(base)) and tuned.get_list_adapters() == {}
    sdtune.load_tuner(tuned, files / "one.safetensors", "one")
    assert torch.equal(picture(tuned), full)
    sdtune.unload_tuner(tuned, "one")
    assert tuned.unet.state_dict().keys() == base.unet.state_dict().keys()
    assert not any(m._forward_hooks for m in tuned.unet.modules())
    sdtune.load_tuner(tuned, files / "one.safetensors", "one")
    tuned.unload_lora_weights()
    assert torch.equal(picture(tuned), picture(base))
    assert tuned.unet.state_dict().keys() == base.unet.state_dict().keys()
    sdtune.load_tuner(tuned, files / "one.safetensors", "one")
    assert torch.equal(picture(tuned), full)


def test_wrong_names_raise_and_say_what_is_there(tuned, files):
    with pytest.raises(ValueError, match="'one' is already in use"):
        sdtune.load_tuner(tuned, files / "two.safetensors", "one")
    with pytest.raises(ValueError, match="without a dot"):
        sdtune.add_tuner(tuned, adapter_name="a.b")
    with pytest.raises(ValueError, match="no tuner named 'ghost'.*'one'"):
        sdtune.unload_tuner(tuned, "ghost")
    with pytest.raises(ValueError, match="no tuner named 'ghost'"):
        sdtune.save_tuner(tuned, "x.safetensors", "ghost")
    with pytest.raises(ValueError, match="ghost"):
        tuned.set_adapters("ghost")
    with pytest.raises(ValueError, match="with a UNet"):
        sdtune.add_tuner(object())


@pytest.mark.parametrize("first", ["lora", "tuner"])
@pytest.mark.parametrize("lora_name", ["lora", None])
def test_a_lora_loaded_before_or_after_works_unchanged_and_mixes(base, files, first, lora_name):
    alone = copy.deepcopy(base)
    alone.load_lora_weights(files / "lora", use_safetensors=True)
    lora_only = picture(alone)
    tuner_only = copy.deepcopy(base)
    sdtune.load_tuner(tuner_only, files / "one.safetensors", "one")

    pipe = copy.deepcopy(base)
    for what in (["lora", "tuner"], ["tuner", "lora"])[first == "tuner"]:
        if what == "lora":
            pipe.load_lora_weights(files / "lora", adapter_name=lora_name, use_safetensors=True)
            if first == "tuner":  # as with two LoRAs, the one loaded last is active
                assert torch.equal(picture(pipe), lora_only)
        else:
            sdtune.load_tuner(pipe, files / "one.safetensors", "one")
    lora = lora_name or next(n for n in pipe.get_list_adapters()["unet"] if n != "one")
    assert set(pipe.get_list_adapters()["unet"]) == {"one", lora}
    pipe.set_adapters(lora)
    assert torch.equal(picture(pipe), lora_only)
    pipe.set_adapters("one")
    assert torch.equal(picture(pipe), picture(tuner_only))
    pipe.set_adapters(["one", lora], [1.0, 0.5])
    mixed = picture(pipe)
    assert not torch.equal(mixed, lora_only) and not torch.equal(mixed, picture(tuner_only))
    swapped = copy.deepcopy(base)
    for step in (["tuner", "lora"], ["lora", "tuner"])[first == "tuner"]:
        if step == "lora":
            swapped.load_lora_weights(files / "lora", adapter_name="lora", use_safetensors=True)
        else:
            sdtune.load_tuner(swapped, files / "one.safetensors", "one")
    swapped.set_adapters(["one", "lora"], [1.0, 0.5])
    assert torch.equal(picture(swapped), mixed)
    sdtune.unload_tuner(pipe, "one")
    pipe.set_adapters(lora)
    assert torch.equal(picture(pipe), lora_only)


def test_fusing_an_active_tuner_says_why_not_and_changes_nothing(tuned, files):
    tuned.load_lora_weights(files / "lora", adapter_name="lora", use_safetensors=True)
    tuned.set_adapters(["one", "lora"])
    before, weights = picture(tuned), {k: v.clone() for k, v in tuned.unet.state_dict().items()}
    with pytest.raises(ValueError, match="'one' cannot be fused.*depends on its input"):
        tuned.fuse_lora()
    assert all(torch.equal(v, weights[k]) for k, v in tuned.unet.state_dict().items())
    assert torch.equal(picture(tuned), before)
    tuned.fuse_lora(adapter_names=["lora"])
    assert tuned.num_fused_loras == 1
    assert torch.allclose(picture(tuned), before, atol=1e-3)
    tuned.unfuse_lora()
    assert torch.allclose(picture(tuned), before, atol=1e-3)


def test_a_file_that_does_not_fit_leaves_the_pipeline_as_it_was(tuned, files, tmp_path):
    before, keys, adapters = picture(tuned), set(tuned.unet.state_dict()), tuned.get_list_adapters()
    file = sdtune.store.load(files / "two.safetensors")
    names = list(file.tensors)
    shapes = {k: tuple(t.shape) for k, t in file.tensors.items()}
    file.tensors["extra.attn1.qkv.weight"] = torch.ones(2)
    file.tensors[names[0]] = torch.ones(3, 3)
    del file.tensors[names[1]]
    path = sdtune.store.save(tmp_path / "odd.safetensors", file)
    with pytest.raises(sdtune.TunerFileError) as error:
        sdtune.load_tuner(tuned, path, "odd")
    text = str(error.value)
    assert "1 missing" in text and "1 extra" in text and "[3, 3], expected" in text and str(path) in text
    assert str(list(shapes[names[0]])) in text and "tiny-sd" in text
    assert set(tuned.unet.state_dict()) == keys and tuned.get_list_adapters() == adapters
    assert torch.equal(picture(tuned), before)


def test_saving_what_was_loaded_gives_the_same_file_content(tuned, files, tmp_path):
    sdtune.save_tuner(tuned, tmp_path, "one")
    a, b = sdtune.store.load(files / "one.safetensors"), sdtune.store.load(tmp_path)
    assert a.config == b.config and a.base == b.base
    assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def test_a_bare_unet_will_do_and_the_options_of_diffusers_are_understood(base, files):
    unet = copy.deepcopy(base.unet)
    assert sdtune.load_tuner(unet, files / "one.safetensors", low_cpu_mem_usage=True) == "tuner_0"
    assert sdtune.load_tuner(unet, files / "one.safetensors") == "tuner_1"
    sdtune.unload_tuner(unet, "tuner_0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tuner_follows_the_dtype_of_its_pipeline(base, files, dtype):
    pipe = copy.deepcopy(base)
    pipe.unet.to(dtype)
    sdtune.load_tuner(pipe, files / "one.safetensors", "one")
    x = (torch.randn(1, 4, 16, 16, dtype=dtype), torch.tensor([9]), torch.randn(1, 77, 192, dtype=dtype))
    assert pipe.unet(*x).sample.dtype == dtype
    pipe.unet.to(torch.float32)
    assert all(p.dtype == torch.float32 for p in pipe.unet.parameters())
    assert torch.isfinite(picture(pipe)).all()


def test_gradient_checkpointing_gives_the_same_gradients(pipe):
    sdtune.add_tuner(pipe, adapter_name="new")
    stir(pipe, "new", 1)
    pipe.unet.requires_grad_(False).train()
    parameters = list(sdtune.attach.parameters_of(pipe.unet, "new").values())
    for p in parameters:
        p.requires_grad_(True)
    x = (torch.randn(1, 4, 16, 16), torch.tensor([9]), torch.randn(1, 77, 192))
    plain = torch.autograd.grad(pipe.unet(*x).sample.pow(2).sum(), parameters)
    pipe.unet.enable_gradient_checkpointing()
    saved = torch.autograd.grad(pipe.unet(*x).sample.pow(2).sum(), parameters)
    for a, b in zip(plain, saved):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_group_offloading_switched_on_before_or_after_loading(pipe, files, base, kind, order):
    expected = copy.deepcopy(base)
    sdtune.load_tuner(expected, files / "one.safetensors", "one")
    if order == "after":
        sdtune.load_tuner(pipe, files / "one.safetensors", "one")
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, **blocks)
    if order == "before":
        sdtune.load_tuner(pipe, files / "one.safetensors", "one")
    assert torch.equal(picture(pipe), picture(expected))


@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_cpu_offloading_survives_loading_and_saving(pipe, files, base, how, tmp_path):
    expected = copy.deepcopy(base)
    sdtune.load_tuner(expected, files / "one.safetensors", "one")
    alone = copy.deepcopy(base)
    try:
        getattr(alone, how)(device="cpu")
        picture(alone)
    except (RuntimeError, TypeError) as error:
        pytest.skip(f"a pipeline without any tuner cannot be offloaded like this without an accelerator: {error}")
    getattr(pipe, how)(device="cpu")
    sdtune.load_tuner(pipe, files / "one.safetensors", "one")
    assert torch.equal(picture(pipe), picture(expected))
    sdtune.save_tuner(pipe, tmp_path, "one")
    assert sdtune.store.load(tmp_path).tensors.keys() == sdtune.store.load(files / "one.safetensors").tensors.keys()
    sdtune.unload_tuner(pipe, "one")
    assert torch.equal(picture(pipe), picture(base))


def test_a_model_without_transformer_blocks_is_refused():
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, mid_block_type=None,
        down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="no BasicTransformerBlock"):
        sdtune.add_tuner(unet)
