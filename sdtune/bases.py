"""Turns what a user calls a base into a diffusers pipeline: "tiny-sd", a folder, a single file, or a hub id."""

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

TINY_SD = Path(__file__).parent.parent / "assets" / "tiny-sd"
CONFIGS = Path(__file__).parent / "configs"  # component configs for single files: sd15, sd21
_KNOWN = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")


class BaseError(ValueError):
    """A base that cannot be loaded; the message names it, what was found and what was expected."""


def load_base(base: str | Path = "tiny-sd", dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Loads a Stable Diffusion 1.x or 2.x pipeline on the CPU, without a safety checker.

    Args:
        base: "tiny-sd" (the small base in assets/), a folder in diffusers layout, a single
            .safetensors checkpoint (loaded offline with the configs that ship here), or a hub id.
        dtype: of all components.

    Raises:
        BaseError: if there is no such base, or it is no Stable Diffusion 1.x or 2.x.
    """
    path = TINY_SD if str(base) == "tiny-sd" else Path(base).expanduser()
    if path.is_dir():
        return _from_folder(path, dtype)
    if path.is_file():
        return _from_single_file(path, dtype)
    text = str(base)
    if text == "tiny-sd":
        raise BaseError(f"the base tiny-sd is not at {TINY_SD}; it comes with a clone of the repository (pip -e)")
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or path.suffix in (".safetensors", ".ckpt"):
        raise BaseError(f"there is no file or folder {text}; expected tiny-sd, a path, or a hub id such as owner/name")
    try:
        folder = StableDiffusionPipeline.download(text, safety_checker=None, use_safetensors=True)
    except Exception as error:  # the hub client raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseError(f"there is no folder {text} here, and the hub does not give a base of that name: {reason}") from error
    pipe = _from_folder(Path(folder), dtype)
    pipe.register_to_config(_name_or_path=text)
    return pipe


def _from_folder(path: Path, dtype) -> StableDiffusionPipeline:
    index = path / "model_index.json"
    if not index.is_file():
        raise BaseError(f"{path} has no model_index.json; expected a Stable Diffusion in diffusers layout")
    try:
        kind = json.loads(index.read_text()).get("_class_name")
    except ValueError as error:
        raise BaseError(f"{index} is not readable JSON: {error}") from error
    if kind not in _KNOWN:
        raise BaseError(f"{path} is a {kind}; expected a Stable Diffusion 1.x or 2.x ({_KNOWN[0]})")
    try:
        pipe = StableDiffusionPipeline.from_pretrained(
            path, torch_dtype=dtype, safety_checker=None, requires_safety_checker=False, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BaseError(f"{path} could not be loaded as a Stable Diffusion: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _from_single_file(path: Path, dtype) -> StableDiffusionPipeline:
    if path.suffix != ".safetensors":
        raise BaseError(f"{path} is not loaded: only .safetensors files are, since a {path.suffix} may run code")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as f:
            keys = set(f.keys())
    except (SafetensorError, OSError) as error:
        raise BaseError(f"{path} is not a whole safetensors file: {error}") from error
    sd2 = any(k.startswith("cond_stage_model.model.") for k in keys)
    if not sd2 and not any(k.startswith("cond_stage_model.transformer.") for k in keys):
        raise BaseError(f"{path} is no Stable Diffusion 1.x or 2.x checkpoint; its keys are such as {sorted(keys)[:2]}")
    try:
        pipe = StableDiffusionPipeline.from_single_file(
            path, config=str(CONFIGS / ("sd21" if sd2 else "sd15")), torch_dtype=dtype, local_files_only=True,
            safety_checker=None, requires_safety_checker=False,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BaseError(f"{path} could not be loaded as a Stable Diffusion checkpoint: {error}") from error
    pipe.register_to_config(_name_or_path=path.name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def native_resolution(base: str | Path) -> int:
    """The side in pixels that a base was trained at, from its UNet's configuration alone.

    Raises:
        BaseError: as `load_base`, as far as that can be seen without reading weights.
    """
    path = TINY_SD if str(base) == "tiny-sd" else Path(base).expanduser()
    if path.is_file():
        return 512
    config = path / "unet" / "config.json"
    if not path.is_dir() and str(base).count("/") == 1 and not str(base).startswith((".", "/", "~")):
        from huggingface_hub import hf_hub_download

        try:
            config = Path(hf_hub_download(str(base), "unet/config.json"))
        except Exception as error:  # the hub client raises many kinds
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise BaseError(f"there is no folder {base} here, and the hub does not give it: {reason}") from error
    if not config.is_file():
        raise BaseError(f"there is no Stable Diffusion at {base}: {config} is missing")
    return 8 * json.loads(config.read_text())["sample_size"]
