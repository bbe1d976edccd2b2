"""Turns what a user calls a base into a diffusers pipeline: "tiny-sd", a folder, a single file, or a hub id."""

import json
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from transformers import CLIPTokenizer

from .frozen import quicken

TINY_SD = Path(__file__).parent.parent / "assets" / "tiny-sd"
CONFIGS = Path(__file__).parent / "configs"  # for single files: the components of sd15 and sd21, and their tokenizer
_KNOWN = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
_EXPECTED = "expected a Stable Diffusion 1.x or 2.x"
# One weight of each part of a checkpoint in the original layout; the text encoder's tells 1.x from 2.x.
_UNET_KEY = "model.diffusion_model.input_blocks.0.0.weight"
_VAE_KEY = "first_stage_model.encoder.conv_in.weight"
_TEXT_KEYS = {
    "sd15": "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
    "sd21": "cond_stage_model.model.token_embedding.weight",
}


class BaseError(ValueError):
    """A base that cannot be loaded; the message names it, what was found, what was expected and what to do."""


def load_base(base: str | Path = "tiny-sd", dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Loads a text-to-image Stable Diffusion 1.x or 2.x pipeline on the CPU, without a safety checker.

    Its UNet and VAE are quickened (see `frozen`).

    Args:
        base: "tiny-sd" (the small base in assets/), a folder in diffusers layout, a single .safetensors
            checkpoint in the original layout (loaded offline with the configs that ship here), or a hub id.
        dtype: of all components.

    Raises:
        BaseError: if there is no such base, or it is no whole Stable Diffusion 1.x or 2.x.
    """
    path = _local(base)
    if path is None:
        text = str(base)
        # The index first: what is no Stable Diffusion is refused before gigabytes of it are fetched.
        _check_index(text, _from_hub(text, "model_index.json"))
        try:
            folder = StableDiffusionPipeline.download(text, safety_checker=None, use_safetensors=True)
        except Exception as error:  # the hub client raises many kinds
            raise BaseError(
                f"the hub has {text}, but it could not be fetched: {_one_line(error)}; {_EXPECTED} with .safetensors "
                "weights; check the network and try again (what has come is kept)"
            ) from error
        pipe = _from_folder(Path(folder), dtype)
        pipe.register_to_config(_name_or_path=text)
    elif path.is_file():
        pipe = _from_single_file(path, dtype)
    else:
        pipe = _from_folder(path, dtype)
    pipe.set_progress_bar_config(disable=True)
    quicken(pipe.unet)
    quicken(pipe.vae)
    return pipe


def native_resolution(base: str | Path) -> int:
    """The side in pixels that a base was trained at, from its UNet's configuration or a single file's header.

    Raises:
        BaseError: as `load_base`, as far as that can be seen without reading the weights.
    """
    path = _local(base)
    if path is not None and path.is_file():
        return _inspect(path).resolution
    config = _from_hub(str(base), "unet/config.json") if path is None else path / "unet" / "config.json"
    size = _read_json(config).get("sample_size")
    if not isinstance(size, int):
        raise BaseError(f"{config} has sample_size {size!r}; expected a whole number; set the resolution yourself")
    return 8 * size


def _local(base: str | Path) -> Path | None:
    """The file or folder that `base` means, or None if it may be a hub id."""
    text = str(base)
    path = TINY_SD if text == "tiny-sd" else Path(base).expanduser()
    if path.exists():
        return path
    if text == "tiny-sd":
        raise BaseError(
            f"the base tiny-sd is not at {path}; expected it where a clone of the repository has it; "
            "install from a clone with pip install -e, or name another base"
        )
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or path.suffix in (".safetensors", ".ckpt"):
        raise BaseError(
            f"there is no file or folder {text}; expected tiny-sd, a path, or a hub id such as owner/name; "
            f"check the spelling (relative paths start from {Path.cwd()})"
        )
    return None


def _from_hub(base: str, name: str) -> Path:
    try:
        return Path(hf_hub_download(base, name))
    except Exception as error:  # the hub client raises many kinds
        raise BaseError(
            f"there is no folder {base} here, and the hub does not give {name} of a base of that name: "
            f"{_one_line(error)}; {_EXPECTED}; check the spelling, the network, HF_HUB_OFFLINE and, for a gated base, "
            "your login"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise BaseError(f"{path} is missing; {_EXPECTED} in diffusers layout; name a whole one")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseError(f"{path} is not readable: {error}; expected JSON; fetch the base again") from error
    if not isinstance(value, dict):
        raise BaseError(f"{path} holds a JSON {type(value).__name__}; expected an object; fetch the base again")
    return value


def _check_index(name: str | Path, index: Path) -> None:
    kind = _read_json(index).get("_class_name")
    if kind not in _KNOWN:
        raise BaseError(
            f"{name} is a {kind or 'pipeline without a name'}; {_EXPECTED} ({_KNOWN[0]}); choose another base"
        )


def _from_folder(path: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    _check_index(path, path / "model_index.json")
    channels = _read_json(path / "unet" / "config.json").get("in_channels", 4)
    if channels != 4:
        raise _not_from_text(path, channels)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch_dtype`", FutureWarning)  # diffusers < 0.40 knows no other name
            return StableDiffusionPipeline.from_pretrained(
                path, torch_dtype=dtype, safety_checker=None, requires_safety_checker=False, local_files_only=True
            )
    except Exception as error:  # diffusers, transformers and safetensors raise many kinds
        raise BaseError(
            f"{path} could not be loaded: {_one_line(error)}; {_EXPECTED}, whole; fetch or save the base again"
        ) from error


def _not_from_text(path: Path, channels: int) -> BaseError:
    return BaseError(
        f"the UNet of {path} reads {channels} channels, as inpainting and other editing bases do; {_EXPECTED} that "
        "makes images from text, with 4; choose another base"
    )


class _SingleFile(NamedTuple):
    configs: str  # the folder in CONFIGS
    prediction_type: str  # what its UNet predicts, in diffusers' words
    resolution: int


def _inspect(path: Path) -> _SingleFile:
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
        found = f"is not a whole safetensors file: {_one_line(error)}"
        with open(path, "rb") as raw:
            if raw.read(2) in (b"PK", b"\x80\x02"):
                found = "is a pickle (.ckpt, .pt) that was renamed"
        raise BaseError(f"{path} {found}; {_EXPECTED} checkpoint; fetch the .safetensors of this base again") from error


def _inspect_open(path: Path, file: safe_open) -> _SingleFile:
    keys, metadata = set(file.keys()), file.metadata() or {}
    advice = f"{_EXPECTED} checkpoint in the original layout"
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
        raise _not_from_text(path, channels)

    stated = metadata.get("modelspec.prediction_type")
    v_prediction = stated.startswith("v") if stated else configs == "sd21" and _looks_like_v(file, keys)
    return _SingleFile(
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


def _from_single_file(path: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    found = _inspect(path)
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
            f"{path} lacks weights of the UNet or the VAE; {_EXPECTED} checkpoint, whole; get this base again"
        ) from error
    except Exception as error:  # diffusers raises many kinds
        raise BaseError(
            f"{path} could not be loaded: {_one_line(error)}; {_EXPECTED} checkpoint, whole; get this base again"
        ) from error
    lacking = [name for name, weight in pipe.text_encoder.named_parameters() if weight.is_meta]  # left so silently
    if lacking:
        raise BaseError(
            f"{path} lacks {len(lacking)} weights of the text encoder, such as {lacking[0]}; {_EXPECTED} checkpoint, "
            "whole; get this base again"
        )
    pipe.unet.register_to_config(sample_size=found.resolution // 8)
    pipe.scheduler.register_to_config(prediction_type=found.prediction_type)
    pipe.register_to_config(_name_or_path=path.name)
    return pipe
