"""A weight per sample: each sample of a batch is as if it had been drawn alone."""

import pytest
import torch
from conftest import stir
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from unets import batch

import sdtune
from sdtune.adapters import active_adapters, hook, per_sample

CELLS = {"one": [1.0, 0.0, 0.7, 0.0], "two": [0.0, 0.0, -0.5, 0.0], "lora": [0.0, 0.0, 0.3, 2.0]}
TARGETS = ["to_q", "to_out.0", "ff.net.2", "conv1", "time_emb_proj"]  # tokens, pictures and plain vectors


@pytest.fixture
def mixed(unet):
    """Two tuners and a LoRA, of which "one" is active."""
    torch.manual_seed(0)
    lora = LoraConfig(r=3, lora_alpha=6, use_rslora=True, target_modules=TARGETS, init_lora_weights=False)
    unet.add_adapter(lora, "lora")
    sdtune.add_tuner(unet, sdtune.TunerConfig(ops=["attn1", "block"]), "two")
    sdtune.add_tuner(unet, adapter_name="one")
    stir(unet, "two", 1)
    stir(unet, "one", 2)
    unet.set_adapters(["lora", "two"], [0.7, 0.2])
    unet.set_adapters("one")
    return unet.eval()


def adapter_state(unet):
    layers = [m for m in unet.modules() if isinstance(m, BaseTunerLayer)]
    scales = [dict(m.weights if isinstance(m, hook.ParallelTuners) else m.scaling) for m in layers]
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in unet.modules()]
    trainable = [p.requires_grad for p in unet.parameters()]
    return [(m.active_adapters, m.disable_adapters, m.__dict__.keys()) for m in layers], scales, hooks, trainable


def one_by_one(unet, inputs, **kwargs):
    """Every sample of the batch by itself, under diffusers' own set_adapters."""
    x, t, text = inputs
    rows = []
    for i in range(len(x)):
        unet.enable_adapters()
        unet.set_adapters(list(CELLS), [w[i % 4] for w in CELLS.values()])
        with torch.no_grad():
            rows.append(unet(x[i : i + 1], t, text[i : i + 1], **kwargs).sample)
    return torch.cat(rows)


@pytest.mark.parametrize("copies", [1, 2])
def test_with_a_weight_per_sample_each_sample_is_as_if_drawn_alone(mixed, copies):
    inputs, before = batch(copies), adapter_state(mixed)
    assert per_sample.can_share_a_pass(mixed, list(CELLS)) and per_sample.can_share_a_pass(mixed, ["elsewhere"])
    with per_sample.per_sample_weights(mixed, CELLS, repeat=copies), torch.no_grad():
        together = mixed(*inputs).sample
        assert torch.equal(mixed(*inputs).sample, together)  # a pass leaves nothing behind
        scaled = mixed(*inputs, cross_attention_kwargs={"scale": 0.4}).sample
        off = mixed(*inputs, cross_attention_kwargs={"scale": 0.0}).sample
        assert torch.equal(mixed(*inputs).sample, together)
    assert adapter_state(mixed) == before
    torch.testing.assert_close(together, one_by_one(mixed, inputs), atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(
        scaled, one_by_one(mixed, inputs, cross_attention_kwargs={"scale": 0.4}), atol=2e-4, rtol=1e-3
    )
    mixed.disable_adapters()
    with torch.no_grad():
        base = mixed(*inputs).sample
    torch.testing.assert_close(off, base, atol=2e-4, rtol=1e-3)
    assert torch.allclose(together[1], base[1], atol=2e-4)  # no weights, no change
    assert not torch.allclose(together[0], base[0], atol=1e-2) and not torch.allclose(together[3], base[3], atol=1e-2)


def test_samples_of_weight_zero_are_not_computed_and_stay_bit_identical(unet):
    sdtune.add_tuner(unet, sdtune.TunerConfig(ops=["ff"]), "new")
    stir(unet, "new", 0)
    plain = batch(1)
    seen = []
    tuner = next(m for m in unet.modules() if isinstance(m, sdtune.ResAttn))
    tuner.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    with torch.no_grad():
        with active_adapters.adapters_disabled(unet):
            base = unet(*plain).sample
        with per_sample.per_sample_weights(unet, {"new": [0, 1, 0, 0.5]}):
            some = unet(*plain).sample
        with per_sample.per_sample_weights(unet, {"new": [0, 0, 0, 0]}):
            none = unet(*plain).sample
    assert seen == [2]
    assert torch.equal(none, base) and torch.equal(some[0::2], base[0::2]) and not torch.equal(some[1], base[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_a_weight_per_sample_costs_no_accuracy(mixed, dtype):
    truth = one_by_one(mixed, batch(1))
    mixed.to(dtype)
    with per_sample.per_sample_weights(mixed, CELLS), torch.no_grad():
        together = mixed(*batch(1, dtype)).sample
    assert together.dtype == dtype
    far, alone = ((t.float() - truth).norm() for t in (together, one_by_one(mixed, batch(1, dtype))))
    assert far < 1.5 * alone


def test_weights_per_sample_are_undone_after_an_error_also_one_within_a_layer(mixed):
    mixed.set_adapters(["one", "lora"], [0.5, 0.25])
    mixed.disable_adapters()
    before = adapter_state(mixed)
    three = {n: w[:3] for n, w in CELLS.items()}
    with pytest.raises(ValueError, match="a batch of 4 samples"), per_sample.per_sample_weights(mixed, three):
        mixed(*batch(1))
    assert adapter_state(mixed) == before
    layer = mixed.mid_block.attentions[0].transformer_blocks[0].attn2.to_q
    with per_sample.per_sample_weights(mixed, CELLS), torch.no_grad():
        good = mixed(*batch(1)).sample
        with pytest.raises(RuntimeError):
            layer(torch.zeros(4, 1, 3))
        assert torch.equal(mixed(*batch(1)).sample, good)
    assert adapter_state(mixed) == before


def test_what_cannot_have_a_weight_per_sample_is_told_and_nothing_changes(mixed):
    mixed.add_adapter(LoraConfig(r=2, use_dora=True, target_modules=["to_v"]), "dora")
    before = adapter_state(mixed)
    for weights, words in (
        ({"one": [1, 0], "dora": [1, 0]}, "adapter 'dora' is a DoraLinearVariant"),
        ({"none": [1]}, "no layer of this UNet has an adapter named 'none'"),
        ({"one": [1, 0], "two": [1]}, "as many weights as there are samples"),
        ({"one": []}, "as many weights as there are samples"),
    ):
        with pytest.raises(ValueError, match=words), per_sample.per_sample_weights(mixed, weights):
            pass
    assert not per_sample.can_share_a_pass(mixed, ["one", "dora"]) and per_sample.can_share_a_pass(
        mixed, ["one", "lora"]
    )
    assert adapter_state(mixed) == before
    mixed.fuse_lora(adapter_names=["lora"])
    assert not per_sample.can_share_a_pass(mixed, ["lora"])
