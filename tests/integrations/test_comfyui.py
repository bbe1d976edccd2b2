"""The node in a real ComfyUI: it predicts the same noise as `load_tuner` in diffusers."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from comfyui import comfyui_model, predict, unet_settings

import sdtune
from sdtune.adapters import api, tuner_file
from sdtune.adapters.tuner_file import TunerFileError
from sdtune.integrations.comfyui import patches

from .conftest import ROOT

CONFIGS = {
    "res_attn": dict(),
    "biased": dict(rank=2, num_heads=3, qkv_bias=True),
    "res_attn_text": dict(kind="res_attn_text"),
    "res_attn_conv": dict(kind="res_attn_conv"),
    "res_attn_layer": dict(kind="res_attn_layer"),
    "res_adapter": dict(kind="res_adapter"),
    "res_prefix": dict(kind="res_prefix"),
    "res_prompt": dict(kind="res_prompt"),
    "dual": dict(ffn_kind="res_adapter"),
    "dual_layer": dict(ffn_kind="res_attn_layer"),
    "block": dict(ops=["block"]),
    "block_text": dict(kind="res_attn_text", ops=["block", "attn1"]),
    "block_prompt": dict(kind="res_prompt", ops=["block"]),
}


def inputs(unet, seed: int = 0):
    """Noise, times and texts of a batch of two, as with the prompt and the empty prompt: x, timesteps, text."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
    return x, torch.tensor([700.0, 200.0]), text


def make_file(comfyui, base, name: str, seed: int = 0, folder: str = "tuners", **config) -> str:
    """Writes a tuner with random weights into a folder of ComfyUI's models; its path."""
    path, pipe = comfyui.folder / "models" / folder / f"{name}.safetensors", copy.deepcopy(base)
    torch.manual_seed(seed)
    sdtune.add_tuner(pipe, sdtune.TunerConfig(**config), name)
    for p in api.tuner_parameters(pipe, name).values():
        p.data += 0.05 * torch.randn_like(p)
    return str(sdtune.save_tuner(pipe, path, name, trigger_words=f"words of {name}"))


def node(comfyui, model, name: str, strength: float = 1.0):
    return comfyui.nodes.NODE_CLASS_MAPPINGS["SdtuneLoadTuner"]().load(model, f"{name}.safetensors", strength)[0]


def in_diffusers(base, files: dict[str, float]):
    """What the UNet predicts in diffusers with these files at these strengths."""
    unet = copy.deepcopy(base).unet
    names = [sdtune.load_tuner(unet, path, f"t{i}") for i, path in enumerate(files)]
    if names:
        unet.set_adapters(names, list(files.values()))
    with torch.no_grad():
        return unet(*inputs(unet)).sample


def assert_same_effect(found, expected, without, bound: float = 1e-4):
    effect = (expected - without).norm()
    assert effect > 0.01 * without.norm()
    assert (found - expected).norm() < bound * effect


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tuner_predicts_the_same_as_in_diffusers(comfyui, base, model, name):
    path, without = make_file(comfyui, base, name, **CONFIGS[name]), in_diffusers(base, {})
    for strength in (0.5, 1.0):
        expected = in_diffusers(base, {path: strength})
        assert_same_effect(predict(node(comfyui, model, name, strength), *inputs(base.unet)), expected, without)
    unchanged = predict(model, *inputs(base.unet))
    assert torch.equal(predict(node(comfyui, model, name, 0), *inputs(base.unet)), unchanged)


def test_a_base_without_attention_in_its_outermost_level(comfyui, base):
    config = {**base.unet.config, "block_out_channels": [64, 64, 96], "attention_head_dim": [2, 2, 3]}
    config |= dict(down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"], norm_num_groups=16,
                   up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], layers_per_block=2)  # fmt: skip
    torch.manual_seed(0)
    other = copy.deepcopy(base)
    other.unet = type(base.unet).from_config(config)
    path = make_file(comfyui, other, "outermost")
    found = predict(node(comfyui, comfyui_model(comfyui, other.unet), "outermost"), *inputs(other.unet))
    assert_same_effect(found, in_diffusers(other, {path: 1.0}), in_diffusers(other, {}))


