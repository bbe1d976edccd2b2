"""An extension for Forge: adds a tuner of sdtune to the UNet before it draws, by the patches of the ComfyUI node."""

import sys
from importlib.util import find_spec
from pathlib import Path

import gradio as gr
from modules import paths, scripts, shared

if not find_spec("sdtune"):
    here = Path(__file__).resolve().parent.parent
    found = [f for f in (here, *here.parents) if (f / "sdtune" / "tuners" / "__init__.py").is_file()]
    if not found:
        raise ImportError(f"the package sdtune is missing: copy its folder into {here}, as {here / 'README.md'} says")
    sys.path.append(str(found[0]))

from sdtune.adapters import tuner_file  # noqa: E402
from sdtune.integrations.comfyui import patches  # noqa: E402

NONE = "none"
FOLDERS = ("tuners", "Lora")  # of Forge's models


def find_tuners() -> dict[str, Path]:
    """The .safetensors files in models/tuners and models/Lora by the name that the list shows; for a name that is in
    both, that in models/tuners."""
    folders = [Path(paths.models_path) / name for name in reversed(FOLDERS)]
    return {str(f.relative_to(folder)): f for folder in folders for f in sorted(folder.rglob("*.safetensors"))}


class SdtuneTuner(scripts.Script):
    """The accordion in the pages txt2img and img2img; its methods are what Forge asks of every script."""

    def title(self):
        return "Tuner (sdtune)"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        with gr.Accordion(open=False, label=self.title()):
            tuner = gr.Dropdown([NONE, *find_tuners()], value=NONE, label="Tuner")
            strength = gr.Slider(-2, 2, value=1, step=0.05, label="Strength")
            refresh = gr.Button("Look for files")
            refresh.click(lambda: gr.update(choices=[NONE, *find_tuners()]), outputs=tuner)
        return [tuner, strength]

    def process_before_every_sampling(self, p, tuner, strength, **kwargs):
        if tuner == NONE:
            return
        try:
            file = tuner_file.load(find_tuners().get(tuner, tuner))
            objects = p.sd_model.forge_objects
            objects.unet = patches.add_tuner(objects.unet, file, strength, source=tuner)
        except ValueError as error:
            p.comment(f"drawn without the tuner: {error}")  # Forge itself shows errors on its console alone
            raise
        clip_skip = int(shared.opts.CLIP_stop_at_last_layers)
        if file.clip_skip not in (None, clip_skip):
            p.comment(f"{tuner} was trained with Clip skip {file.clip_skip}, and this was drawn with {clip_skip}")
        p.extra_generation_params |= {"sdtune tuner": tuner, "sdtune strength": strength}
