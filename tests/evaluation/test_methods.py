"""Methods at matched numbers of parameters."""

import pytest

from sdtune.evaluation import methods


def test_methods_have_the_parameters_of_res_attn_as_nearly_as_whole_numbers_allow(base, sd15_unet):
    assert methods.parameter_count(sd15_unet, methods.methods(sd15_unet)["res_attn"]) == 2_433_600
    for unet in (base.unet, sd15_unet):
        every = methods.methods(unet)
        assert set(every) >= {name for group in methods.GROUPS.values() for name in group}
        target = methods.parameter_count(unet, every["res_attn"])
        assert methods.parameter_count(unet, every["full"]) == unet.num_parameters()
        for name in {*methods.GROUPS["paper"], *methods.GROUPS["baselines"], *methods.GROUPS["dual"]} - {"full"}:
            assert methods.parameter_count(unet, every[name]) == pytest.approx(target, rel=0.1), name
