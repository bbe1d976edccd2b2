"""A tuner is an adapter like any other: what diffusers' LoRA tests (tests/lora/utils.py) promise, on the real base."""

import copy
import shutil
import warnings
from dataclasses import replace

import accelerate
import pytest
import torch
from conftest import picture, stir
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import sdtune
from sdtune.adapters import inject, tuner_file

SCALE = "cross_attention_kwargs"


@pytest.fixture
def tuned(pipe, files):
    sdtune.load_tuner(pipe, files / "one.safetensors", "one")
    return pipe


@pytest.fixture
def both(tuned, files):
    """Two tuners on different operations; the second one is active."""
    sdtune.load_tuner(tuned, files / "two.safetensors", "two")
    return tuned


@pytest.fixture(scope="module")
def alone(base, files):
    """What the base, each tuner and the LoRA draw where there is nothing else; the LoRA's without sdtune."""
    drawn = {"base": picture(base)}
    for name in ("one", "two"):
        pipe = copy.deepcopy(base)
        sdtune.load_tuner(pipe, files / f"{name}.safetensors", name)
        drawn[name] = picture(pipe)
    pipe = copy.deepcopy(base)
    pipe.load_lora_weights(files / "lora")
    drawn["lora"] = picture(pipe)
    pictures = list(drawn.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])
    return drawn


def close(a, b) -> bool:
    """Whether two pictures differ by rounding only."""
    return (a - b).abs().max() < 1e-3


