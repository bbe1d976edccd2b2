"""The methods that the evaluation compares, at matched numbers of parameters."""

from functools import partial

from ..adapters.matching import match_parameters
from ..tuners.config import TunerConfig

GROUPS = {
    "paper": ["res_attn", "res_adapter", "res_prefix", "res_prompt"],
    "baselines": ["lora", "lora_ff", "lora_conv", "dora", "full"],
    "forms": ["res_attn", "res_attn_values", "res_adapter", "res_attn_layer", "low_rank_conv", "res_attn_conv",
              "lora_ff", "lora_conv", "dora_ff"],
    "half": ["res_attn_layer_half", "lora_ff_half", "2x4", "res_attn_conv_half", "lora_conv_half", "lokr_conv"],
    "fourfold": ["res_attn_layer_fourfold", "lora_ff_fourfold", "8x8", "res_attn_conv_fourfold", "lora_conv_fourfold"],
    "dual": ["res_attn", "dual", "dual_swapped"],
    "training": ["res_attn", "no_dropout", "preserve", "prodigy", "ema"],
    "start": ["res_attn_layer", "res_attn_layer_random", "lora_ff_gradient", "lora_ff"],
    "ablation": ["res_attn", "2x4", "8x4", "8x8", "mha", "ffn", "block"],
}  # fmt: skip


# Settings of the trainer that a method has beside its tuner. `preserve` keeps the base for the empty caption alone, as
# the tasks have no trigger words; without caption dropout, which would train that caption on pictures: as `no_dropout`.
TRAINING = {
    "no_dropout": {"caption_dropout": 0.0},
    "preserve": {"caption_dropout": 0.0, "preserve": 1.0},
    "prodigy": {"optimizer": "prodigy"},
    "ema": {"ema_decay": 0.99},
    "res_attn_layer_random": {"gradient_start": False},
    "lora_ff_gradient": {"gradient_start": True},
}


class EvaluationError(RuntimeError):
    """The evaluation cannot start; the message names what was found and what to do."""


def methods(unet) -> dict[str, TunerConfig]:
    """Every method by its name, for this UNet.

    All have about the parameter count of Res-Attn with rank 4 and 4 heads on attn1, attn2 and ff, as nearly as a whole
    rank or length allows; but full fine-tuning trains all parameters, and in the ablation rank x heads, or the
    operations, are as the name says; those of the groups half and fourfold have about as many as 2x4 and 8x8. LoKr's
    parameters do not grow evenly with its rank, so it has a fixed rank: half of Res-Attn's size on the small base.
    """
    matched = partial(match_parameters, unet)
    half = partial(matched, "rank", target=TunerConfig(rank=2))
    fourfold = partial(matched, "rank", target=TunerConfig(rank=8, num_heads=8))
    attention = ["attn1", "attn2"]
    with_conv = [*attention, "ff", "conv"]
    layer, lora_ff = matched("rank", kind="res_attn_layer", num_heads=1), matched("rank", kind="lora")
    return {
        "res_attn": TunerConfig(),
        "res_attn_text": matched("rank", kind="res_attn_text"),
        "res_attn_conv": matched("rank", kind="res_attn_conv"),
        "res_attn_values": TunerConfig(kind="res_attn_conv", ops=[*attention, "ff"]),
        "low_rank_conv": matched("rank", kind="res_attn_conv", ops=["conv"]),
        "res_attn_layer": layer,
        "res_attn_layer_random": layer,
        "res_adapter": matched("length", kind="res_adapter"),
        "res_prefix": matched("length", kind="res_prefix"),
        "res_prompt": matched("length", kind="res_prompt"),
        "dual": matched("length", kind="res_attn", ffn_kind="res_adapter"),
        "dual_swapped": matched("length", kind="res_adapter", ffn_kind="res_attn"),
        "lora": matched("rank", kind="lora", ops=attention),
        "lora_ff": lora_ff,
        "lora_ff_gradient": lora_ff,
        "lora_conv": matched("rank", kind="lora", ops=with_conv),
        "dora": matched("rank", kind="dora", ops=attention),
        "dora_ff": matched("rank", kind="dora"),
        "dora_conv": matched("rank", kind="dora", ops=with_conv),
        "lokr_conv": TunerConfig(kind="lokr", rank=8, ops=with_conv),
        "res_attn_layer_half": half(kind="res_attn_layer", num_heads=1),
        "res_attn_layer_fourfold": fourfold(kind="res_attn_layer"),
        "lora_ff_half": half(kind="lora"),
        "lora_ff_fourfold": fourfold(kind="lora"),
        "res_attn_conv_half": half(kind="res_attn_conv"),
        "res_attn_conv_fourfold": fourfold(kind="res_attn_conv"),
        "lora_conv_half": half(kind="lora", ops=with_conv),
        "lora_conv_fourfold": fourfold(kind="lora", ops=with_conv),
        "full": TunerConfig(kind="full"),
        **{name: TunerConfig() for name in GROUPS["training"]},
        "2x4": TunerConfig(rank=2),
        "8x4": TunerConfig(rank=8),
        "8x8": TunerConfig(rank=8, num_heads=8),
        "mha": TunerConfig(ops=attention),
        "ffn": TunerConfig(ops=["ff"]),
        "block": TunerConfig(ops=["block"]),
    }
