"""Starts a run from the tuner of an earlier one, at the same rank or a greater one.

A tuner that grows computes at first what it computed before: what is new in it starts as in a fresh tuner, and its
way to the result is zero.
"""

import math
from dataclasses import replace

import torch

from ..adapters import tuner_file
from ..adapters.tuner_file import TunerFile
from ..tuners.config import LORAS, RES_ATTN_LAYER, TunerConfig
from .errors import TrainError

GROWING = ("res_attn", "res_attn_conv", RES_ATTN_LAYER, *LORAS)  # the kinds whose rank can grow


def load_initial_weights(path: str, config: TunerConfig, weights: dict[str, torch.Tensor]) -> None:
    """Copies the weights of a tuner file into those of a fresh tuner.

    Args:
        config: of the fresh tuner.
        weights: its weights by their keys in a file; they are changed in place.

    Raises:
        TunerFileError: if the file cannot be used, or is of a base of another shape.
        TrainError: if the tuner is of another kind, or cannot grow to this size.
    """
    file = tuner_file.load(path)
    _check_config(path, file.config, config)
    expected = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    if file.config.rank != config.rank or file.config.num_heads != config.num_heads:
        _check_keys(path, file, expected)
        for key, tensor in weights.items():
            if config.kind == RES_ATTN_LAYER:
                grow = _grow_res_attn_layer
            else:
                grow = _grow_lora if config.kind in LORAS or tensor.ndim == 4 else _grow_res_attn
            grow(tensor, file.tensors[key].to(tensor), key, file.config, config)
        return
    tuner_file.check_fits(file, expected, path)
    for key, tensor in weights.items():
        tensor.copy_(file.tensors[key])


def _check_config(path: str, old: TunerConfig, new: TunerConfig) -> None:
    can_grow = new.kind in GROWING and not new.ffn_kind
    kept = replace(old, attn_drop=new.attn_drop, proj_drop=new.proj_drop)
    if can_grow and old.rank <= new.rank and old.num_heads <= new.num_heads:
        kept = replace(kept, rank=new.rank, num_heads=new.num_heads)
    differences = [
        f"{name} is {getattr(new, name)!r} and was {getattr(old, name)!r}"
        for name in vars(new)
        if getattr(new, name) != getattr(kept, name)
    ]
    if differences:
        raise TrainError(
            f"--init {path} holds a tuner of another shape: {'; '.join(differences)}. Leave these settings out to keep "
            f"those of the file; only the rank and the heads of {', '.join(GROWING)} can be greater"
        )


def _check_keys(path: str, file: TunerFile, expected: dict[str, tuple[int, ...]]) -> None:
    """Raises TunerFileError where a tensor is missing, or its sides that do not grow are others."""
    if file.tensors.keys() != expected.keys():
        tuner_file.check_fits(file, expected, path)
    for key, shape in expected.items():
        found = tuple(file.tensors[key].shape)
        if len(found) != len(shape) or any(a > b for a, b in zip(found, shape)):
            tuner_file.check_fits(file, expected, path)


def _grow_lora(fresh: torch.Tensor, old: torch.Tensor, key: str, _old, _new) -> None:
    """A gets new rows, at random as in a fresh LoRA, and B new columns of zero; a magnitude stays.

    `conv` and `o` beside a convolution are as A and B.
    """
    if ".lora_A." in key or key.endswith(".conv.weight"):
        fresh[: len(old)] = old
    elif ".lora_B." in key or key.endswith(".o.weight"):
        fresh.zero_()
        fresh[:, : old.shape[1]] = old
    else:
        fresh.copy_(old)


def _grow_res_attn(fresh: torch.Tensor, old: torch.Tensor, key: str, was: TunerConfig, now: TunerConfig) -> None:
    """New widths of a head have queries of zero, so that its attention stays, and all that is new has zeros in `o`.

    The queries grow by sqrt(new rank / old rank), since attention divides by the root of the rank.
    """
    heads, rank = was.num_heads, was.rank
    if ".qkv." in f".{key}":
        new = fresh.view(3, now.num_heads, now.rank, -1)  # a view of the weight, or of the bias with a last side of 1
        parts = old.view(3, heads, rank, -1)
        new[0, :heads] = 0
        new[0, :heads, :rank] = parts[0] * math.sqrt(now.rank / rank)
        new[1:, :heads, :rank] = parts[1:]
    elif key.endswith("o.weight"):
        fresh.zero_()
        fresh.view(len(fresh), now.num_heads, now.rank)[:, :heads, :rank] = old.view(len(old), heads, rank)
    else:
        fresh.copy_(old)


def _grow_res_attn_layer(fresh: torch.Tensor, old: torch.Tensor, key: str, was: TunerConfig, now: TunerConfig) -> None:
    """As `_grow_res_attn`; new channels of `down` also give nothing to the old widths of q, k and v."""
    heads, rank = was.num_heads, was.rank
    if key.endswith("down.weight"):
        new = fresh.view(now.num_heads, now.rank, -1)
        new[:heads, :rank] = old.view(heads, rank, -1)
    elif key.endswith("qkv"):
        new, parts = fresh.view(now.num_heads, now.rank, 3, now.rank), old.view(heads, rank, 3, rank)
        new[:heads, :, 0] = 0
        new[:heads, :, :, :rank] = 0
        new[:heads, :rank, :, :rank] = parts
        new[:heads, :rank, 0, :rank] *= math.sqrt(now.rank / rank)
    else:
        _grow_res_attn(fresh, old, key, was, now)