def load_lora(pipe, files, name="lora"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of the second adapter of a model
        pipe.load_lora_weights(files / "lora", adapter_name=name)


def scaled_by_hand(base, files, weights, name="one"):
    """What is drawn by a tuner whose results were scaled in its own weights: {part of a path: weight}."""
    pipe = copy.deepcopy(base)
    sdtune.load_tuner(pipe, files / f"{name}.safetensors", name)
    for key, p in inject.adapter_parameters(pipe.unet, name).items():
        if ".o." in key:
            p.data *= next((w for part, w in weights.items() if part in key), 1.0)
    return picture(pipe)


# --- one tuner ---


def test_a_fresh_tuner_draws_what_the_base_draws(pipe, alone):
    assert sdtune.add_tuner(pipe) == "tuner_0"
    assert torch.equal(picture(pipe), alone["base"]) and pipe.get_active_adapters() == ["tuner_0"]
    stir(pipe, "tuner_0", 0)
    assert not torch.equal(picture(pipe), alone["base"])


def test_a_scale_of_0_draws_what_the_base_draws_and_any_other_one_acts_for_its_call_only(tuned, alone):
    half = picture(tuned, **{SCALE: {"scale": 0.5}})
    assert torch.equal(picture(tuned, **{SCALE: {"scale": 0.0}}), alone["base"])
    assert torch.equal(picture(tuned), alone["one"])
    assert torch.equal(picture(tuned, **{SCALE: {"scale": 1.0}}), alone["one"])
    assert not torch.equal(half, alone["one"]) and not torch.equal(half, alone["base"])
    tuned.set_adapters("one", 0.5)
    assert torch.equal(picture(tuned), half)


@pytest.mark.parametrize("scale", [0.0, 0.3, 2.0])
def test_the_weight_of_set_adapters_survives_a_call_with_a_scale_and_multiplies_it(tuned, scale):
    tuned.set_adapters("one", 0.5 * scale)
    product = picture(tuned)
    tuned.set_adapters("one", 0.5)
    half = picture(tuned)
    assert close(picture(tuned, **{SCALE: {"scale": scale}}), product)
    assert torch.equal(picture(tuned), half)


def test_a_call_that_fails_leaves_no_scale_behind(tuned, alone):
    with pytest.raises(RuntimeError):
        tuned.unet(torch.randn(1, 3, 16, 16), 1, torch.randn(1, 9, 192), **{SCALE: {"scale": 0.5}})
    assert torch.equal(picture(tuned), alone["one"])


@pytest.mark.parametrize("of", ["pipe", "unet"])
def test_disabling_draws_what_the_base_draws_and_enabling_brings_the_tuner_and_its_weight_back(tuned, alone, of):
    tuned.set_adapters("one", 0.5)
    half = picture(tuned)
    tuned.disable_lora() if of == "pipe" else tuned.unet.disable_adapters()
    assert torch.equal(picture(tuned), alone["base"])
    assert torch.equal(picture(tuned, **{SCALE: {"scale": 0.5}}), alone["base"])
    tuned.enable_lora() if of == "pipe" else tuned.unet.enable_adapters()
    assert torch.equal(picture(tuned), half)


def test_a_tuner_that_is_loaded_while_adapters_are_disabled_draws(tuned, files, alone):
    tuned.disable_lora()
    sdtune.load_tuner(tuned, files / "two.safetensors", "two")
    assert torch.equal(picture(tuned), alone["two"])


def test_weights_per_block_reach_exactly_their_blocks(tuned, base, files, alone):
    tuned.set_adapters("one", {"unet": {"down": 0.5, "mid": 0.2, "up": {"block_1": [0.1, 0.9], "block_2": 0.0}}})
    assert not close(picture(tuned), alone["one"])
    by_hand = {"down_blocks": 0.5, "mid_block": 0.2, "up_blocks.1.attentions.0": 0.1, "up_blocks.1.attentions.1": 0.9,
               "up_blocks.2": 0.0}  # fmt: skip
    assert close(picture(tuned), scaled_by_hand(base, files, by_hand))
    tuned.set_adapters("one", {"unet": {"mid": 0.0, "down": {"block_1": 0.0}}})  # the rest has 1
    by_hand = {"mid_block": 0.0, "down_blocks.1": 0.0}
    assert close(picture(tuned), scaled_by_hand(base, files, by_hand))
    tuned.set_adapters("one", {"unet": {"down": 0, "mid": 0, "up": 0}})
    assert torch.equal(picture(tuned), alone["base"])
    tuned.set_adapters("one", {"unet": {"down": 0.5, "mid": 0.5, "up": 0.5}})
    half = picture(tuned)
    tuned.set_adapters("one", 0.5)
    assert torch.equal(picture(tuned), half)
    with pytest.raises(ValueError, match="Expected 1 scales for down.block_1, got 3"):
        tuned.set_adapters("one", {"unet": {"down": {"block_1": [1, 1, 1]}}})


def test_the_device_of_one_adapter_can_be_set_as_for_a_lora(tuned):
    tuned.set_lora_device(["one"], "meta")
    assert {p.device.type for p in inject.adapter_parameters(tuned.unet, "one").values()} == {"meta"}


# --- several tuners ---


def test_the_one_loaded_last_is_active_alone(both, alone):
    assert both.get_active_adapters() == ["two"] and both.get_list_adapters() == {"unet": ["one", "two"]}
    assert torch.equal(picture(both), alone["two"])
    for name in ("one", "two"):
        both.set_adapters(name)
        assert torch.equal(picture(both), alone[name]) and both.get_active_adapters() == [name]


def test_two_tuners_mix_by_weight_and_a_weight_of_0_is_none(both, alone):
    both.set_adapters(["one", "two"], [1.0, 0.0])
    assert torch.equal(picture(both), alone["one"])
    both.set_adapters(["one", "two"], [0.0, 1.0])
    assert torch.equal(picture(both), alone["two"])
    both.set_adapters(["one", "two"], [0.7, 0.4])
    mixed = picture(both)
    assert both.get_active_adapters() == ["one", "two"] and not any(torch.equal(mixed, p) for p in alone.values())
    assert torch.equal(picture(both, **{SCALE: {"scale": 0.0}}), alone["base"])
    assert torch.equal(picture(both), mixed)
    both.set_adapters(["two", "one"], [0.4, 0.7])
    assert close(picture(both), mixed)


def test_what_a_mix_adds_is_the_sum_of_the_weighted_tuners(both):
    op = both.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    x = torch.randn(1, 16, 224)
    with torch.no_grad():
        one, two = (op.res_tuner.tuners[name](x) for name in ("one", "two"))
        both.set_adapters(["one", "two"], [0.7, -0.4])
        mixed = op(x)
        both.disable_lora()
        torch.testing.assert_close(mixed - op(x), 0.7 * one - 0.4 * two)


def test_weights_per_block_of_two_tuners_at_once(both, base, files):
    both.set_adapters(["one", "two"], [{"unet": {"down": 0.3, "up": 0.0, "mid": 0.0}}, 0.0])
    by_hand = {"down_blocks": 0.3, "up_blocks": 0.0, "mid_block": 0.0}
    assert close(picture(both), scaled_by_hand(base, files, by_hand))
    both.set_adapters(["one", "two"], [0.0, {"unet": {"down": 0.3, "up": 0.0, "mid": 0.0}}])
    assert close(picture(both), scaled_by_hand(base, files, by_hand, "two"))
    with pytest.raises(ValueError, match="[Ll]ength"):
        both.set_adapters(["one", "two"], [1.0, 0.5, 0.2])


@pytest.mark.parametrize("gone", ["one", "two"])
@pytest.mark.parametrize("active", [["one"], ["two"], ["one", "two"]])
def test_deleting_one_of_two_leaves_the_other(both, alone, gone, active):
    left = "two" if gone == "one" else "one"
    both.set_adapters(active)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both.delete_adapters(gone)
    assert both.get_list_adapters() == {"unet": [left]} and both.get_active_adapters() == [left]
    assert torch.equal(picture(both), alone[left])


def test_deleting_the_last_one_leaves_the_base_and_it_can_be_loaded_again(both, base, files, alone):
    both.delete_adapters(["one", "two"])
    assert torch.equal(picture(both), alone["base"]) and both.get_list_adapters() == {}
    assert both.unet.state_dict().keys() == base.unet.state_dict().keys()
    sdtune.load_tuner(both, files / "one.safetensors", "one")
    assert torch.equal(picture(both), alone["one"])


@pytest.mark.parametrize("lora", [False, True])
def test_unload_lora_weights_removes_every_tuner_and_lora(both, base, files, alone, lora):
    if lora:
        load_lora(both, files)
        both.set_adapters(["one", "two", "lora"])
    both.unload_lora_weights()
    assert torch.equal(picture(both), alone["base"]) and both.get_list_adapters() == {}
    assert both.unet.state_dict().keys() == base.unet.state_dict().keys()
    sdtune.load_tuner(both, files / "two.safetensors", "two")
    assert torch.equal(picture(both), alone["two"])


def test_wrong_names_raise_and_say_what_is_there(tuned, files, alone, tmp_path):
    with pytest.raises(ValueError, match="'one' is already in use"):
        sdtune.load_tuner(tuned, files / "two.safetensors", "one")
    for name in ("a.b", "", "items"):
        with pytest.raises(ValueError, match="adapter_name is"):
            sdtune.load_tuner(tuned, files / "two.safetensors", name)
    with pytest.raises(ValueError, match="no tuner named 'ghost'.*'one'"):
        sdtune.unload_tuner(tuned, "ghost")
    with pytest.raises(ValueError, match="no tuner named 'ghost'.*'one'"):
        sdtune.save_tuner(tuned, tmp_path / "x.safetensors", "ghost")
    for names in ("ghost", ["one", "ghost"]):
        with pytest.raises(ValueError, match="ghost.*one"):
            tuned.set_adapters(names)
    with pytest.raises(ValueError, match="with a UNet"):
        sdtune.add_tuner(object())
    assert torch.equal(picture(tuned), alone["one"]) and tuned.get_active_adapters() == ["one"]


def test_tuners_without_a_name_are_numbered_past_the_names_in_use(pipe, files):
    sdtune.add_tuner(pipe, adapter_name="tuner_1")
    names = [sdtune.load_tuner(pipe, files / "one.safetensors") for _ in range(2)]
    assert names == ["tuner_0", "tuner_2"]


def test_adapters_on_operations_that_others_have_left_are_active_when_they_should_be(pipe):
    for name in "abc":
        sdtune.add_tuner(pipe, sdtune.TunerConfig(ops=["attn1", "ff"] if name == "a" else ["ff"]), name)
        if name == "a":
            pipe.delete_adapters("a")
    pipe.set_adapters("b")
    pipe.delete_adapters("b")
    assert pipe.get_active_adapters() == ["c"]


# --- beside a LoRA ---


@pytest.mark.parametrize("lora_name", ["lora", None])
@pytest.mark.parametrize("first", ["lora", "tuner"])
def test_a_lora_and_a_tuner_draw_in_either_order_what_each_draws_alone_and_mix(base, files, alone, first, lora_name):
    def load(order, lora_name):
        pipe = copy.deepcopy(base)
        for what in order:
            if what == "lora":
                load_lora(pipe, files, lora_name)
            else:
                sdtune.load_tuner(pipe, files / "one.safetensors", "anime")
            # as with two LoRAs, the one that was loaded last is the active one
            assert torch.equal(picture(pipe), alone["lora" if what == "lora" else "one"])
        return pipe

    order = ["lora", "tuner"] if first == "lora" else ["tuner", "lora"]
    pipe, lora = load(order, lora_name), lora_name or "default_0"
    assert pipe.get_list_adapters() == {
        "unet": [lora, "anime"] if first == "lora" else ["anime", lora], "text_encoder": [lora],
    }  # fmt: skip
    for name, expected in ((lora, "lora"), ("anime", "one"), (lora, "lora")):
        pipe.set_adapters(name)
        assert torch.equal(picture(pipe), alone[expected]) and pipe.get_active_adapters() == [name]
    pipe.set_adapters(["anime", lora], [1.0, 0.5])
    mixed = picture(pipe)
    assert not any(torch.equal(mixed, p) for p in alone.values())
    other = load(order[::-1], lora_name)
    other.set_adapters(["anime", lora], [1.0, 0.5])
    assert torch.equal(picture(other), mixed)
    assert torch.equal(picture(pipe, **{SCALE: {"scale": 0.0}}), alone["base"])
    other.disable_lora()
    assert torch.equal(picture(other), alone["base"])
    other.enable_lora()
    assert torch.equal(picture(other), mixed)
    other.delete_adapters(lora)
    assert torch.equal(picture(other), alone["one"])


@pytest.mark.parametrize("active", [["one"], ["lora"], ["one", "lora"]])
def test_unloading_the_tuner_leaves_the_lora_working(tuned, files, alone, active):
    load_lora(tuned, files)
    tuned.set_adapters(active)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, that the LoRA is the active one now
        sdtune.unload_tuner(tuned, "one")
    assert torch.equal(picture(tuned), alone["lora"]) and tuned.get_active_adapters() == ["lora"]
    assert not any("res_tuner" in key for key in tuned.unet.state_dict())


def test_when_the_active_tuner_goes_all_parts_agree_on_the_next_one(both, files, alone):
    load_lora(both, files)
    both.set_adapters("one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both.delete_adapters("one")
    assert both.get_active_adapters() == ["lora"] and torch.equal(picture(both), alone["lora"])


def test_unnamed_loras_get_the_names_that_they_get_without_a_tuner(both, files, base):
    for _ in range(2):
        load_lora(both, files, None)
    assert both.get_list_adapters() == {
        "unet": ["one", "two", "default_0", "default_1"], "text_encoder": ["default_0", "default_1"],
    }  # fmt: skip


@pytest.mark.parametrize("hotswap", [False, True])
def test_a_lora_cannot_take_a_tuners_name_nor_be_swapped_in_for_it(tuned, files, alone, hotswap):
    weights = {k: v for k, v in tuned.lora_state_dict(files / "lora")[0].items() if k.startswith("unet")}
    with pytest.raises(ValueError, match="'one' is already in use"):
        tuned.load_lora_weights(weights, adapter_name="one", hotswap=hotswap)
    assert torch.equal(picture(tuned), alone["one"]) and tuned.get_list_adapters() == {"unet": ["one"]}


def test_a_lora_saved_beside_a_tuner_holds_nothing_of_it(tuned, files, tmp_path):
    sdtune.add_tuner(tuned, adapter_name="lora_like")
    load_lora(tuned, files)
    keys = get_peft_model_state_dict(tuned.unet, adapter_name="lora").keys()
    assert keys and not any("res_tuner" in k for k in keys)


# --- fusing ---


def state(pipe):
    parts = (pipe.unet, pipe.text_encoder)
    return [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]


def same(a, b):
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b))


