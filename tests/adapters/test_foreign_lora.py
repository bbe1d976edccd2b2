"""LoRA files of other tools are applied exactly, or refused or told by a clear message."""

import copy
import json
import warnings

import pytest
import torch
from conftest import picture
from peft import OFTConfig, get_peft_model
from safetensors.torch import save_file
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
