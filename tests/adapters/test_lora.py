"""What a LoRA of ours promises: the verbs of a tuner, and a file that diffusers loads without us."""

import copy

import pytest
import torch
from conftest import picture
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import sdtune
from sdtune.adapters import api, lora, tuner_file

OPS = {
    "attention": ["attn1", "attn2"],
    "attention and ff": ["attn1", "attn2", "ff"],
    "with convolutions": ["attn1", "attn2", "ff", "conv"],
}


def trained(pipe, config, name="mine"):
    """A LoRA with weights that show."""
    sdtune.add_tuner(pipe, config, name)
    generator = torch.Generator().manual_seed(0)
    for key, p in api.tuner_parameters(pipe, name).items():
        if "lora_B" in key:
            p.data += 0.2 * torch.randn(p.shape, generator=generator)


def test_a_fresh_one_changes_nothing_and_the_counts_are_those_of_the_method_on_sd15(pipe, sd15_unet):
    before = picture(pipe)
    sdtune.add_tuner(pipe, sdtune.TunerConfig(kind="lora", ops=["attn1", "attn2"]), "mine")
    assert torch.equal(picture(pipe), before)
    for rank, count in ((4, 797_184), (16, 3_188_736)):
        config = sdtune.TunerConfig(kind="lora", rank=rank, ops=["attn1", "attn2"])
        assert sum(torch.Size(s).numel() for s in lora.expected_shapes(sd15_unet, config).values()) == count


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_a_file_of_ours_gives_the_same_picture_through_diffusers_own_loader_and_through_ours(base, tmp_path, kind, ops):
    pipe = copy.deepcopy(base)
    trained(pipe, sdtune.TunerConfig(kind=kind, rank=3, ops=ops))
    expected = picture(pipe)
    path = sdtune.save_tuner(pipe, tmp_path / "mine.safetensors", "mine", dtype=torch.float32)
    saved = tuner_file.load(path)
    assert {k: tuple(t.shape) for k, t in saved.tensors.items()} == lora.expected_shapes(base.unet, saved.config)

    plain = copy.deepcopy(base)
    plain.load_lora_weights(tmp_path, weight_name="mine.safetensors", adapter_name="theirs")
    ours = copy.deepcopy(base)
    sdtune.load_tuner(ours, path, "ours")
    assert isinstance(plain, StableDiffusionPipeline) and not torch.equal(expected, picture(base))
    assert torch.allclose(picture(plain), expected, atol=1e-5) and torch.allclose(picture(ours), expected, atol=1e-5)


def test_lokr_a_row_of_the_evaluation_starts_at_zero_and_its_file_draws_the_same_in_another_pipeline(base, tmp_path):
    pipe = copy.deepcopy(base)
    config = sdtune.TunerConfig(kind="lokr", rank=2, ops=OPS["with convolutions"])
    sdtune.add_tuner(pipe, config, "mine")
    assert torch.equal(picture(pipe), picture(base))
    for key, p in api.tuner_parameters(pipe, "mine").items():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(key)))
    expected = picture(pipe)
    path = sdtune.save_tuner(pipe, tmp_path / "mine.safetensors", "mine", dtype=torch.float32)
    shapes = {k: tuple(t.shape) for k, t in tuner_file.load(path).tensors.items()}
    assert shapes == lora.expected_shapes(base.unet, config)
    other = copy.deepcopy(base)
    sdtune.load_tuner(other, path, "theirs")
    assert torch.allclose(picture(other), expected, atol=1e-5) and not torch.equal(expected, picture(base))
    sdtune.unload_tuner(other, "theirs")
    assert torch.equal(picture(other), picture(base))


def test_it_switches_mixes_with_a_tuner_and_goes_without_a_trace(pipe, files):
    before, keys = picture(pipe), set(pipe.unet.state_dict())
    trained(pipe, sdtune.TunerConfig(kind="lora"))
    alone = picture(pipe)
    sdtune.load_tuner(pipe, files / "one.safetensors", "tuner")
    pipe.set_adapters(["mine", "tuner"], [1.0, 0.0])
    assert torch.allclose(picture(pipe), alone, atol=1e-6)
    pipe.set_adapters(["mine", "tuner"], [0.7, 0.7])
    assert not torch.allclose(picture(pipe), alone, atol=1e-3)
    pipe.disable_lora()
    assert torch.equal(picture(pipe), before)
    pipe.enable_lora()
    sdtune.unload_tuner(pipe, "tuner")
    sdtune.unload_tuner(pipe, "mine")
    assert torch.equal(picture(pipe), before) and set(pipe.unet.state_dict()) == keys


def test_loras_of_any_name_are_told_apart(pipe, tmp_path):
    names = ("A", "B", "lora_conv")  # also such as PEFT uses for its layers
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        sdtune.add_tuner(pipe, sdtune.TunerConfig(kind="lora"), name)
    for name in names:
        own = api.tuner_parameters(pipe, name)
        assert own.keys() == api.expected_shapes(pipe.unet, sdtune.TunerConfig(kind="lora")).keys()
        path = sdtune.save_tuner(pipe, tmp_path / f"{name}.safetensors", name, dtype=torch.float32)
        tensors = tuner_file.load(path).tensors
        assert all(torch.equal(tensors[k], p) for k, p in own.items())