def test_tuners_stack_and_clones_keep_them(comfyui, base, model):
    files = {
        make_file(comfyui, base, "one"): 0.7,
        make_file(comfyui, base, "two", 1, ops=["attn2", "ff", "block"]): -0.4,
    }
    stacked = node(comfyui, node(comfyui, model, "one", 0.7), "two", -0.4)
    expected, without = in_diffusers(base, files), in_diffusers(base, {})
    for patched in (stacked, stacked.clone(), stacked.clone().clone()):
        assert_same_effect(predict(patched, *inputs(base.unet)), expected, without)


def test_the_model_is_as_before_after_drawing_in_comfyui(comfyui, base, model):
    make_file(comfyui, base, "drawn")
    text = inputs(base.unet)[2]

    def draw(patched):
        conds = [[[text[i : i + 1], {}]] for i in range(2)]
        latent = {"samples": torch.zeros(1, 4, 16, 16)}
        return comfyui.nodes.common_ksampler(patched, 3, 2, 3.0, "euler", "normal", *conds, latent)[0]["samples"]

    before = draw(model)
    tuned = draw(node(comfyui, model, "drawn"))
    assert torch.equal(draw(node(comfyui, model, "drawn")), tuned)  # although the first is still loaded
    assert torch.equal(draw(model), before)
    assert not torch.allclose(tuned, before, atol=1e-2)


@pytest.mark.parametrize("ops", [["attn1", "attn2"], ["attn1", "attn2", "ff", "conv"]])
def test_all_layers_of_our_lora_are_found_by_comfyui_and_it_stacks_with_a_tuner(comfyui, base, model, ops):
    lora = make_file(comfyui, base, "lora", folder="loras", kind="lora", ops=ops)
    tuner = make_file(comfyui, base, "beside")
    loader = comfyui.nodes.LoraLoaderModelOnly()
    with_lora = loader.load_lora_model_only(model, "lora.safetensors", 0.8)[0]
    pipe = copy.deepcopy(base)
    sdtune.add_tuner(pipe, sdtune.TunerConfig(kind="lora", ops=ops))
    assert len(with_lora.patches) == len(api.tuner_parameters(pipe, "tuner_0")) / 2

    without = in_diffusers(base, {})
    assert_same_effect(predict(with_lora, *inputs(base.unet)), in_diffusers(base, {lora: 0.8}), without)
    both = in_diffusers(base, {lora: 0.8, tuner: 1.0})
    assert_same_effect(predict(node(comfyui, with_lora, "beside"), *inputs(base.unet)), both, without)
    last = loader.load_lora_model_only(node(comfyui, model, "beside"), "lora.safetensors", 0.8)[0]
    assert_same_effect(predict(last, *inputs(base.unet)), both, without)


@pytest.mark.parametrize("kind", ["res_prefix", "res_prompt"])
def test_a_tuner_that_calls_the_frozen_attention_sees_the_lora_in_it(comfyui, base, model, kind):
    lora = make_file(comfyui, base, "under", folder="loras", kind="lora", ops=["attn1", "attn2"])
    tuner = make_file(comfyui, base, "above", kind=kind)
    loader = comfyui.nodes.LoraLoaderModelOnly()
    both = loader.load_lora_model_only(node(comfyui, model, "above"), "under.safetensors", 0.8)[0]
    expected = in_diffusers(base, {lora: 0.8, tuner: 1.0})
    assert_same_effect(predict(both, *inputs(base.unet)), expected, in_diffusers(base, {}))


@pytest.mark.parametrize("first", ["the tuner", "the replacement"])
def test_the_tuner_works_where_another_node_replaces_attn2(comfyui, base, model, first):
    path = make_file(comfyui, base, "replaced")

    def attend(q, k, v, options):  # what an IP-Adapter does, without its pictures
        return comfyui.attention.optimized_attention(q, k, v, options["n_heads"])

    patched = model.clone() if first == "the replacement" else node(comfyui, model, "replaced")
    for side, count in (("input", 12), ("middle", 1), ("output", 12)):
        for number in range(count):
            patched.set_model_attn2_replace(attend, side, number)
    if first == "the replacement":
        patched = node(comfyui, patched, "replaced")
    expected = in_diffusers(base, {path: 1.0})
    assert_same_effect(predict(patched, *inputs(base.unet)), expected, in_diffusers(base, {}))


