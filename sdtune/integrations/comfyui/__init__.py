"""A node for ComfyUI, "Load Tuner (sdtune)": MODEL, tuner file, strength -> MODEL, trigger words, CLIP layer.

It needs torch and safetensors, which ComfyUI has, and of sdtune its tuners and its file reader. These are taken from an
installed sdtune, or from a folder `sdtune` inside this one, or from the repository that this folder lies in.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDERS = ("tuners", "loras")  # of ComfyUI's models


def make_sdtune_importable() -> None:
    """Appends the folder that holds `sdtune` to sys.path, unless sdtune is installed.

    Raises:
        ImportError: if there is none.
    """
    if __name__ == "sdtune":
        raise ImportError(f"{HERE.name} cannot be this node's folder: it hides the package sdtune; rename the folder")
    if find_spec("sdtune"):
        return
    for folder in (HERE, *HERE.parents):
        if (folder / "sdtune" / "tuners" / "__init__.py").is_file():
            sys.path.append(str(folder))
            return
    raise ImportError(f"the package sdtune is missing: copy its folder into {HERE}, as {HERE / 'README.md'} says")


make_sdtune_importable()

from sdtune.adapters import tuner_file  # noqa: E402

from . import patches  # noqa: E402


def _register_folder() -> None:
    """Makes models/tuners a folder of ComfyUI's, which extra_model_paths.yaml may have done already."""
    import folder_paths

    folder = str(Path(folder_paths.models_dir) / "tuners")
    folder_paths.folder_names_and_paths.setdefault("tuners", ([folder], {".safetensors"}))


class LoadTuner:
    """The node; its attributes are what ComfyUI asks of every node."""

    CATEGORY = "loaders"
    DESCRIPTION = "Adds a Res-Attn, Res-Adapter, Res-Prefix or Res-Prompt tuner of sdtune to a Stable Diffusion model."
    RETURN_TYPES = ("MODEL", "STRING", "INT")
    RETURN_NAMES = ("MODEL", "trigger words", "stop_at_clip_layer")
    OUTPUT_TOOLTIPS = ("", "for the prompt", "for CLIP Set Last Layer: -1, or -2 for a tuner trained with clip skip 2")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        import folder_paths

        _register_folder()
        names = [n for f in FOLDERS for n in folder_paths.get_filename_list(f) if n.endswith(".safetensors")]
        strength = {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.01}
        return {
            "required": {"model": ("MODEL",), "tuner": (list(dict.fromkeys(names)),), "strength": ("FLOAT", strength)}
        }

    @classmethod
    def IS_CHANGED(cls, tuner, **_):
        return _path(tuner).stat().st_mtime_ns  # a file that was trained again is read again

    def load(self, model, tuner, strength):
        file = tuner_file.load(_path(tuner))
        layer = -(file.clip_skip or 1)
        if layer != -1:
            print(f"{tuner} was trained with clip skip {-layer}: put CLIP Set Last Layer {layer} after the CLIP")
        return patches.add_tuner(model, file, strength, source=tuner), file.trigger_words, layer


def _path(name: str) -> Path:
    import folder_paths

    _register_folder()
    found = filter(None, (folder_paths.get_full_path(folder, name) for folder in FOLDERS))
    return Path(next(found, name))


NODE_CLASS_MAPPINGS = {"SdtuneLoadTuner": LoadTuner}
NODE_DISPLAY_NAME_MAPPINGS = {"SdtuneLoadTuner": "Load Tuner (sdtune)"}
