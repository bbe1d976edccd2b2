"""Methods at matched numbers of parameters."""

import dataclasses

import pytest

from sdtune.adapters import matching
from sdtune.evaluation import methods


def test_methods_have_the_parameters_of_res_attn_as_nearly_as_whole_numbers_allow(base, sd15_unet):
    assert matching.count_parameters(sd15_unet, methods.methods(sd15_unet)["res_attn"]) == 2_433_600
    for unet in (base.unet, sd15_unet):
        every = methods.methods(unet)
        assert set(every) >= {name for group in methods.GROUPS.values() for name in group}
        target = matching.count_parameters(unet, every["res_attn"])
        assert matching.count_parameters(unet, every["full"]) == unet.num_parameters()
        sizes = {"": target} | {size: matching.count_parameters(unet, every[name])
                                for size, name in (("_half", "2x4"), ("_fourfold", "8x8"))}  # fmt: skip
        kinds = "lora_conv", "res_attn_conv", "lora_ff", "res_attn_layer"
        for name, wanted in ((kind + size, n) for kind in kinds for size, n in sizes.items()):
            one, two = (matching.count_parameters(unet, dataclasses.replace(every[name], rank=rank)) for rank in (1, 2))
            assert abs(matching.count_parameters(unet, every[name]) - wanted) <= (two - one) / 2, name
        names = {*methods.GROUPS["paper"], *methods.GROUPS["baselines"], *methods.GROUPS["dual"], "res_attn_layer"}
        for name in names - {"full", "lora_conv"}:
            assert matching.count_parameters(unet, every[name]) == pytest.approx(target, rel=0.1), name
