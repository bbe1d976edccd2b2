"""The bundled tuner and LoRA draw the same picture in diffusers, PEFT and ComfyUI, with the same noise and sampler."""

import copy
from dataclasses import dataclass

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from peft import PeftModel

import sdtune
from sdtune.adapters import api, peft_files, tuner_file

from .conftest import ROOT

FILES = {kind: ROOT / "assets" / f"anime_{kind}.safetensors" for kind in ("res_attn", "lora")}
PROMPT, SEED, GUIDANCE = "a girl with silver hair and red eyes, under cherry blossoms, in anime style", 7, 3.0


def with_euler(base):
    """A copy of a pipeline with the sampler that is "euler" with the scheduler "normal" in ComfyUI."""
    pipe = copy.deepcopy(base)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    return pipe


@dataclass
class Drawing:
    """How a picture is drawn: its size in pixels, the clip skip as AUTOMATIC1111 counts, and the sampling steps."""

    width: int = 128
    height: int = 128
    clip_skip: int = 1
    steps: int = 4

    def initial_noise(self) -> torch.Tensor:
        """ComfyUI's noise of the seed, (1, 4, height / 8, width / 8)."""
        return torch.randn(1, 4, self.height // 8, self.width // 8, generator=torch.Generator().manual_seed(SEED))


def draw_in_diffusers(pipe, drawing: Drawing, clip_skip: int | None) -> torch.Tensor:
    """The latents of the picture, also for a UNet that PEFT has wrapped; with None for the tuner's own clip skip."""
    pipe.scheduler.set_timesteps(drawing.steps)
    sigma = pipe.scheduler.sigmas[0]
    # the first latents have the deviation (1 + sigma^2)^0.5 in ComfyUI, and sigma here, where the pipeline multiplies
    latents = drawing.initial_noise() * (1 + sigma**2).sqrt() / sigma
    texts = sdtune.encode_prompt(pipe, PROMPT, clip_skip=clip_skip)
    return pipe(
        **texts, latents=latents, num_inference_steps=drawing.steps, guidance_scale=GUIDANCE, output_type="latent"
    ).images


def draw_in_comfyui(comfyui, model, clip, drawing: Drawing, layer: int) -> torch.Tensor:
    """The latents of the picture, by ComfyUI's nodes; `layer` is that of CLIP Set Last Layer."""
    nodes = comfyui.nodes
    clip = nodes.CLIPSetLastLayer().set_last_layer(clip, layer)[0]
    conditions = [nodes.CLIPTextEncode().encode(clip, text)[0] for text in (PROMPT, "")]
    latent = {"samples": torch.zeros_like(drawing.initial_noise())}
    drawn = nodes.common_ksampler(model, SEED, drawing.steps, GUIDANCE, "euler", "normal", *conditions, latent)
    return drawn[0]["samples"] * comfyui.latent_formats.SD15().scale_factor


def draw_everywhere(comfyui, model, clip, base, kind: str, folder, drawing: Drawing) -> dict[str, torch.Tensor]:
    """The latents of the picture with a file that says the drawing's clip skip, by program; and those of the base."""
    file = tuner_file.load(FILES[kind])
    file.training["clip_skip"] = drawing.clip_skip
    models = comfyui.folder / "models" / ("loras" if kind == "lora" else "tuners")
    path, skip = tuner_file.save(models / FILES[kind].name, file), drawing.clip_skip
    found, pipe = {"base": draw_in_diffusers(with_euler(base), drawing, skip)}, with_euler(base)
    api.attach_file(pipe, path, "drawn")
    found["diffusers, load_tuner"] = draw_in_diffusers(pipe, drawing, clip_skip=None)
    pipe = with_euler(base)
    peft_files.save_peft_files(folder, file)
    pipe.unet = PeftModel.from_pretrained(pipe.unet, folder)
    found["PEFT"] = draw_in_diffusers(pipe, drawing, skip)
    if kind == "lora":
        pipe = with_euler(base)
        pipe.load_lora_weights(models, weight_name=path.name)
        found["diffusers, load_lora_weights"] = draw_in_diffusers(pipe, drawing, skip)
        patched, layer = comfyui.nodes.LoraLoaderModelOnly().load_lora_model_only(model, path.name, 1.0)[0], -skip
    else:
        ours = comfyui.nodes.NODE_CLASS_MAPPINGS["SdtuneLoadTuner"]()
        patched, _words, layer = ours.load(model, path.name, 1.0)
    found["ComfyUI"] = draw_in_comfyui(comfyui, patched, clip, drawing, layer)
    found["base in ComfyUI"] = draw_in_comfyui(comfyui, model, clip, drawing, -skip)
    return found


@pytest.mark.parametrize("drawing", [Drawing(), Drawing(64, 96, clip_skip=2)], ids=["square", "2:3, clip skip 2"])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_draws_the_same_picture_in_every_program(comfyui, base, model, clip, tmp_path, kind, drawing):
    found = draw_everywhere(comfyui, model, clip, base, kind, tmp_path, drawing)
    assert {latents.shape for latents in found.values()} == {(1, 4, drawing.height // 8, drawing.width // 8)}
    without, expected = found.pop("base"), found["diffusers, load_tuner"]
    assert torch.allclose(found.pop("base in ComfyUI"), without, atol=1e-3)
    effect = (expected - without).norm()
    assert effect > 0.05 * without.norm()
    differences = {program: ((latents - expected).norm() / effect).item() for program, latents in found.items()}
    assert differences.pop("PEFT") == 0
    assert max(differences.values()) < 1e-4, differences
