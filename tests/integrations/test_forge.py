"""The Forge extension on a stand-in with exactly the methods of Forge's `UnetPatcher` that it may use.

`FORGE=path/to/forge pytest tests/integrations/test_forge.py` uses Forge's own `UnetPatcher`, UNet and LoRA loader
instead; of its requirements they need gguf alone.
"""

import copy
import importlib.util
import inspect
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from comfyui import comfyui_model, unet_settings
from safetensors.torch import load_file
from torch import nn

from sdtune.adapters import tuner_file

from .conftest import ROOT
from .test_comfyui import assert_same_effect, in_diffusers, inputs, make_file


class UnetPatcher:
    """Forge's, without what is about memory. Unlike ComfyUI's, a clone does not share `object_patches_backup`."""

    def __init__(self, model):
        self.model, self.object_patches, self.object_patches_backup = model, {}, {}
        self.model_options = {"transformer_options": {}}

    def clone(self):
        new = UnetPatcher(self.model)
        new.object_patches = self.object_patches.copy()
        new.model_options = copy.deepcopy(self.model_options)
        return new

    def set_model_patch(self, patch, name):
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches[name] = patches.get(name, []) + [patch]

    def set_model_attn1_patch(self, patch):
        self.set_model_patch(patch, "attn1_patch")

    def set_model_attn2_patch(self, patch):
        self.set_model_patch(patch, "attn2_patch")

    def set_model_attn1_output_patch(self, patch):
        self.set_model_patch(patch, "attn1_output_patch")

    def set_model_attn2_output_patch(self, patch):
        self.set_model_patch(patch, "attn2_output_patch")

    def add_object_patch(self, name, obj):
        self.object_patches[name] = obj

    def forge_patch_model(self):
        for name, new in self.object_patches.items():
            module = self.model.get_submodule(name.rpartition(".")[0])
            self.object_patches_backup.setdefault(name, module.forward)
            module.forward = new

    def forge_unpatch_model(self):
        for name, old in self.object_patches_backup.items():
            self.model.get_submodule(name.rpartition(".")[0]).forward = old
        self.object_patches_backup = {}


def forge_patcher(comfyui, base):
    """The small base's UNet as Forge's own `UnetPatcher`."""
    sys.argv, before = [sys.argv[0], "--always-cpu"], sys.argv
    sys.path.insert(0, os.environ["FORGE"])
    from backend.nn.unet import IntegratedUNet2DConditionModel
    from backend.patcher.unet import UnetPatcher as ForgeUnetPatcher

    sys.argv = before
    settings = unet_settings(base.unet.config)
    known = inspect.signature(IntegratedUNet2DConditionModel.__init__).parameters
    unet = IntegratedUNet2DConditionModel(**{k: v for k, v in settings.items() if k in known})
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = base.unet.config.norm_num_groups
    names = comfyui.utils.unet_to_diffusers(settings)
    unet.load_state_dict({names[k]: v for k, v in base.unet.state_dict().items()})
    unet.storage_dtype = unet.computation_dtype = torch.float32
    unet.load_device = unet.offload_device = unet.initial_device = torch.device("cpu")
    config = types.SimpleNamespace(huggingface_repo="stable-diffusion-v1-5", unet_config=settings)
    return ForgeUnetPatcher.from_model(unet.eval().requires_grad_(False), base.scheduler, config)


@pytest.fixture
def unet(comfyui, base):
    """What the extension receives from Forge, or the stand-in."""
    return (
        forge_patcher(comfyui, base) if "FORGE" in os.environ else UnetPatcher(comfyui_model(comfyui, base.unet).model)
    )


def predict(patcher, base) -> torch.Tensor:
    x, timesteps, text = inputs(base.unet)
    options = dict(patcher.model_options["transformer_options"])
    with torch.no_grad():
        return patcher.model.diffusion_model(x, timesteps, context=text, transformer_options=options)


@pytest.fixture
def extension(comfyui, monkeypatch):
    """The extension's script, loaded as Forge does, with stand-ins for Forge's modules."""
    names = ("modules", "modules.scripts", "modules.paths", "modules.shared")
    modules, scripts, paths, shared = map(types.ModuleType, names)
    shared.opts = types.SimpleNamespace(CLIP_stop_at_last_layers=1)
    scripts.Script, scripts.AlwaysVisible = object, object()
    paths.models_path = str(comfyui.folder / "models")
    modules.scripts, modules.paths, modules.shared = scripts, paths, shared
    for module in (modules, scripts, paths, shared):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    path = ROOT / "sdtune/integrations/forge/scripts/sdtune_tuner.py"
    spec = importlib.util.spec_from_file_location("sdtune_tuner", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def processing(unet):
    """What Forge passes to a script; comments are shown below the pictures."""
    said = []
    return types.SimpleNamespace(
        extra_generation_params={}, said=said, comment=said.append,
        sd_model=types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=unet)),
    )  # fmt: skip


