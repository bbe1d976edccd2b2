"""LoRA files of other tools are applied exactly, or refused or told by a clear message."""

import copy
import json
import warnings
from functools import partial

import accelerate
import pytest
import torch
from conftest import picture
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import sdtune
from sdtune.inference import compare
from sdtune.page.files import AdapterFiles


def layers_of(pipe) -> dict[str, nn.Linear]:
    return {n: m for n, m in pipe.unet.named_modules() if isinstance(m, nn.Linear) and ".attn" in n}


def noise(*shape):
    return torch.randn(*shape) * 0.1


def kohya(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def write(path, pipe, kind: str) -> dict[str, torch.Tensor]:
    """Writes a file of a kind, and returns the weights that the layers must have with it."""
    torch.manual_seed(0)
    tensors, wanted = {}, {}
    for name, layer in layers_of(pipe).items():
        out, into = layer.weight.shape
        key, weight = kohya(name), layer.weight.detach()
        if kind in ("dora", "peft"):
            down, up = noise(4, into), noise(out, 4)
            wanted[name] = weight + up @ down / 2
            if kind == "peft":
                key = f"base_model.model.{name}"
                tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
                continue
            scale = weight.norm(dim=1, keepdim=True) * 1.3
            wanted[name] = wanted[name] / wanted[name].norm(dim=1, keepdim=True) * scale
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.dora_scale": scale}
        elif kind == "loha":
            parts = {"w1_a": noise(out, 4), "w1_b": noise(4, into), "w2_a": noise(out, 4), "w2_b": noise(4, into)}
            wanted[name] = weight + (parts["w1_a"] @ parts["w1_b"]) * (parts["w2_a"] @ parts["w2_b"]) / 2
            tensors |= {f"{key}.hada_{n}": t for n, t in parts.items()}
        else:
            w1, a, b = noise(8, 8), noise(out // 8, 4), noise(4, into // 8)
            wanted[name] = weight + torch.kron(w1, a @ b) / 2
            tensors |= {f"{key}.lokr_w1": w1, f"{key}.lokr_w2_a": a, f"{key}.lokr_w2_b": b}
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return wanted


@pytest.mark.parametrize("kind", ["dora", "peft", "loha", "lokr"])
def test_files_of_other_tools_are_applied_exactly_and_the_page_accepts_them(pipe, base, tmp_path, kind):
    file = tmp_path / f"{kind}.safetensors"
    wanted = write(file, base, kind)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "r": 4}))
    expected = copy.deepcopy(base)
    for name, weight in wanted.items():
        expected.unet.get_submodule(name).weight.data.copy_(weight)
    sdtune.load_tuner(pipe, file, "x")
    with_file = picture(pipe)
    assert (with_file - picture(expected)).abs().max() < 1e-3 < (with_file - picture(base)).abs().max()
    assert AdapterFiles([tmp_path], base.unet, base.text_encoder).by_label[kind].fits
    pipe.delete_adapters("x")
    assert torch.allclose(picture(pipe), picture(base), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_cayley_neumann": False}, {"block_share": True}, {"coft": True}])
def test_an_oft_of_peft_is_applied_as_peft_does_and_has_a_weight(pipe, base, tmp_path, options):
    torch.manual_seed(0)
    model = copy.deepcopy(base)
    config = OFTConfig(oft_block_size=8, target_modules=["to_q", "to_v", "proj_in"], init_weights=False, **options)
    tuned = get_peft_model(model.unet, config, adapter_name="default")
    tuned.save_pretrained(tmp_path)  # adapter_config.json and adapter_model.safetensors, with base_model.model.* keys
    file = tmp_path / "adapter_model.safetensors"
    assert [f.fits for f in AdapterFiles([tmp_path], base.unet, base.text_encoder).by_label.values()] == [True]
    sdtune.load_tuner(pipe, file, "x")
    assert torch.equal(picture(pipe), picture(model))
    for name, layer in layers_of(base).items():  # a weight is one of the change of the layer's weights
        if name.endswith("to_q"):
            x = noise(3, layer.in_features)
            with torch.no_grad():
                full = tuned.get_submodule(f"base_model.model.{name}")(x)
                pipe.set_adapters("x", 0.3)
                half = pipe.unet.get_submodule(name)(x)
                pipe.set_adapters("x", 1.0)
                assert torch.allclose(half, 0.7 * layer(x) + 0.3 * full, atol=1e-5)
            break
    with_scale = picture(pipe, cross_attention_kwargs={"scale": 0.3})
    pipe.set_adapters("x", 0.3)
    assert torch.equal(picture(pipe), with_scale)
    pipe.disable_lora()
    assert torch.allclose(picture(pipe), picture(base), atol=1e-5)
    pipe.enable_lora()
    pipe.fuse_lora()
    assert torch.allclose(picture(pipe), with_scale, atol=1e-3)
    pipe.unfuse_lora()
    pipe.delete_adapters("x")
    assert torch.allclose(picture(pipe), picture(base), atol=1e-3)


def test_nan_weights_other_families_and_other_formats_are_refused_by_name(pipe, base, tmp_path):
    name = next(iter(layers_of(base)))
    out, into = base.unet.get_submodule(name).weight.shape
    pair = {f"{kohya(name)}.lora_down.weight": noise(4, into), f"{kohya(name)}.lora_up.weight": noise(out, 4)}
    per_input = {f"{kohya(name)}.dora_scale": torch.ones(1, into)}
    files = {
        "alpha": ({**pair, f"{kohya(name)}.alpha": torch.tensor(1e30)}, r"alpha \(1e\+30\); an alpha is a number near"),
        "nan": ({**pair, f"{kohya(name)}.lora_up.weight": torch.full((out, 4), float("nan"))}, "NaN or infinity"),
        "flux": ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": noise(4, 64)}, "Flux"),
        "xl": ({**pair, "lora_te2_text_model_x.lora_down.weight": noise(4, 8)}, "Stable Diffusion XL"),
        "oft": ({f"{kohya(name)}.oft_blocks": noise(4, 8, 8)}, "OFT of LyCORIS, kohya.*which is not read"),
        "oft_R": ({f"base_model.model.{name}.oft_R.weight": noise(into // 8, 28)}, "adapter_config.json beside it"),
        "per_input": ({**pair, **per_input}, "wd_on_out=False"),
        "ia3": ({f"{kohya(name)}.weight": noise(into), f"{kohya(name)}.on_input": torch.tensor(True)}, r"\(IA\)\^3"),
        "locon": ({**pair, f"{kohya(name)}.lora_mid.weight": noise(4, 4, 3, 3)}, "a LoCon with lora_mid.*not read"),
        "half": ({f"{kohya(name)}.lora_down.weight": noise(4, into)}, "has only A"),
        "narrow": ({**pair, f"{kohya(name)}.lora_down.weight": noise(4, into + 8)}, "wide, this base's is"),
    }
    for title, (tensors, message) in files.items():
        save_file(tensors, tmp_path / f"{title}.safetensors")
        with pytest.raises(sdtune.TunerFileError, match=message) as error:
            sdtune.load_tuner(pipe, tmp_path / f"{title}.safetensors", "x")
        assert f"{title}.safetensors" in str(error.value)
        assert not pipe.get_list_adapters()
    fits = {f.label for f in AdapterFiles([tmp_path], base.unet, base.text_encoder).by_label.values() if f.fits}
    assert fits == {"nan", "alpha"}  # the page reads no weights before it loads a file


def test_layers_that_the_base_lacks_are_told_with_their_number_and_names(pipe, base, tmp_path):
    tensors = {}
    for name, layer in layers_of(base).items():
        key = kohya(name.replace("mid_block.attentions.0", "mid_block.attentions.7"))
        out, into = layer.weight.shape
        tensors |= {f"{key}.lora_down.weight": noise(4, into), f"{key}.lora_up.weight": noise(out, 4)}
    save_file(tensors, tmp_path / "partly.safetensors")
    with pytest.warns(
        UserWarning, match=r"partly.safetensors: \d+ of its \d+ layers are not in this base.*attentions_7"
    ):
        sdtune.load_tuner(pipe, tmp_path / "partly.safetensors", "x")
    assert not torch.equal(picture(pipe), picture(base))


def test_a_picture_that_is_not_finite_stays_in_its_own_column_and_is_said_there(pipe, files):
    sdtune.load_tuner(pipe, files / "lora" / "pytorch_lora_weights.safetensors", "bad")
    next(p for n, p in pipe.unet.named_parameters() if "lora_B.bad" in n).data[:] = float("nan")
    options = dict(steps=1, width=64, height=64, guidance=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drawn = sdtune.compare(pipe, "a cat", {"base": {}, "bad": {"bad": 1.0}}, **options)
    assert any("the picture of bad at 1 from seed 0 is not finite" in str(w.message) for w in caught)
    pipe.delete_adapters("bad")
    (alone,) = sdtune.compare(pipe, "a cat", {"base": {}}, **options)["base"]
    assert list(drawn["base"][0].getdata()) == list(alone.getdata())


def test_odd_arguments_of_compare_are_all_named(pipe):
    with pytest.raises(ValueError, match="steps is 0.*prompt is 3.*width is 65.*seed is -1.*guidance is nan"):
        compare.draw_cells(pipe, [compare.Cell(3, -1, {}, float("nan"), width=65)], steps=0)
    with pytest.raises(ValueError, match="columns is {}"):
        sdtune.compare(pipe, "a", {})


def one_layer(base) -> tuple[str, nn.Linear, dict[str, torch.Tensor]]:
    name, layer = next(iter(layers_of(base).items()))
    out, into = layer.weight.shape
    tensors = {f"{kohya(name)}.lora_down.weight": noise(4, into), f"{kohya(name)}.lora_up.weight": noise(out, 4)}
    return name, layer, tensors


@pytest.mark.parametrize(
    "alphas, scale", [((2.0, 1.0), 0.25), ((2.0, -2.0), -0.5), ((2.0, 0.0), 1.0), ((0.0, 0.0), 1.0)]
)
def test_each_layer_has_its_own_alpha_and_0_stands_for_the_rank(pipe, base, tmp_path, alphas, scale):
    tensors = {}
    names = list(layers_of(base))[:6]
    for name in names:  # the last has another alpha than most
        out, into = base.unet.get_submodule(name).weight.shape
        alpha = torch.tensor(alphas[name == names[-1]])
        tensors |= {f"{kohya(name)}.lora_down.weight": noise(4, into), f"{kohya(name)}.lora_up.weight": noise(out, 4),
                    f"{kohya(name)}.alpha": alpha}  # fmt: skip
    save_file(tensors, tmp_path / "style.safetensors")
    sdtune.load_tuner(pipe, tmp_path / "style.safetensors", "x")
    name, layer, plain = names[-1], pipe.unet.get_submodule(names[-1]), base.unet.get_submodule(names[-1])
    change = tensors[f"{kohya(name)}.lora_up.weight"] @ tensors[f"{kohya(name)}.lora_down.weight"] * scale
    x = noise(3, plain.in_features)
    with torch.no_grad():
        assert torch.allclose(layer(x), plain(x) + x @ change.T, atol=1e-5)


def test_tensors_that_no_lora_has_are_refused_and_the_page_refuses_them_too(pipe, base, tmp_path):
    name, _, tensors = one_layer(base)
    down = f"{kohya(name)}.lora_down.weight"
    for title, change in {
        "whole": {down: tensors[down].mul(10).int()},
        "complex": {down: tensors[down].to(torch.complex64)},
        "vector": {down: tensors[down].flatten()},
        "deep": {down: tensors[down][:, :, None, None]},
        "none": {down: tensors[down][:0]},
        "alphas": {f"{kohya(name)}.alpha": torch.ones(4)},
    }.items():
        save_file(tensors | change, tmp_path / f"{title}.safetensors")
        with pytest.raises(sdtune.TunerFileError, match=f"{title}.safetensors (is a LoRA that|holds tensors)"):
            sdtune.load_tuner(pipe, tmp_path / f"{title}.safetensors", "x")
        assert not pipe.get_list_adapters() and not getattr(pipe.unet, "peft_config", None)
    files = AdapterFiles([tmp_path], base.unet, base.text_encoder).by_label.values()
    assert not any(file.fits for file in files) and not any("cannot be read" in file.problem for file in files)


@pytest.mark.parametrize("how", ["of a UNet", "of a pipeline"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_alpha_that_diffusers_writes_into_the_metadata_counts(pipe, base, tmp_path, how, rslora):
    trained = copy.deepcopy(base)
    config = LoraConfig(
        r=4, lora_alpha=16, alpha_pattern={"attn2.to_q": 2}, use_rslora=rslora, init_lora_weights=False,
        target_modules=["to_q", "to_v"],
    )  # fmt: skip
    trained.unet.add_adapter(config, "x")
    if how == "of a UNet":
        trained.unet.save_lora_adapter(tmp_path, "x")
    else:
        layers = get_peft_model_state_dict(trained.unet, adapter_name="x")
        base.save_lora_weights(
            tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=trained.unet.peft_config["x"].to_dict()
        )
    sdtune.load_tuner(pipe, tmp_path, "x")
    assert torch.allclose(picture(pipe), picture(trained), atol=1e-4)
    assert not torch.allclose(picture(pipe), picture(base), atol=1)


def write_peft(base, folder, config) -> nn.Module:
    """Saves random weights of a PEFT adapter of the UNet in PEFT's own format; returns the UNet with them."""
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base.unet), config)
    for key, p in model.named_parameters():
        if "default" in key:
            p.data = noise(*p.shape)
    model.save_pretrained(folder)
    return model.base_model.model


@pytest.mark.parametrize("config", [
    LoHaConfig(r=4, alpha=16, target_modules=["to_q", "conv1"]),
    LoHaConfig(r=2, target_modules=["to_q"]),
    LoKrConfig(r=16, alpha_pattern={"attn1|attn2.to_q": 4}, target_modules=["to_q", "conv1"]),
    LoKrConfig(r=64, alpha=16, rank_pattern={"attn2.to_q": 2}, target_modules=["to_q"]),  # of whole matrices
    LoraConfig(r=4, alpha_pattern={"attn1|attn2.to_q": 64}, target_modules=["to_q"]),
])  # fmt: skip
def test_the_alpha_of_peft_s_settings_counts(pipe, base, tmp_path, config):
    expected = copy.deepcopy(base)
    expected.unet = write_peft(base, tmp_path, config)
    sdtune.load_tuner(pipe, tmp_path / "adapter_model.safetensors", "x")
    effect = (picture(expected) - picture(base)).norm()
    assert (picture(pipe) - picture(expected)).norm() < 1e-3 * effect


def test_a_peft_file_without_its_settings_is_told_and_one_that_changes_the_base_is_refused(pipe, base, tmp_path):
    write_peft(base, tmp_path / "loha", LoHaConfig(r=4, target_modules=["to_q"]))
    (tmp_path / "loha/adapter_config.json").unlink()
    with pytest.warns(UserWarning, match="no adapter_config.json beside it, so its alpha is taken to be its rank"):
        sdtune.load_tuner(pipe, tmp_path / "loha/adapter_model.safetensors", "loha")
    for start in ("pissa", "olora", "pissa_niter_4"):
        write_peft(base, tmp_path / start, LoraConfig(r=4, init_lora_weights=start, target_modules=["to_q"]))
        with pytest.raises(sdtune.TunerFileError, match=f"started by {start}, which changes the weights of the base"):
            sdtune.load_tuner(pipe, tmp_path / start / "adapter_model.safetensors", start)
    files = AdapterFiles([tmp_path / "olora"], base.unet, base.text_encoder).by_label.values()
    assert not any(file.fits for file in files)


def test_a_layer_that_stands_twice_in_a_file_is_refused(pipe, base, tmp_path):
    name, _, tensors = one_layer(base)
    twice = {key.replace(kohya(name), f"unet.{name}"): t.clone() for key, t in tensors.items()}
    save_file(tensors | twice, tmp_path / "a.safetensors")
    with pytest.raises(sdtune.TunerFileError, match=f"holds the layer {name} twice, in .*{kohya(name)}"):
        sdtune.load_tuner(pipe, tmp_path / "a.safetensors", "x")


@pytest.mark.parametrize("first", ["loha", "lokr"])
def test_a_lora_on_convolutions_loads_after_a_loha_or_lokr_on_them(pipe, base, tmp_path, first):
    config = {"loha": LoHaConfig, "lokr": LoKrConfig}[first](r=4, alpha=4, target_modules=["conv1"])
    write_peft(base, tmp_path, config)
    sdtune.load_tuner(pipe, tmp_path / "adapter_model.safetensors", "first")
    sdtune.add_tuner(pipe, sdtune.TunerConfig(kind="lora", ops=["conv"]), "second")
    pipe.set_adapters(["first", "second"])
    assert picture(pipe).isfinite().all()


def test_a_loha_that_is_offloaded_layer_by_layer_says_so(pipe, base, tmp_path, monkeypatch):
    real = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda m, d, **kwargs: real(m, torch.device(d.type), **kwargs))
    write(tmp_path / "a.safetensors", base, "loha")
    sdtune.load_tuner(pipe, tmp_path / "a.safetensors", "x")
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="'x' is a LoHa or LoKr, which draws nothing sensible.*model_cpu_offload"):
        picture(pipe)
    leaves = copy.deepcopy(base)
    leaves.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(sdtune.TunerFileError, match="is a LoHa, which draws nothing sensible"):
        sdtune.load_tuner(leaves, tmp_path / "a.safetensors", "x")


def test_a_lora_with_biases_is_refused(pipe, base, tmp_path):
    trained = copy.deepcopy(base)
    trained.unet.add_adapter(LoraConfig(r=4, lora_bias=True, target_modules=["to_out.0"]), "x")
    trained.unet.save_lora_adapter(tmp_path, "x")
    with pytest.raises(sdtune.TunerFileError, match=r"keys of an unknown format: .*lora_B\.bias"):
        sdtune.load_tuner(pipe, tmp_path, "x")


@pytest.mark.parametrize("alpha", [1.0, 1e10])
def test_a_lokr_of_whole_matrices_is_applied_to_convolutions_and_its_alpha_means_nothing(pipe, base, tmp_path, alpha):
    name = "down_blocks.0.resnets.0.conv1"
    out, into, *kernel = base.unet.get_submodule(name).weight.shape
    w1, w2, key = noise(4, 4), noise(out // 4, into // 4, *kernel), kohya(name)
    tensors = {f"{key}.lokr_w1": w1, f"{key}.lokr_w2": w2, f"{key}.alpha": torch.tensor(alpha)}
    save_file(tensors, tmp_path / "a.safetensors")
    expected = copy.deepcopy(base)
    expected.unet.get_submodule(name).weight.data += torch.kron(w1[:, :, None, None], w2)
    sdtune.load_tuner(pipe, tmp_path / "a.safetensors", "x")
    assert (picture(pipe) - picture(expected)).abs().max() < 1e-3 < (picture(pipe) - picture(base)).abs().max()
    save_file(tensors | {f"{key}.lokr_w1": noise(2, 4)}, tmp_path / "b.safetensors")
    with pytest.raises(sdtune.TunerFileError, match="parts that make no matrix of this base's layer"):
        sdtune.load_tuner(pipe, tmp_path / "b.safetensors", "y")


@pytest.mark.parametrize(
    "named, of_pipe, warns", [("2", 1, True), ("2", 2, False), ("None", 2, True), (None, 2, False)]
)
def test_the_clip_skip_that_a_file_names_counts_and_nothing_is_said_of_one_that_names_none(
    pipe, base, tmp_path, named, of_pipe, warns
):
    _, _, tensors = one_layer(base)
    save_file(tensors, tmp_path / "a.safetensors", {"ss_clip_skip": named} if named else None)
    pipe._clip_skip = of_pipe - 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sdtune.load_tuner(pipe, tmp_path / "a.safetensors", "x")
    said = [str(w.message) for w in caught if "clip skip" in str(w.message)]
    assert bool(said) == warns and all("was trained with clip skip" in message for message in said)
    sdtune.unload_tuner(pipe, "x")
    assert not pipe.get_list_adapters()


# ------------------------------------------------------------------------------------- layers of the text encoder


def write_text_lora(path, base, size=0.1) -> None:
    """A LoRA on the text encoder alone."""
    tensors = {}
    for name, layer in base.text_encoder.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            key = "lora_te_" + name.replace(".", "_")
            out, into = layer.weight.shape
            tensors |= {f"{key}.lora_down.weight": torch.randn(4, into) * size,
                        f"{key}.lora_up.weight": torch.randn(out, 4) * size}  # fmt: skip
    save_file(tensors, path)


def test_names_of_adapters_in_the_text_encoder_are_taken(pipe, base, tmp_path):
    for name in "ab":
        write_text_lora(tmp_path / f"{name}.safetensors", base)
    assert [sdtune.load_tuner(pipe, tmp_path / f"{name}.safetensors") for name in "ab"] == ["tuner_0", "tuner_1"]
    for attempt in (sdtune.add_tuner, partial(sdtune.load_tuner, source=tmp_path / "a.safetensors")):
        with pytest.raises(ValueError, match="'tuner_0' is already in use; present: tuner_0, tuner_1"):
            attempt(pipe, adapter_name="tuner_0")
    assert pipe.get_list_adapters() == {"text_encoder": ["tuner_0", "tuner_1"]}
    sdtune.add_tuner(pipe, adapter_name="fresh")  # the active one alone, so the text is the base's again
    assert torch.equal(picture(pipe), picture(base))


def test_a_pipeline_with_a_lora_in_its_text_encoder_is_saved_as_the_whole_base(pipe, base, tmp_path):
    write_text_lora(tmp_path / "a.safetensors", base)
    sdtune.load_tuner(pipe, tmp_path / "a.safetensors", "x")
    tuned = picture(pipe)
    with pytest.warns(UserWarning, match="save_pretrained writes the base without its adapters 'x'"):
        pipe.save_pretrained(tmp_path / "saved")
    saved = sdtune.load_base(tmp_path / "saved").text_encoder.state_dict()
    assert saved.keys() == base.text_encoder.state_dict().keys()
    assert all(torch.equal(t, saved[k]) for k, t in base.text_encoder.state_dict().items())
    assert torch.equal(picture(pipe), tuned)


def test_without_a_text_encoder_its_layers_are_left_out_and_told(pipe, base, tmp_path):
    write_text_lora(tmp_path / "text.safetensors", base)
    _, _, tensors = one_layer(base)
    save_file(tensors | load_file(tmp_path / "text.safetensors"), tmp_path / "both.safetensors")
    pipe.text_encoder = None
    with pytest.warns(UserWarning, match=r"\d+ of its \d+ layers are not in this base and are left out: .*q_proj"):
        sdtune.load_tuner(pipe, tmp_path / "both.safetensors", "x")
    with pytest.raises(sdtune.TunerFileError, match="for a text encoder alone, and this pipeline has none"):
        sdtune.load_tuner(pipe, tmp_path / "text.safetensors", "y")