def test_a_lora_of_another_tool_loads_with_the_same_call_and_one_that_does_not_fit_is_told(pipe, files, tmp_path):
    name = sdtune.load_tuner(pipe, files / "lora", "other")
    assert name == "other" and "other" in pipe.get_list_adapters()["unet"]
    with_it = picture(pipe)
    pipe.delete_adapters("other")
    assert not torch.equal(with_it, picture(pipe))
    with pytest.raises(tuner_file.TunerFileError, match="bare UNet"):
        sdtune.load_tuner(pipe.unet, files / "lora", "other")


def test_a_lora_trains_with_the_same_trainer(pairs, tmp_path):
    config = sdtune.TrainConfig(
        data=str(pairs), output=str(tmp_path / "run"), steps=2, batch_size=2, preview_steps=1, preview_every=0,
        preview_prompts=["a girl"], learning_rate=1e-2,
    )  # fmt: skip
    result = sdtune.fit(config, sdtune.TunerConfig(kind="lora", rank=2, ops=["attn1", "attn2"]))
    assert tuner_file.load(result.tuner).config.kind == "lora"
    assert all(k.startswith("lora_unet_") for k in load_file(result.tuner))


# --------------------------------------------------------------------------------------- full fine-tuning


def changed(unet, size=0.02) -> dict[str, torch.Tensor]:
    """A change of every weight of a UNet."""
    generator = torch.Generator().manual_seed(0)
    return {k: size * torch.randn(p.shape, generator=generator) for k, p in unet.named_parameters()}


def test_full_fine_tuning_draws_what_changed_weights_draw_also_beside_a_lora_and_from_a_file(base, files, tmp_path):
    change, by_hand, pipe = changed(base.unet), copy.deepcopy(base), copy.deepcopy(base)
    before = picture(pipe)
    with torch.no_grad():
        for name, p in by_hand.unet.named_parameters():
            p += change[name]
    sdtune.add_tuner(pipe, sdtune.TunerConfig(kind="full"), "full")
    assert torch.equal(picture(pipe), before)
    parameters = api.tuner_parameters(pipe, "full")
    assert parameters.keys() == change.keys()
    for name, p in parameters.items():
        p.data += change[name]
    expected = picture(by_hand)
    assert torch.allclose(picture(pipe), expected, atol=1e-3) and not torch.allclose(before, expected, atol=0.1)

    path = sdtune.save_tuner(pipe, tmp_path / "full.safetensors", "full", dtype=torch.float32)
    other = copy.deepcopy(base)
    other.load_lora_weights(files / "lora", adapter_name="lora")  # wraps some of the layers before, not after
    sdtune.load_tuner(other, path, "full")
    assert torch.allclose(picture(other), expected, atol=1e-3)
    by_hand.load_lora_weights(files / "lora", adapter_name="lora")
    other.set_adapters(["full", "lora"], [1.0, 0.5])
    by_hand.set_adapters("lora", 0.5)
    assert torch.allclose(picture(other), picture(by_hand), atol=1e-3)
    drawn = sdtune.compare(other, "a cat face", {"base": {}, "full": {"full": 1.0}}, steps=2, guidance=3.0)
    assert drawn["base"][0].tobytes() != drawn["full"][0].tobytes()
    with pytest.raises(ValueError, match="no weights per block while 'full'"):
        other.set_adapters("full", [{"unet": {"mid": 0.5}}])
    again = copy.deepcopy(other)
    again.unload_lora_weights()
    assert torch.equal(picture(again), before)
    sdtune.unload_tuner(other, "full")
    other.delete_adapters("lora")
    assert torch.equal(picture(other), before)


def test_full_fine_tuning_trains_with_the_same_trainer(pairs, tmp_path):
    config = sdtune.TrainConfig(
        data=str(pairs), output=str(tmp_path / "run"), steps=2, batch_size=2, preview_steps=1, preview_every=0,
        preview_prompts=["a girl"],
    )  # fmt: skip
    result = sdtune.fit(config, sdtune.TunerConfig(kind="full"))
    file = tuner_file.load(result.tuner)
    assert file.config.kind == "full" and file.training["learning_rate"] == pytest.approx(3e-4)
    assert all(t.count_nonzero() for t in file.tensors.values())


@pytest.mark.parametrize("unet", ["small", "sd15"])
def test_a_lora_file_has_kohyas_key_for_every_layer_which_ends_where_it_began(base, sd15_unet, tmp_path, unet):
    config = sdtune.TunerConfig(kind="lora", ops=OPS["with convolutions"])
    shapes = lora.expected_shapes(base.unet if unet == "small" else sd15_unet, config)
    tensors = {k: torch.full(shape, float(i % 7)) for i, (k, shape) in enumerate(shapes.items())}
    path = tuner_file.save(tmp_path, tuner_file.TunerFile(config, tensors))
    found = load_file(path)
    ends = {k.split(".", 1)[1] for k in found}
    assert ends == {"lora_down.weight", "lora_up.weight", "alpha"} and all(k.startswith("lora_unet_") for k in found)
    assert {t.item() for k, t in found.items() if k.endswith("alpha")} == {config.rank}
    back = tuner_file.load(path).tensors
    assert back.keys() == tensors.keys() and all(torch.equal(back[k].float(), t) for k, t in tensors.items())