@pytest.mark.parametrize(
    "how", [{}, {"lora_scale": 0.7}, {"adapter_names": ["one"]}, {"adapter_names": ["lora", "one"]}]
)
def test_fusing_an_active_tuner_says_why_it_cannot_be_and_leaves_everything_as_it_was(tuned, files, how):
    load_lora(tuned, files)
    tuned.set_adapters(["one", "lora"], [0.8, 0.5])
    before, weights = picture(tuned), state(tuned)
    with pytest.raises(ValueError, match="'one' cannot be fused.*depends on its input"):
        tuned.fuse_lora(**how)
    assert same(state(tuned), weights) and torch.equal(picture(tuned), before) and tuned.num_fused_loras == 0


def test_a_tuner_alone_cannot_be_fused_either_and_one_that_is_disabled_is_passed_over(tuned, alone):
    with pytest.raises(ValueError, match="cannot be fused"):
        tuned.fuse_lora()
    assert torch.equal(picture(tuned), alone["one"])
    tuned.disable_lora()
    tuned.fuse_lora()
    tuned.enable_lora()
    assert torch.equal(picture(tuned), alone["one"]) and tuned.num_fused_loras == 0


@pytest.mark.parametrize("lora_scale", [1.0, 0.5])
def test_a_lora_can_be_fused_by_name_beside_an_active_tuner_which_keeps_its_weight(tuned, files, alone, lora_scale):
    load_lora(tuned, files)
    tuned.set_adapters(["one", "lora"], [0.8, lora_scale])
    expected = picture(tuned)
    tuned.set_adapters(["one", "lora"], [0.8, 1.0])
    whole = picture(tuned)
    tuned.fuse_lora(adapter_names=["lora"], lora_scale=lora_scale)
    assert tuned.fused_loras == {"lora"}
    assert close(picture(tuned), expected)
    tuned.unfuse_lora()
    if lora_scale == 1.0:  # diffusers leaves a LoRA at the scale that it was fused with
        assert close(picture(tuned), whole)
    tuned.set_adapters("one", 1.0)
    assert close(picture(tuned), alone["one"])