def test_the_weights_follow_the_dtype_of_the_model(comfyui, base):
    path = make_file(comfyui, base, "short")
    half = comfyui_model(comfyui, base.unet, torch.float16)
    x, timesteps, text = inputs(base.unet)
    found = predict(node(comfyui, half, "short"), x.half(), timesteps, text.half())
    assert found.dtype == torch.float16
    assert_same_effect(found.float(), in_diffusers(base, {path: 1.0}), in_diffusers(base, {}), 0.02)


def test_a_node_that_merges_tokens_after_the_tuner_is_named(comfyui, base, model):
    make_file(comfyui, base, "merged")
    patched = node(comfyui, model, "merged")
    patched.set_model_attn1_patch(lambda n, context, value, options: (n[:, ::2], context, value))
    with pytest.raises(
        ValueError, match="a node that merges tokens works on the same model. Put the tuner's node after"
    ):
        predict(patched, *inputs(base.unet))


def test_the_node_lists_files_and_gives_the_trigger_words(comfyui, base, model):
    make_file(comfyui, base, "listed")
    make_file(comfyui, base, "among loras", folder="loras")
    kind = comfyui.nodes.NODE_CLASS_MAPPINGS["SdtuneLoadTuner"]
    names = kind.INPUT_TYPES()["required"]["tuner"][0]
    assert {"listed.safetensors", "among loras.safetensors"} <= set(names)
    assert kind().load(model, "among loras.safetensors", 1.0)[1:] == ("words of among loras", -1)
    before = kind.IS_CHANGED("listed.safetensors", strength=1)
    make_file(comfyui, base, "listed", 1)
    assert kind.IS_CHANGED("listed.safetensors", strength=1) != before


def test_the_node_gives_the_clip_layer_of_a_tuner_that_was_trained_with_clip_skip_2(comfyui, base, model, capsys):
    path = make_file(comfyui, base, "skips")
    file = tuner_file.load(path)
    file.training["clip_skip"] = 2
    tuner_file.save(path, file)
    kind = comfyui.nodes.NODE_CLASS_MAPPINGS["SdtuneLoadTuner"]
    assert kind().load(model, "skips.safetensors", 1.0)[2] == -2
    assert "put CLIP Set Last Layer -2 after the CLIP" in capsys.readouterr().out


def test_files_that_the_node_cannot_use_are_refused_with_a_reason(comfyui, base, model):
    make_file(comfyui, base, "a lora", kind="lora", ops=["attn1"])
    with pytest.raises(
        TunerFileError, match="a lora.safetensors holds a lora; load it with ComfyUI's own Load LoRA node"
    ):
        node(comfyui, model, "a lora")
    make_file(comfyui, base, "a dora", kind="dora", ops=["attn1"])
    with pytest.raises(TunerFileError, match="python -m sdtune.adapters.export FILE --to kohya"):
        node(comfyui, model, "a dora")
    other = copy.deepcopy(base)
    other.unet = type(base.unet).from_config({**base.unet.config, "cross_attention_dim": 128})
    make_file(comfyui, other, "other", kind="res_attn_text")
    with pytest.raises(TunerFileError, match="does not fit this UNet .*load it into a base of that shape"):
        node(comfyui, model, "other")
    with pytest.raises(ValueError, match="Sequential has no transformer block .*; expected the UNet"):
        patches.find_blocks(torch.nn.Sequential(torch.nn.Linear(2, 2)))  # as a model of the family of DiT


def test_the_example_workflow_fits_the_nodes(comfyui):
    [path] = (ROOT / "sdtune/integrations/comfyui/example_workflows").glob("*.json")
    workflow, kinds = json.loads(path.read_text()), comfyui.nodes.NODE_CLASS_MAPPINGS
    nodes = {n["id"]: n for n in workflow["nodes"]}
    assert "SdtuneLoadTuner" in {n["type"] for n in nodes.values()}
    for number, source, slot, target, position, type_name in workflow["links"]:
        out, into = nodes[source]["outputs"][slot], nodes[target]["inputs"][position]
        assert number in out["links"] and into["link"] == number and out["type"] == into["type"] == type_name
        assert kinds[nodes[source]["type"]].RETURN_TYPES[slot] == type_name
        required = kinds[nodes[target]["type"]].INPUT_TYPES()["required"]
        name = into["name"]
        assert name in required and (required[name][0] == type_name or into.get("widget") == {"name": name})
    [ours] = (n for n in nodes.values() if n["type"] == "SdtuneLoadTuner")
    assert len(ours["widgets_values"]) == 2 and ours["widgets_values"][1] == 1.0  # tuner and strength
    assert [o["name"] for o in ours["outputs"]] == list(kinds["SdtuneLoadTuner"].RETURN_NAMES)


