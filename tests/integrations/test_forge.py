"""The Forge extension on a stand-in with exactly the methods of Forge's `UnetPatcher` that it may use."""

import copy
import importlib.util
import sys
import types

import pytest
import torch
from comfyui import comfyui_model

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


@pytest.fixture
def extension(comfyui, monkeypatch):
    """The extension's script, loaded as Forge does, with stand-ins for Forge's modules."""
    modules, scripts, paths = map(types.ModuleType, ("modules", "modules.scripts", "modules.paths"))
    scripts.Script, scripts.AlwaysVisible = object, object()
    paths.models_path = str(comfyui.folder / "models")
    modules.scripts, modules.paths = scripts, paths
    for module in (modules, scripts, paths):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    path = ROOT / "sdtune/integrations/forge/scripts/sdtune_tuner.py"
    spec = importlib.util.spec_from_file_location("sdtune_tuner", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize("config", [{}, {"ops": ["block", "attn2"], "kind": "res_attn_text"}])
def test_the_extension_predicts_the_same_as_in_diffusers(extension, comfyui, base, config):
    path, without = make_file(comfyui, base, "forge", **config), in_diffusers(base, {})
    unet = UnetPatcher(comfyui_model(comfyui, base.unet).model)

    def draw(strength: float, loaded: UnetPatcher | None = None):
        p = types.SimpleNamespace(extra_generation_params={})
        p.sd_model = types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=unet))
        extension.SdtuneTuner().process_before_every_sampling(p, "forge.safetensors", strength)
        patcher = p.sd_model.forge_objects.unet
        assert patcher is not unet and p.extra_generation_params["sdtune strength"] == strength
        if loaded:
            loaded.forge_unpatch_model()
        patcher.forge_patch_model()
        x, timesteps, text = inputs(base.unet)
        options = dict(patcher.model_options["transformer_options"])
        with torch.no_grad():
            return patcher, patcher.model.diffusion_model(x, timesteps, context=text, transformer_options=options)

    first, found = draw(1.0)
    assert_same_effect(found, in_diffusers(base, {path: 1.0}), without)
    second, found = draw(0.5, loaded=first)  # the extension runs while the first is still loaded
    assert_same_effect(found, in_diffusers(base, {path: 0.5}), without)
    second.forge_unpatch_model()
    x, timesteps, text = inputs(base.unet)
    with torch.no_grad():
        found = unet.model.diffusion_model(x, timesteps, context=text)
    assert torch.allclose(found, without, atol=1e-4)


def test_the_extension_lists_the_files_and_does_nothing_without_one(extension, comfyui, base):
    make_file(comfyui, base, "seen")
    assert "seen.safetensors" in extension.find_tuners()
    extension.SdtuneTuner().process_before_every_sampling(None, extension.NONE, 1.0)