# --- loading, saving, offloading ---


def test_saving_what_was_loaded_gives_the_same_content_and_keeps_where_it_came_from(tuned, tmp_path):
    sdtune.save_tuner(tuned, tmp_path / "a", "one", trigger_words="tok", training={"steps": 3})
    sdtune.load_tuner(tuned, tmp_path / "a", "again")
    path = sdtune.save_tuner(tuned, tmp_path / "b.safetensors", "again")
    a, b = tuner_file.load(tmp_path / "a"), tuner_file.load(path)
    assert a.config == b.config and a.base == b.base and b.trigger_words == "tok" and b.training == {"steps": 3}
    assert a.base["name"] == "tiny-sd" and a.base["prediction_type"] == "epsilon"
    assert a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def test_a_copy_names_the_base_it_was_trained_on_and_loads_from_where_it_was_written(pipe, base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pipe.register_modules(
        scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="v_prediction")
    )
    sdtune.add_tuner(pipe)
    sdtune.save_tuner(pipe, "~/v.safetensors")
    unet = copy.deepcopy(base.unet)
    sdtune.load_tuner(unet, "~/v.safetensors", "a")
    sdtune.save_tuner(unet, tmp_path / "deeper/copy.safetensors", "a")
    file = tuner_file.load(tmp_path / "deeper", subfolder=".", weight_name="copy.safetensors")
    assert file.base["name"] == "tiny-sd" and file.base["prediction_type"] == "v_prediction"
    with pytest.warns(
        UserWarning, match="a base that predicts v_prediction, and this pipeline's scheduler expects epsilon"
    ):
        sdtune.load_tuner(copy.deepcopy(base), tmp_path, weight_name="copy.safetensors", subfolder="deeper")
    with pytest.raises(ValueError, match="dtype is torch.int8; a tuner file has weights of torch.float16"):
        sdtune.save_tuner(pipe, tmp_path / "x.safetensors", dtype=torch.int8)
    with pytest.raises(sdtune.TunerFileError, match="None cannot be looked up"):
        sdtune.load_tuner(pipe, None)