def test_comfyuis_registry_finds_what_it_needs_in_pyproject():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    found = tomllib.loads((ROOT / "sdtune/integrations/comfyui/pyproject.toml").read_text())
    assert {"name", "version", "description", "license"} <= found["project"].keys()
    assert found["project"]["license"].keys() == {"text"} and not found["project"]["dependencies"]
    assert {"PublisherId", "DisplayName"} <= found["tool"]["comfy"].keys()


ALONE = """
import sys, types, importlib.util
import torch
for name in "diffusers transformers peft accelerate numba llvmlite gradio huggingface_hub matplotlib".split():
    sys.modules[name] = None
root, comfyui = {!r}, {!r}
sys.meta_path = [f for f in sys.meta_path if "editable" not in f"{{getattr(f, '__module__', f)}} {{f}}"]
sys.path = [p for p in sys.path if p not in ("", root)]
sys.modules["folder_paths"] = types.ModuleType("folder_paths")
sys.modules["folder_paths"].models_dir = "/nowhere"
sys.modules["folder_paths"].folder_names_and_paths = {{}}
sys.modules["folder_paths"].get_full_path = lambda folder, name: name
spec = importlib.util.spec_from_file_location("comfyui-sdtune", "comfyui-sdtune/__init__.py")
node = sys.modules["comfyui-sdtune"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(node)

sys.argv, sys.path = sys.argv[:1], [comfyui, *sys.path]
import comfy.cli_args
comfy.cli_args.args.cpu = True
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from fractions import Fraction

class Factor(Fraction):
    __rmul__ = __mul__ = lambda self, other: int(Fraction(self) * other)

settings = {}
settings["channel_mult"] = [Factor(f) for f in settings["channel_mult"]]
model = torch.nn.Module()
model.diffusion_model = UNetModel(**settings)
for p in model.parameters():
    torch.nn.init.normal_(p, std=0.02)
cpu = torch.device("cpu")
patched, words, _ = node.LoadTuner().load(ModelPatcher(model, cpu, cpu), {!r}, 1.0)
x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, settings["context_dim"])
unet = patched.patch_model().diffusion_model
with torch.no_grad():
    options = dict(patched.model_options["transformer_options"])
    tuned = unet(x, torch.ones(2), context=text, transformer_options=options)
    patched.unpatch_model()
    without = unet(x, torch.ones(2), context=text)
import sdtune
print(sdtune.__file__, (tuned - without).norm().item() > 0, words)
"""


@pytest.mark.skipif("COMFYUI" in os.environ, reason="newer ComfyUIs need more themselves")
def test_the_copied_folder_needs_torch_and_safetensors_alone(comfyui, base, tmp_path):
    shutil.copytree(ROOT / "sdtune/integrations/comfyui", tmp_path / "comfyui-sdtune")
    shutil.copytree(ROOT / "sdtune", tmp_path / "comfyui-sdtune" / "sdtune")
    settings = {
        k: [str(f) for f in v] if k == "channel_mult" else v for k, v in unet_settings(base.unet.config).items()
    }
    folder = comfyui.folder_paths.base_path
    code = ALONE.format(str(ROOT), folder, settings, make_file(comfyui, base, "alone"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file, has_effect, words = done.stdout.strip().splitlines()[-1].split(maxsplit=2)
    assert file == str(tmp_path / "comfyui-sdtune/sdtune/__init__.py")
    assert has_effect == "True" and words == "words of alone"


def test_a_folder_that_would_hide_the_package_is_refused(comfyui, tmp_path):
    shutil.copytree(ROOT / "sdtune/integrations/comfyui", tmp_path / "sdtune")
    code = "import sdtune"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "sdtune cannot be this node's folder: it hides the package sdtune; rename the folder" in done.stderr
