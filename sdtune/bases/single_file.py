"""A single .safetensors checkpoint in the original layout: what it is, and how it is loaded without a network."""

from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError, safe_open
from transformers import CLIPTokenizer

from .errors import EXPECTED_BASE, BaseError, not_text_to_image, one_line

CONFIGS = Path(__file__).parent / "configs"  # for single files: the components of sd15 and sd21, and their tokenizer
# One weight of each part of a checkpoint in the original layout; the text encoder's tells 1.x from 2.x.
_UNET_KEY = "model.diffusion_model.input_blocks.0.0.weight"
_VAE_KEY = "first_stage_model.encoder.conv_in.weight"
_TEXT_KEYS = {
    "sd15": "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
    "sd21": "cond_stage_model.model.token_embedding.weight",
}


class SingleFile(NamedTuple):
    configs: str  # the folder in CONFIGS
    prediction_type: str  # what its UNet predicts, in diffusers' words
    resolution: int


def inspect_single_file(path: Path) -> SingleFile:
    """Finds out what a single file is from its header, and refuses what is no whole base."""
    if path.suffix != ".safetensors":
        raise BaseError(
            f"{path} is a {path.suffix or 'file without suffix'}; expected a .safetensors file, since others may run "
            "code when they are read; get or convert to the .safetensors of this base"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return _inspect_open(path, file)
    except (SafetensorError, OSError) as error:
        found = f"is not a whole safetensors file: {one_line(error)}"
        with open(path, "rb") as raw:
            if raw.read(2) in (b"PK", b"\x80\x02"):
                found = "is a pickle (.ckpt, .pt) that was renamed"
        raise BaseError(
            f"{path} {found}; {EXPECTED_BASE} checkpoint; fetch the .safetensors of this base again"
        ) from error


def _inspect_open(path: Path, file: safe_open) -> SingleFile:
    keys, metadata = set(file.keys()), file.metadata() or {}
    advice = f"{EXPECTED_BASE} checkpoint in the original layout"
    if "sdtune.tuner" in metadata:
        raise BaseError(f"{path} is a tuner, not a base; {advice}; load a base, then this with sdtune.load_tuner")
    if any("lora" in k.lower() for k in keys):
        raise BaseError(f"{path} is a LoRA, not a base; {advice}; load a base, then this with pipe.load_lora_weights")
    if any(k.startswith("conditioner.") for k in keys):
        raise BaseError(f"{path} is a Stable Diffusion XL or later; {advice}; choose another base")

    configs = next((name for name, key in _TEXT_KEYS.items() if key in keys), None)
    has = {"UNet": _UNET_KEY in keys, "VAE": _VAE_KEY in keys, "text encoder": configs is not None}
    if not any(has.values()):
        some = ", ".join(sorted(keys)[:3]) or "none"
        raise BaseError(
            f"{path} holds no UNet, VAE or text encoder that is known here (its first keys: {some}); {advice}; for a "
            "file of a diffusers folder, name the folder with model_index.json"
        )
    if not all(has.values()):
        lacking = ", ".join(part for part in has if not has[part])
        raise BaseError(f"{path} holds no {lacking}; {advice}, with all of {', '.join(has)}; get the whole checkpoint")
    channels = file.get_slice(_UNET_KEY).get_shape()[1]
    if channels != 4:
        raise not_text_to_image(path, channels)

    stated = metadata.get("modelspec.prediction_type")
    v_prediction = stated.startswith("v") if stated else configs == "sd21" and _looks_like_v(file, keys)
    return SingleFile(
        configs=configs,
        prediction_type="v_prediction" if v_prediction else "epsilon",
        resolution=768 if configs == "sd21" and v_prediction else 512,
    )


def _looks_like_v(file: safe_open, keys: set[str]) -> bool:
    """Whether SD 2.x weights are of the 768 px family, which predicts v; the layouts do not differ.

    The statistic is ComfyUI's (comfy/supported_models.py, SD20): this bias spreads wider there.
    """
    key = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    return key in keys and file.get_tensor(key).float().std(correction=0).item() > 0.09


def load_single_file(path: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    found = inspect_single_file(path)
    # The vocabulary is one; CLIP in 1.x pads with the end of the text, OpenCLIP in 2.x with token 0.
    padding = "!" if found.configs == "sd21" else "<|endoftext|>"
    tokenizer = CLIPTokenizer.from_pretrained(CONFIGS / "tokenizer", pad_token=padding)
    try:
        pipe = StableDiffusionPipeline.from_single_file(
            str(path), config=str(CONFIGS / found.configs), torch_dtype=dtype, local_files_only=True,
            tokenizer=tokenizer, safety_checker=None, requires_safety_checker=False,
        )  # fmt: skip
    except NotImplementedError as error:  # what torch raises when it moves a weight without data
        raise BaseError(
            f"{path} lacks weights of the UNet or the VAE; {EXPECTED_BASE} checkpoint, whole; get this base again"
        ) from error
    except Exception as error:  # diffusers raises many kinds
        raise BaseError(
            f"{path} could not be loaded: {one_line(error)}; {EXPECTED_BASE} checkpoint, whole; get this base again"
        ) from error
    lacking = [name for name, weight in pipe.text_encoder.named_parameters() if weight.is_meta]  # left so silently
    if lacking:
        raise BaseError(
            f"{path} lacks {len(lacking)} weights of the text encoder, such as {lacking[0]}; {EXPECTED_BASE} "
            "checkpoint, whole; get this base again"
        )
    pipe.unet.register_to_config(sample_size=found.resolution // 8)
    pipe.scheduler.register_to_config(prediction_type=found.prediction_type)
    pipe.register_to_config(_name_or_path=path.name)
    return pipe
