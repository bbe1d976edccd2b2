"""The bundled tuner and LoRA draw the same picture in diffusers, PEFT and ComfyUI, with the same noise and sampler."""

import copy
import shutil

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from peft import PeftModel

import sdtune
from sdtune.adapters import peft_files, tuner_file

from .conftest import ROOT
from .test_comfyui import node

FILES = {kind: ROOT / "assets" / f"anime_{kind}.safetensors" for kind in ("res_attn", "lora")}
PROMPT, SEED, GUIDANCE = "a girl with silver hair and red eyes, under cherry blossoms, in anime style", 7, 3.0


def with_euler(base):
    """A copy of a pipeline with the sampler that is "euler" with the scheduler "normal" in ComfyUI."""
    pipe = copy.deepcopy(base)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    return pipe


def initial_noise(side: int) -> torch.Tensor:
    """ComfyUI's noise of the seed, (1, 4, side / 8, side / 8)."""
    return torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(SEED))


def draw_in_diffusers(pipe, side: int, steps: int) -> torch.Tensor:
    """The latents of the picture, also for a UNet that PEFT has wrapped."""
    pipe.scheduler.set_timesteps(steps)
    sigma = pipe.scheduler.sigmas[0]
    # the first latents have the deviation (1 + sigma^2)^0.5 in ComfyUI, and sigma here, where the pipeline multiplies
    latents = initial_noise(side) * (1 + sigma**2).sqrt() / sigma
    return pipe(
        PROMPT, latents=latents, num_inference_steps=steps, guidance_scale=GUIDANCE, output_type="latent"
    ).images


def draw_in_comfyui(comfyui, model, pipe, side: int, steps: int) -> torch.Tensor:
    """The latents of the picture, by ComfyUI's KSampler, with the text as diffusers encodes it."""
    with torch.no_grad():
        texts = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    conditions = [[[text, {}]] for text in texts]
    latent = {"samples": torch.zeros(1, 4, side // 8, side // 8)}
    drawn = comfyui.nodes.common_ksampler(model, SEED, steps, GUIDANCE, "euler", "normal", *conditions, latent)
    return drawn[0]["samples"] * comfyui.latent_formats.SD15().scale_factor


def draw_everywhere(comfyui, model, base, kind: str, folder, side: int, steps: int) -> dict[str, torch.Tensor]:
    """The latents of the picture with a file, by program; and those of the base."""
    found, pipe = {"base": draw_in_diffusers(with_euler(base), side, steps)}, with_euler(base)
    sdtune.load_tuner(pipe, FILES[kind])
    found["diffusers, load_tuner"] = draw_in_diffusers(pipe, side, steps)
    pipe = with_euler(base)
    peft_files.save_peft_files(folder, tuner_file.load(FILES[kind]))
    pipe.unet = PeftModel.from_pretrained(pipe.unet, folder)
    found["PEFT"] = draw_in_diffusers(pipe, side, steps)
    if kind == "lora":
        pipe = with_euler(base)
        pipe.load_lora_weights(FILES[kind].parent, weight_name=FILES[kind].name)
        found["diffusers, load_lora_weights"] = draw_in_diffusers(pipe, side, steps)
        shutil.copy(FILES[kind], comfyui.folder / "models" / "loras")
        loader = comfyui.nodes.LoraLoaderModelOnly()
        patched = loader.load_lora_model_only(model, FILES[kind].name, 1.0)[0]
    else:
        shutil.copy(FILES[kind], comfyui.folder / "models" / "tuners")
        patched = node(comfyui, model, FILES[kind].stem)
    found["ComfyUI"] = draw_in_comfyui(comfyui, patched, base, side, steps)
    found["base in ComfyUI"] = draw_in_comfyui(comfyui, model, base, side, steps)
    return found


@pytest.mark.parametrize("kind", FILES)
def test_a_file_draws_the_same_picture_in_every_program(comfyui, base, model, tmp_path, kind):
    found = draw_everywhere(comfyui, model, base, kind, tmp_path, side=128, steps=4)
    without, expected = found.pop("base"), found["diffusers, load_tuner"]
    assert torch.allclose(found.pop("base in ComfyUI"), without, atol=1e-3)
    effect = (expected - without).norm()
    assert effect > 0.05 * without.norm()
    differences = {program: ((latents - expected).norm() / effect).item() for program, latents in found.items()}
    assert differences.pop("PEFT") == 0
    assert max(differences.values()) < 1e-4, differences
