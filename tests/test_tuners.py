"""Algorithm 1 of arXiv 2312.16916, written a second time, and the counts of its tables."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import sdtune
from sdtune import attach, bases


def algorithm_1(x, qkv_weight, qkv_bias, o_weight, o_bias, rank, num_heads):
    """Head by head, with the N x N scores written out."""
    projected = x @ qkv_weight.T + (0 if qkv_bias is None else qkv_bias)
    heads = []
    for head in range(num_heads):
        q, k, v = (projected[..., (part * num_heads + head) * rank :][..., :rank] for part in range(3))
        scores = q @ k.transpose(-1, -2) / math.sqrt(rank)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(weights @ v)
    return torch.cat(heads, -1) @ o_weight.T + o_bias


@settings(deadline=None, max_examples=25)
@given(
    rank=st.integers(1, 18), num_heads=st.integers(1, 8), dim=st.integers(1, 40), tokens=st.integers(1, 30),
    qkv_bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_res_attn_is_algorithm_1_number_by_number_with_its_gradients(rank, num_heads, dim, tokens, qkv_bias, seed):
    torch.manual_seed(seed)
    tuner = sdtune.ResAttn(dim, rank, num_heads, qkv_bias).double()
    for p in tuner.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(2, tokens, dim, dtype=torch.float64, requires_grad=True)
    args = (tuner.qkv.weight, tuner.qkv.bias, tuner.o.weight, tuner.o.bias, rank, num_heads)
    ours, theirs = tuner(x), algorithm_1(x, *args)
    torch.testing.assert_close(ours, theirs)
    inputs = [x, *tuner.parameters()]
    aim = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad((ours * aim).sum(), inputs), torch.autograd.grad((theirs * aim).sum(), inputs)):
        torch.testing.assert_close(a, b)


def test_a_fresh_tuner_has_the_papers_names_and_initialisation_and_gives_zero():
    torch.manual_seed(0)
    tuner = sdtune.ResAttn(320)
    assert {n for n, _ in tuner.named_parameters()} == {"qkv.weight", "o.weight", "o.bias"}
    assert tuner.qkv.weight.shape == (48, 320) and tuner.o.weight.shape == (320, 16)
    bound = 320**-0.5  # of Kaiming-uniform with a = sqrt 5
    weight = tuner.qkv.weight.detach()
    assert weight.abs().max() <= bound and weight.std() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert not tuner.o.weight.any() and not tuner.o.bias.any()
    assert not tuner(torch.randn(2, 9, 320)).any()
    assert sum(p.numel() for p in tuner.parameters()) == 4 * 320 * 4 * 4 + 320


def test_the_scores_are_never_materialised():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                largest = max(largest, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    tuner, x = sdtune.ResAttn(32), torch.randn(1, 2048, 32, requires_grad=True)
    with Watch():
        tuner(x).sum().backward()
    assert largest < 2048 * 2048 / 4


def test_dropout_acts_only_while_training():
    tuner = sdtune.ResAttn(16, attn_drop=0.5, proj_drop=0.5)
    torch.nn.init.normal_(tuner.o.weight)
    x = torch.randn(1, 8, 16)
    assert not torch.equal(tuner(x), tuner(x))
    tuner.eval()
    assert torch.equal(tuner(x), tuner(x))


@pytest.mark.parametrize(
    ("rank", "heads", "one", "two", "three"),
    [
        (2, 4, 411_840, 823_680, 1_235_520),
        (4, 4, 811_200, 1_622_400, 2_433_600),
        (8, 4, 1_609_920, 3_219_840, 4_829_760),
        (8, 8, 3_207_360, 6_414_720, 9_622_080),
    ],
)
def test_parameter_counts_on_the_shape_of_sd_v1_5(rank, heads, one, two, three):
    config = json.loads((Path(bases.CONFIGS) / "sd15/unet/config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    for ops, count in ((["attn1"], one), (["attn1", "attn2"], two), (["attn1", "attn2", "ff"], three)):
        shapes = attach.expected_shapes(unet, sdtune.TunerConfig(rank=rank, num_heads=heads, ops=ops))
        assert sum(math.prod(s) for s in shapes.values()) == count


def test_every_wrong_field_of_a_configuration_is_told_at_once():
    with pytest.raises(ValueError) as error:
        sdtune.TunerConfig(kind="magic", rank=0, num_heads=2.5, ops=["attn1", "attn3"], attn_drop=1.0)
    for word in ("'magic'", "rank is 0", "num_heads is 2.5", "attn3", "attn_drop is 1.0"):
        assert word in str(error.value)
    assert sdtune.TunerConfig(ops="block").ops == ["block"]