def test_a_tuner_saved_in_fp32_is_drawn_bit_for_bit_in_a_fresh_pipeline(pipe, base, tmp_path):
    sdtune.add_tuner(pipe, sdtune.TunerConfig(rank=3, num_heads=5, ops=["block", "attn2"], qkv_bias=True))
    stir(pipe, "tuner_0", 5)
    path = sdtune.save_tuner(pipe, tmp_path, dtype=torch.float32)
    fresh = copy.deepcopy(base)
    sdtune.load_tuner(fresh, tmp_path)
    assert torch.equal(picture(fresh), picture(pipe)) and path.parent == tmp_path


def test_loading_leaves_the_random_state_alone_and_the_weights_apart_from_the_file(pipe, base, files, tmp_path):
    copied = tmp_path / "a.safetensors"
    sdtune.load_tuner(pipe, files / "one.safetensors", "one")
    sdtune.save_tuner(pipe, copied, "one", dtype=torch.float32)
    random = torch.get_rng_state()
    sdtune.load_tuner(pipe, copied, "two")
    assert torch.equal(torch.get_rng_state(), random)
    before = picture(pipe)
    with open(copied, "r+b") as file:  # not as sdtune writes, which puts a new file in its place
        file.seek(copied.stat().st_size // 2)
        file.write(b"\x11" * 100)
    assert torch.equal(picture(pipe), before)


def test_a_bare_unet_will_do_and_the_options_of_diffusers_are_understood(base, files, tmp_path):
    unet = copy.deepcopy(base.unet)
    assert sdtune.load_tuner(unet, files / "one.safetensors", low_cpu_mem_usage=True) == "tuner_0"
    assert sdtune.load_tuner(unet, files, weight_name="two.safetensors") == "tuner_1"
    assert not any(p.is_meta for p in unet.parameters())
    sdtune.save_tuner(unet, tmp_path, "tuner_1")
    sdtune.unload_tuner(unet, "tuner_0")
    unet.set_adapters("tuner_1", 0.5)
    assert list(unet.peft_config) == ["tuner_1"] and unet.active_adapters() == ["tuner_1"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pipeline_in_half_precision_draws_with_a_tuner_loaded_before_or_after(base, files, dtype):
    after, before = (copy.deepcopy(base) for _ in range(2))
    after.to(dtype)
    sdtune.load_tuner(after, files / "one.safetensors", "one")
    sdtune.load_tuner(before, files / "one.safetensors", "one")
    before.to(dtype)
    assert {p.dtype for p in [*after.unet.parameters(), *before.unet.parameters()]} == {dtype}
    drawn = picture(after)
    assert drawn.isfinite().all() and torch.equal(drawn, picture(before))


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading_switched_on_before_or_after_loading_changes_nothing(base, files, alone, kind, tmp_path):
    """On "cpu" for both devices: the hooks run, no bytes move."""
    for order in ("offload first", "load first", "bare unet"):
        pipe = copy.deepcopy(base)
        if order == "load first":
            sdtune.load_tuner(pipe, files / "one.safetensors", "one")
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, **blocks)
        if order != "load first":
            sdtune.load_tuner(pipe.unet if order == "bare unet" else pipe, files / "one.safetensors", "one")
        hooked = {n for n, m in pipe.unet.named_modules() if hasattr(m, "_diffusers_hook")}
        assert kind == "block_level" or any(".res_tuner." in n for n in hooked)  # the tuner is offloaded, too
        assert torch.equal(picture(pipe), alone["one"])
        sdtune.save_tuner(pipe, tmp_path, "one")
        sdtune.unload_tuner(pipe, "one")
        assert torch.equal(picture(pipe), alone["base"])


@pytest.fixture
def cpu_as_accelerator(monkeypatch):
    """diffusers says "cpu:0" for the CPU, which accelerate's sequential offloading takes for another device."""
    real = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda m, d, **kwargs: real(m, torch.device(d.type), **kwargs))


