"""The settings that PEFT and diffusers keep apart from the weights of a LoRA, LoHa or LoKr: alpha, rank, its start."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from . import tuner_file
from .tuner_file import TunerFileError

MAX_ALPHA = 1_000_000  # far above any that is in use; products with greater ones lose the layer's own weights
_ALPHA = {"LoRA": "lora_alpha", "DoRA": "lora_alpha", "LoHa": "alpha", "LoKr": "alpha"}
# starts of a LoRA by which PEFT changes the base's own weights, too, as its `init_lora_weights` begins
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def read_settings(path: Path, kind: str, is_peft: bool, models: Iterable[str]) -> dict[str, dict] | None:
    """The settings by model, of those that have any; None where a file of PEFT has none beside it.

    PEFT keeps them in adapter_config.json beside the file, diffusers in the file's metadata: those of a pipeline begin
    with "unet." or "text_encoder.", those that a UNet has saved alone with nothing.

    Raises:
        TunerFileError: if they cannot be read, or say that the base's own weights were changed.
    """
    where, found = path.with_name("adapter_config.json"), {}
    try:
        if is_peft:
            found = dict.fromkeys(models, json.loads(where.read_text(encoding="utf-8")))
        elif text := tuner_file.read_metadata(path).get("lora_adapter_metadata"):
            where, settings = f"{path}: its metadata lora_adapter_metadata", json.loads(text)
            for model in models:
                own = {k.removeprefix(f"{model}."): v for k, v in settings.items() if k.startswith(f"{model}.")}
                found[model] = own or settings
            found = {model: config for model, config in found.items() if _ALPHA[kind] in config}
        for config in found.values():
            scale_of(config, kind, "", 1)
            if str(config.get("init_lora_weights")).lower().startswith(_CHANGE_THE_BASE):
                raise TunerFileError(
                    f"{path} is a LoRA that was started by {config['init_lora_weights']}, which changes the weights of "
                    "the base, too, so it is of no use beside an unchanged base; save it again with PEFT's "
                    "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
                )
    except FileNotFoundError:
        return None
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        ArithmeticError,
        re.error,
    ) as error:
        if isinstance(error, TunerFileError):
            raise
        raise TunerFileError(
            f"{where} cannot be used ({type(error).__name__}: {error}); it holds the alpha of the {kind}"
        ) from error
    return found


def scale_of(config: dict, kind: str, layer: str, rank: int) -> float:
    """By how much the product of a layer's matrices is multiplied, alpha / rank.

    Args:
        layer: its path in the model.
        rank: that of a LoRA's matrices; a LoHa or LoKr has it in its settings, as its matrices may be stored whole.
    """
    alpha = _pick(config.get("alpha_pattern"), layer, config[_ALPHA[kind]])
    if not abs(alpha) <= MAX_ALPHA:
        raise ValueError(f"its alpha is {alpha:g}; expected a number near the rank, at most {MAX_ALPHA:,}")
    if _ALPHA[kind] == "alpha":
        rank = _pick(config.get("rank_pattern"), layer, config["r"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _pick(patterns: dict | None, layer: str, default) -> float:
    """The value of the first pattern at the end of the layer's path, as PEFT reads them."""
    found = (value for end, value in dict(patterns or {}).items() if re.match(rf"(.*\.)?({end})$", layer))
    return float(next(found, default))
