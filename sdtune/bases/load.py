"""Turns what a user calls a base into a diffusers pipeline: "tiny-sd", a folder, a single file, or a hub id."""

import json
import re
import warnings
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from transformers import CLIPTextModel

from .. import kernels, paths
from .errors import EXPECTED_BASE, BaseError, not_text_to_image, one_line
from .single_file import inspect_single_file, load_single_file

TINY_SD = Path(__file__).parents[2] / "assets" / "tiny-sd"
_PARTS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
_KNOWN = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")


def load_base(base: str | Path = "tiny-sd", dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Loads a text-to-image Stable Diffusion 1.x or 2.x pipeline on the CPU, without a safety checker.

    Frozen layers of its UNet and VAE use the faster kernels of `sdtune.kernels`.

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
                f"the hub has {text}, but it could not be fetched: {one_line(error)}; {EXPECTED_BASE} with "
                ".safetensors weights; check the network and try again (what has come is kept)"
            ) from error
        pipe = _from_folder(Path(folder), dtype)
        pipe.register_to_config(_name_or_path=text)
    elif path.is_file():
        pipe = load_single_file(path, dtype)
    else:
        pipe = _from_folder(path, dtype)
    _check_finite(base, pipe)
    _check_settings(base, pipe)
    pipe.set_progress_bar_config(disable=True)
    kernels.optimize(pipe.unet)
    kernels.optimize(pipe.vae)
    return pipe


def native_resolution(base: str | Path) -> int:
    """The side in pixels that a base was trained at, from its UNet's configuration or a single file's header.

    Raises:
        BaseError: as `load_base`, as far as that can be seen without reading the weights.
    """
    path = _local(base)
    if path is not None and path.is_file():
        return inspect_single_file(path).resolution
    config = _from_hub(str(base), "unet/config.json") if path is None else path / "unet" / "config.json"
    size = _read_json(config).get("sample_size")
    sides = size if isinstance(size, list) else [size]  # height and width, where it is a list
    if not sides or not all(isinstance(side, int) and side == sides[0] for side in sides):
        raise BaseError(f"{config} has sample_size {size!r}; expected a whole number; set the resolution yourself")
    return 8 * sides[0]


def _local(base: str | Path) -> Path | None:
    """The file or folder that `base` means, or None if it may be a hub id."""
    text = str(base)
    path = paths.find(TINY_SD if text == "tiny-sd" else base)
    if path:
        return path
    if text == "tiny-sd":
        raise BaseError(
            f"the base tiny-sd is not at {TINY_SD}; expected it where a clone of the repository has it; "
            "install from a clone with pip install -e, or name another base"
        )
    if not re.fullmatch(r"\w[\w.-]{0,95}/[\w.-]{1,96}", text) or text.endswith((".safetensors", ".ckpt")):
        raise BaseError(
            f"there is no file or folder {paths.show(text)}; expected tiny-sd, a path, or a hub id such as owner/name; "
            f"check the spelling (relative paths start from {Path.cwd()})"
        )
    return None


def _from_hub(base: str, name: str) -> Path:
    try:
        return Path(hf_hub_download(base, name))
    except Exception as error:  # the hub client raises many kinds
        raise BaseError(
            f"there is no folder {base} here, and the hub does not give {name} of a base of that name: "
            f"{one_line(error)}; {EXPECTED_BASE}; check the spelling, the network, HF_HUB_OFFLINE and, for a gated "
            "base, your login"
        ) from error


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise BaseError(f"{path} is missing; {EXPECTED_BASE} in diffusers layout; name a whole one")
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
            f"{name} is a {kind or 'pipeline without a name'}; {EXPECTED_BASE} ({_KNOWN[0]}); choose another base"
        )


def _from_folder(path: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    _check_index(path, path / "model_index.json")
    channels = _read_json(path / "unet" / "config.json").get("in_channels", 4)
    if channels != 4:
        raise not_text_to_image(path, channels)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch_dtype`", FutureWarning)  # diffusers < 0.40 knows no other name
            parts = {name: _load_part(path, name, kind, dtype) for name, kind in _PARTS.items()}
            return StableDiffusionPipeline.from_pretrained(
                path, torch_dtype=dtype, safety_checker=None, requires_safety_checker=False, local_files_only=True,
                **parts,
            )  # fmt: skip
    except BaseError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors raise many kinds
        raise BaseError(
            f"{path} could not be loaded: {one_line(error)}; {EXPECTED_BASE}, whole; fetch or save the base again"
        ) from error


def _load_part(path: Path, name: str, kind: type, dtype: torch.dtype) -> torch.nn.Module:
    """The UNet, VAE or text encoder of a folder; where its file lacks weights, diffusers would draw random ones."""
    part, info = kind.from_pretrained(
        path / name, torch_dtype=dtype, local_files_only=True, output_loading_info=True
    )  # fmt: skip
    lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lacking:
        raise BaseError(
            f"{path / name} lacks {len(lacking)} weights, or has them in another shape, such as {lacking[0]}; "
            f"{EXPECTED_BASE}, whole; fetch or save the base again"
        )
    return part


def _check_finite(base: str | Path, pipe: StableDiffusionPipeline) -> None:
    """Raises a BaseError if a weight is NaN or infinite; a training would end in a loss that is not finite."""
    bad = [
        f"{part}.{name}"
        for part in _PARTS
        for name, weight in getattr(pipe, part).named_parameters()
        if weight.numel() and not all(map(torch.isfinite, torch.aminmax(weight)))
    ]
    if bad:
        raise BaseError(
            f"{base} holds {len(bad)} weights that are NaN or infinite, such as {bad[0]}; {EXPECTED_BASE} of finite "
            "weights; fetch or save the base again"
        )


def _check_settings(base: str | Path, pipe: StableDiffusionPipeline) -> None:
    """Raises a BaseError for settings with which the base would load, and then draw or train wrongly."""
    tokenizer, text, size = pipe.tokenizer, pipe.text_encoder.config, pipe.unet.config.sample_size
    prediction = pipe.scheduler.config.get("prediction_type", "epsilon")
    wrong = []
    # textual inversion adds tokens to both; without its vocabulary file, a tokenizer has two tokens
    if not text.vocab_size / 2 < len(tokenizer) <= text.vocab_size:
        wrong.append(f"its tokenizer knows {len(tokenizer):,} tokens, its text encoder {text.vocab_size:,}")
    if not tokenizer.model_max_length <= text.max_position_embeddings:
        wrong.append(f"its tokenizer gives up to {tokenizer.model_max_length:.3g} tokens, its text encoder reads "
                     f"{text.max_position_embeddings}")  # fmt: skip
    if prediction not in ("epsilon", "v_prediction"):
        wrong.append(f"its scheduler has prediction_type {prediction!r}, which is not epsilon or v_prediction")
    if not all(isinstance(side, int) for side in (size if isinstance(size, (list, tuple)) else [size])):
        wrong.append(f"its UNet has sample_size {size!r}, which is no whole number")
    if wrong:
        raise BaseError(f"{base} cannot be used: {'; '.join(wrong)}; {EXPECTED_BASE}, whole; fetch or save it again")