@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("order", ["offload first", "load first"])
def test_cpu_offloading_survives_loading_saving_and_unloading(
    pipe, files, alone, how, order, tmp_path, cpu_as_accelerator
):
    """accelerate's hooks run, the sequential ones with weights on "meta" in between; the rest needs a GPU."""
    if order == "load first":
        sdtune.load_tuner(pipe, files / "one.safetensors", "one")
    getattr(pipe, how)(device="cpu")
    if order == "offload first":
        sdtune.load_tuner(pipe, files / "one.safetensors", "one")
    assert hasattr(pipe.unet, "_hf_hook")
    assert ("sequential" in how) == all(p.is_meta for p in inject.adapter_parameters(pipe.unet, "one").values())
    assert torch.equal(picture(pipe), alone["one"])
    sdtune.save_tuner(pipe, tmp_path, "one")
    saved, known = tuner_file.load(tmp_path).tensors, tuner_file.load(files / "one.safetensors").tensors
    assert saved.keys() == known.keys() and all(torch.equal(saved[k], known[k]) for k in known)
    assert hasattr(pipe.unet, "_hf_hook") and torch.equal(picture(pipe), alone["one"])
    sdtune.unload_tuner(pipe, "one")
    assert hasattr(pipe.unet, "_hf_hook") and torch.equal(picture(pipe), alone["base"])