def test_another_clip_skip_and_a_file_that_cannot_be_used_are_said_below_the_picture(extension, comfyui, base, unet):
    path = Path(make_file(comfyui, base, "skipping"))
    file = tuner_file.load(path)
    file.training["clip_skip"] = 2
    tuner_file.save(path, file)
    for clip_skip, said in (
        (1, ["skipping.safetensors was trained with Clip skip 2, and this was drawn with 1"]),
        (2, []),
    ):
        extension.shared.opts.CLIP_stop_at_last_layers, p = clip_skip, processing(unet)
        extension.SdtuneTuner().process_before_every_sampling(p, "skipping.safetensors", 1.0)
        assert p.said == said
    path.write_bytes(b"no tuner")
    p = processing(unet)
    with pytest.raises(ValueError):
        extension.SdtuneTuner().process_before_every_sampling(p, "skipping.safetensors", 1.0)
    assert len(p.said) == 1 and p.said[0].startswith("drawn without the tuner: ")


@pytest.mark.parametrize(
    "config",
    [{}, {"ops": ["block", "attn2"], "kind": "res_attn_text"}, {"kind": "res_attn_conv"}, {"kind": "res_attn_layer"}],
)
def test_the_extension_predicts_the_same_as_in_diffusers(extension, comfyui, base, unet, config):
    path, without = make_file(comfyui, base, "forge", **config), in_diffusers(base, {})

    def draw(strength: float, loaded=None):
        p = processing(unet)
        extension.SdtuneTuner().process_before_every_sampling(p, "forge.safetensors", strength)
        patcher = p.sd_model.forge_objects.unet
        assert patcher is not unet and p.extra_generation_params["sdtune strength"] == strength
        if loaded:
            loaded.forge_unpatch_model()
        patcher.forge_patch_model()
        return patcher, predict(patcher, base)

    first, found = draw(1.0)
    assert_same_effect(found, in_diffusers(base, {path: 1.0}), without)
    second, found = draw(0.5, loaded=first)  # the extension runs while the first is still loaded
    assert_same_effect(found, in_diffusers(base, {path: 0.5}), without)
    second.forge_unpatch_model()
    assert torch.allclose(predict(unet, base), without, atol=1e-4)


@pytest.mark.skipif("FORGE" not in os.environ, reason="needs Forge's own LoRA loader")
@pytest.mark.parametrize("ops", [["attn1", "attn2", "ff"], ["attn1", "attn2", "ff", "conv"]])
def test_our_lora_loads_in_forge_and_stacks_with_a_tuner(extension, comfyui, base, unet, ops):
    from backend.patcher.lora import load_lora, model_lora_keys_unet

    lora = make_file(comfyui, base, "forge lora", folder="loras", kind="lora", ops=ops)
    tuner, without = make_file(comfyui, base, "beside"), in_diffusers(base, {})
    layers, unused = load_lora(load_file(lora), model_lora_keys_unet(unet.model, {}))
    assert len(layers) == len(tuner_file.load(lora).tensors) / 2 and not unused
    with_lora = unet.clone()
    with_lora.add_patches(filename="forge lora", patches=layers, strength_patch=0.8)
    with_lora.refresh_loras()
    assert_same_effect(predict(with_lora, base), in_diffusers(base, {lora: 0.8}), without)
    p = processing(with_lora)
    extension.SdtuneTuner().process_before_every_sampling(p, "beside.safetensors", 1.0)
    both = p.sd_model.forge_objects.unet
    both.forge_patch_model()
    assert_same_effect(predict(both, base), in_diffusers(base, {lora: 0.8, tuner: 1.0}), without)


def test_the_extension_lists_the_files_and_does_nothing_without_one(extension, comfyui, base):
    make_file(comfyui, base, "seen")
    assert "seen.safetensors" in extension.find_tuners()
    folders = [Path(extension.paths.models_path) / name for name in extension.FOLDERS]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "twice.safetensors").touch()
    assert extension.find_tuners()["twice.safetensors"] == folders[0] / "twice.safetensors"
    for folder in folders:
        (folder / "twice.safetensors").unlink()
    extension.SdtuneTuner().process_before_every_sampling(None, extension.NONE, 1.0)