def test_a_tuner_that_is_moved_to_another_folder_loads_from_there(pipe, files, alone, tmp_path):
    shutil.copy(files / "one.safetensors", tmp_path / "renamed.safetensors")
    sdtune.load_tuner(pipe, tmp_path)
    assert torch.equal(picture(pipe), alone["one"])


def test_two_loras_on_the_same_layers_load_by_our_call_and_mix(pipe, files):
    for name in ("first", "second"):
        sdtune.load_tuner(pipe, files / "lora", name)
        assert pipe.get_active_adapters() == [name]
    one = picture(pipe)
    pipe.set_adapters(["first", "second"], [0.25, 0.75])
    assert torch.allclose(picture(pipe), one, atol=1e-4)


def test_a_hub_id_loads_also_one_with_a_dot(pipe, hub, alone, tmp_path):
    sdtune.load_tuner(pipe, "ann/style-v1.5", "hub", endpoint=hub, cache_dir=tmp_path)
    assert torch.equal(picture(pipe), alone["two"])


def misfits(tensors: dict) -> dict:
    first, *_ = tensors
    return {
        "of the 63 expected are missing": {k: t for k, t in tensors.items() if k != first},
        "1 are not expected: made.up": tensors | {"made.up": torch.ones(1)},
        r"of another shape: .* is \[5\], expected": tensors | {first: torch.ones(5)},
    }


@pytest.mark.parametrize("what", [0, 1, 2], ids=["missing", "extra", "shape"])
def test_a_file_that_does_not_fit_is_refused_by_name_and_the_pipeline_stays_as_it_was(tuned, files, tmp_path, what):
    file = tuner_file.load(files / "one.safetensors")
    message, tensors = list(misfits(file.tensors).items())[what]
    tuner_file.save(tmp_path / "bad.safetensors", replace(file, tensors=tensors))
    before, keys, active = picture(tuned), tuned.unet.state_dict().keys(), tuned.get_active_adapters()
    with pytest.raises(sdtune.TunerFileError, match=f"bad.safetensors does not fit .*{message}"):
        sdtune.load_tuner(tuned, tmp_path, "bad")
    assert torch.equal(picture(tuned), before) and tuned.get_active_adapters() == active
    assert tuned.unet.state_dict().keys() == keys


def test_a_lora_that_does_not_fit_is_refused_and_the_adapters_stay_as_they_were(tuned, files, tmp_path):
    path = files / "lora/pytorch_lora_weights.safetensors"
    wide = {k: torch.ones(len(t), 8 + t.shape[1]) if ".down." in k else t for k, t in load_file(path).items()}
    save_file(wide, tmp_path / "wide.safetensors")
    tuned.load_lora_weights(files / "lora", adapter_name="lora")
    tuned.set_adapters(["one", "lora"], [0.5, 0.7])
    before = picture(tuned)
    with pytest.raises(sdtune.TunerFileError, match="wide.safetensors is a LoRA that does not fit"):
        sdtune.load_tuner(tuned, tmp_path / "wide.safetensors", "wide")
    assert torch.equal(picture(tuned), before) and sorted(tuned.get_active_adapters()) == ["lora", "one"]
    assert all("wide" not in names for names in tuned.get_list_adapters().values())
