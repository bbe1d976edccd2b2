"""Algorithm 1 of arXiv 2312.16916, written a second time, and the counts of its tables."""

import copy
import json
import math
from dataclasses import FrozenInstanceError, asdict

import pytest
import torch
from diffusers.models.attention_processor import Attention
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import sdtune
from sdtune.adapters import inject
from sdtune.kernels.cpu import attention as cpu_attention
from sdtune.tuners import LowRankConvolution, ResAttnLayer
from sdtune.tuners import attention as tuner_attention
from sdtune.tuners.base import Context, Widths
from sdtune.tuners.config import BASELINES, KINDS, LORAS, build_tuner, fields_of


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


def published(rank, num_heads, dim):
    return example(rank=rank, num_heads=num_heads, dim=dim, tokens=16, qkv_bias=False, double=False, seed=0)


@settings(deadline=None, max_examples=25, derandomize=True)
@published(2, 4, 96)
@published(4, 4, 96)
@published(8, 4, 160)
@published(8, 8, 320)
@published(3, 5, 32)
@given(
    rank=st.integers(1, 18), num_heads=st.integers(1, 8), dim=st.integers(1, 40), tokens=st.integers(1, 30),
    qkv_bias=st.booleans(), double=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_res_attn_is_algorithm_1_number_by_number_with_its_gradients(
    rank, num_heads, dim, tokens, qkv_bias, double, seed
):
    torch.manual_seed(seed)
    tuner = sdtune.ResAttn(dim, rank, num_heads, qkv_bias)
    for p in tuner.parameters():
        torch.nn.init.normal_(p, std=dim**-0.5)
    x, aim = torch.randn(2, 2, tokens, dim)
    truth = copy.deepcopy(tuner).double()
    args = (truth.qkv.weight, truth.qkv.bias, truth.o.weight, truth.o.bias, rank, num_heads)
    theirs = algorithm_1(x.double().requires_grad_(), *args)
    gradients = torch.autograd.grad((theirs * aim.double()).sum(), list(truth.parameters()))

    if double:
        tuner, x, aim = tuner.double(), x.double(), aim.double()
    tolerance = dict(atol=1e-10, rtol=1e-10) if double else dict(atol=1e-4, rtol=1e-4)
    x.requires_grad_()
    ours = tuner(x)
    torch.testing.assert_close(ours.double(), theirs, **tolerance)
    for mine, theirs in zip(torch.autograd.grad((ours * aim).sum(), list(tuner.parameters())), gradients):
        torch.testing.assert_close(mine.double(), theirs, **tolerance)


def test_the_gradient_at_the_input_is_that_of_algorithm_1_too():
    tuner = sdtune.ResAttn(12, 3, 2, qkv_bias=True).double()
    torch.nn.init.normal_(tuner.o.weight)
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    aim = torch.randn(2, 7, 12, dtype=torch.float64)
    args = (tuner.qkv.weight, tuner.qkv.bias, tuner.o.weight, tuner.o.bias, 3, 2)
    ours, theirs = (torch.autograd.grad((f * aim).sum(), x)[0] for f in (tuner(x), algorithm_1(x, *args)))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_a_fresh_tuner_has_the_papers_names_and_initialisation_and_gives_zero(qkv_bias):
    torch.manual_seed(0)
    tuner = sdtune.ResAttn(320, qkv_bias=qkv_bias)
    shapes = {n: tuple(p.shape) for n, p in tuner.named_parameters()}
    bias = {"qkv.bias": (48,)} if qkv_bias else {}
    assert shapes == {"qkv.weight": (48, 320), **bias, "o.weight": (320, 16), "o.bias": (320,)}
    bound = 320**-0.5  # of Kaiming-uniform with a = sqrt 5
    weight = tuner.qkv.weight.detach()
    assert 0.99 * bound < weight.abs().max() <= bound and weight.std() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert not tuner.o.weight.any() and not tuner.o.bias.any() and not (qkv_bias and tuner.qkv.bias.any())
    assert not tuner(torch.randn(2, 9, 320)).any()


@settings(deadline=None, max_examples=30, derandomize=True)
@given(dim=st.integers(1, 2000), rank=st.integers(1, 32), num_heads=st.integers(1, 16))
def test_a_tuner_has_4_dim_rank_heads_and_dim_parameters(dim, rank, num_heads):
    with torch.device("meta"):
        tuner = sdtune.ResAttn(dim, rank, num_heads)
    assert sum(p.numel() for p in tuner.parameters()) == 4 * dim * rank * num_heads + dim


@pytest.mark.parametrize(("rank", "num_heads"), [(4, 4), (2, 4), (8, 4), (8, 8), (3, 5), (17, 2)])
def test_the_scores_are_never_materialised_on_the_cpu(rank, num_heads, monkeypatch):
    """No tensor of forward or backward comes near N x N; wide heads are left to PyTorch's fused kernel for the CPU."""
    monkeypatch.setenv("SDTUNE_KERNELS", "on")  # also where the rest of the suite runs without kernels
    tokens, largest, kernels = 4096, 0, set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                largest = max(largest, t.numel() if isinstance(t, torch.Tensor) else 0)
            if "attention" in func.__name__:
                kernels.add(func.__name__.split(".")[0])
            return out

    tuner, x = sdtune.ResAttn(16, rank, num_heads), torch.randn(1, tokens, 16, requires_grad=True)
    with Watch():
        tuner(x).sum().backward()
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    assert kernels == ({flash, f"{flash}_backward"} if rank > cpu_attention.MAX_HEAD_DIM else set())
    assert largest <= tokens * 3 * num_heads * (rank + 15)
    assert largest < tokens * tokens / 4


def test_dropout_acts_only_while_training():
    x = torch.randn(1, 8, 16)
    for drop in (dict(attn_drop=0.5), dict(proj_drop=0.5)):
        tuner = sdtune.ResAttn(16, **drop)
        torch.nn.init.normal_(tuner.o.weight)
        assert not torch.equal(tuner(x), tuner(x))
        tuner.eval()
        plain = sdtune.ResAttn(16).eval()
        plain.load_state_dict(tuner.state_dict())
        assert torch.equal(tuner(x), plain(x))


@pytest.mark.parametrize(
    ("rank", "heads", "one", "two", "three"),
    [
        (2, 4, 411_840, 823_680, 1_235_520),
        (4, 4, 811_200, 1_622_400, 2_433_600),
        (8, 4, 1_609_920, 3_219_840, 4_829_760),
        (8, 8, 3_207_360, 6_414_720, 9_622_080),
    ],
)
def test_parameter_counts_on_the_shape_of_sd_v1_5(sd15_unet, rank, heads, one, two, three):
    for ops, count in ((["attn1"], one), (["attn1", "attn2"], two), (["attn1", "attn2", "ff"], three)):
        shapes = inject.expected_shapes(sd15_unet, sdtune.TunerConfig(rank=rank, num_heads=heads, ops=ops))
        assert sum(math.prod(s) for s in shapes.values()) == count
        assert len(shapes) == 16 * len(ops) * 3


def test_what_is_hung_on_sd_v1_5_by_default_has_2433600_parameters_beside_the_bases(sd15_unet):
    unet = copy.deepcopy(sd15_unet)
    base = sum(p.numel() for p in unet.parameters())
    sdtune.add_tuner(unet)
    assert base == 859_520_964 and sum(p.numel() for p in unet.parameters()) - base == 2_433_600


def test_every_wrong_field_of_a_configuration_is_told_at_once():
    with pytest.raises(ValueError) as error:
        sdtune.TunerConfig("magic", 0, 2.5, ["attn1", "attn3"], "yes", 1.0, float("nan"), 0, "more")
    for words in ("length is 0; ", "ffn_kind is 'more'; possible: res_attn, ",
                  "'magic'; possible: res_attn", "rank is 0; ", "num_heads is 2.5; ", "ops is ['attn1', 'attn3']; ",
                  "qkv_bias is 'yes'; ", "attn_drop is 1.0; ", "proj_drop is nan; "):  # fmt: skip
        assert words in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": ["res_attn"]}, {"kind": None}, {"rank": True}, {"rank": 1025}, {"rank": "4"}, {"num_heads": -1},
        {"ops": []}, {"ops": 5}, {"ops": ["ff", "ff"]}, {"ops": [["ff"]]}, {"ops": {"ff": 1}},
        {"qkv_bias": 1}, {"attn_drop": -0.1}, {"attn_drop": "0"}, {"proj_drop": None},
        {"length": 0}, {"length": 10.0}, {"length": None}, {"ffn_kind": ""}, {"ffn_kind": ["res_attn"]},
        {"ffn_kind": "lora"},
    ],
)  # fmt: skip
def test_a_wrong_value_of_any_type_is_a_value_error_that_names_it(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match="this tuner configuration cannot be used") as error:
        sdtune.TunerConfig(**wrong)
    assert f"{name} is {value!r}" in str(error.value)


def test_a_configuration_survives_json_and_does_not_change():
    config = sdtune.TunerConfig(rank=3, num_heads=5, ops=("ff", "block"), qkv_bias=True, attn_drop=0.1)
    assert sdtune.TunerConfig(**json.loads(json.dumps(asdict(config)))) == config
    assert sdtune.TunerConfig(ops="block").ops == ["block"]
    with pytest.raises(FrozenInstanceError):
        config.rank = 4


# --- the zoo ---


def stirred(tuner):
    for p in tuner.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return tuner.double()


@pytest.fixture
def attn():
    """A frozen cross-attention, 3 heads of width 4, queries of width 10 and a context of width 7."""
    torch.manual_seed(0)
    return Attention(10, cross_attention_dim=7, heads=3, dim_head=4).double().requires_grad_(False)


def attention(q, k, v, heads):
    """Written out: q (N, inner), k and v (M, inner) -> the result (N, inner) and the sums of exp(scores) (heads, N)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
    scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).exp()
    return (scores @ v / scores.sum(-1, keepdim=True)).transpose(0, 1).flatten(1), scores.sum(-1)


def test_res_prefix_is_the_prefixs_part_of_the_identity_with_lambda(attn):
    """Attn(Q, [K_pre; K], [V_pre; V]) = (1 - λ) Attn(Q, K, V) + λ Attn(Q, K_pre, V_pre), λ per query and head."""
    tuner = stirred(KINDS["res_prefix"](12, length=5))
    x, context = torch.randn(8, 10, dtype=torch.float64), torch.randn(6, 7, dtype=torch.float64)
    q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
    both, _ = attention(q, torch.cat([tuner.k_pre, k]), torch.cat([tuner.v_pre, v]), 3)
    _, of_k = attention(q, k, v, 3)
    _, of_prefix = attention(q, tuner.k_pre, tuner.v_pre, 3)
    share = (of_prefix / (of_k + of_prefix)).T.repeat_interleave(4, 1)  # λ, for each channel of its head
    assert share.min() > 0.05 and share.max() < 0.95

    out = attn.to_out[0]
    assert out.bias.any()
    out.weight.data = torch.eye(12, dtype=torch.float64)[:10]  # W_o lets ten channels through as they are
    frozen = attn(x[None], context[None])[0] - out.bias
    prefix = tuner(x[None], Context(attn))[0]  # the bias of W_o is not in it
    torch.testing.assert_close((1 - share[:, :10]) * frozen + share[:, :10] * prefix, both[:, :10])


def test_res_prefix_and_res_prompt_go_through_the_frozen_projections_and_count_the_bias_once(attn):
    x, weight = torch.randn(2, 8, 10, dtype=torch.float64), attn.to_out[0].weight
    prefix = stirred(KINDS["res_prefix"](12, length=5))
    prompt = stirred(KINDS["res_prompt"](10, 7, length=5))
    p = prompt.prompt
    for i in range(2):
        by_hand = attention(attn.to_q(x[i]), prefix.k_pre, prefix.v_pre, 3)[0] @ weight.T
        torch.testing.assert_close(prefix(x, Context(attn))[i], by_hand)
        by_hand = attention(attn.to_q(x[i]), p @ attn.to_k.weight.T, p @ attn.to_v.weight.T, 3)[0] @ weight.T
        torch.testing.assert_close(prompt(x, Context(attn))[i], by_hand * prompt.gate)


def test_res_adapter_is_a_bottleneck_with_gelu_and_no_shortcut():
    tuner = stirred(KINDS["res_adapter"](6, length=3))
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    hidden = x @ tuner.down.weight.T + tuner.down.bias
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    torch.testing.assert_close(tuner(x), hidden @ tuner.up.weight.T + tuner.up.bias)


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_res_attn_text_is_algorithm_1_with_keys_and_values_of_the_text_or_of_x(qkv_bias):
    x, text = torch.randn(2, 9, 6, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    tuner = stirred(KINDS["res_attn_text"](6, 7, 3, 2, qkv_bias))
    for i in range(2):
        k, v = tuner.kv(text[i]).chunk(2, -1)
        torch.testing.assert_close(tuner(x, Context(text=text))[i], tuner.o(attention(tuner.q(x[i]), k, v, 2)[0]))
    alone, plain = stirred(KINDS["res_attn_text"](6, 6, 3, 2, qkv_bias)), sdtune.ResAttn(6, 3, 2, qkv_bias).double()
    joined = {n.replace("kv.", "qkv."): torch.cat([getattr(alone.q, n.removeprefix("kv.")), p])
              for n, p in alone.kv.named_parameters(prefix="kv")}  # fmt: skip
    plain.load_state_dict(joined | {f"o.{n}": p for n, p in alone.o.named_parameters()})
    torch.testing.assert_close(alone(x), plain(x))


def test_res_attn_conv_adds_the_values_to_the_attention_before_o_and_is_a_low_rank_convolution_beside_one():
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    tuner, plain = stirred(KINDS["res_attn_conv"](6, 3, 2)), sdtune.ResAttn(6, 3, 2).double()
    plain.load_state_dict(tuner.state_dict())
    values = tuner.qkv(x)[..., 12:]
    activated = values * (1 + torch.erf(values / 2**0.5)) / 2
    torch.testing.assert_close(tuner(x), plain(x) + activated @ tuner.o.weight.T)

    for layer in (torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.Conv2d(3, 5, 1), torch.nn.Conv2d(3, 5, 3, 2, 1)):
        tuner, x = LowRankConvolution(layer, 2), torch.randn(2, 3, 8, 8)
        assert not tuner(x).any() and tuner(x).shape == layer(x).shape
        torch.nn.init.normal_(tuner.o.weight)
        product = torch.einsum("or,rikl->oikl", tuner.o.weight[..., 0, 0], tuner.conv.weight)
        expected = torch.nn.functional.conv2d(x, product, None, layer.stride, layer.padding)
        torch.testing.assert_close(tuner(x), expected, atol=1e-5, rtol=1e-5)


def test_only_kinds_with_a_form_for_convolutions_can_be_on_conv():
    assert sdtune.TunerConfig("res_attn_conv").ops == ["attn1", "attn2", "ff", "conv"]
    assert sdtune.TunerConfig("res_attn_conv", ops=["ff"]).ops == ["ff"]
    for kind in ("res_attn", "res_adapter"):
        with pytest.raises(ValueError, match="only lora, dora, res_attn_conv, lokr can be on conv"):
            sdtune.TunerConfig(kind, ops=["conv"])


@pytest.mark.parametrize(("rank", "num_heads"), [(3, 1), (3, 2), (2, 4)])
def test_res_attn_layer_is_a_lora_that_also_attends_where_a_result_is_made(rank, num_heads):
    x, layer = torch.randn(2, 9, 6, dtype=torch.float64), torch.nn.Linear(6, 5)
    for makes_result in (False, True):
        tuner = ResAttnLayer(layer, makes_result, rank, num_heads).double()
        torch.nn.init.normal_(tuner.o.weight)
        assert (tuner.qkv is None) == tuner.per_token == (not makes_result)
        torch.testing.assert_close(tuner(x), x @ tuner.down.weight.T @ tuner.o.weight.T)  # v is zero at the start
    torch.nn.init.normal_(tuner.qkv)
    z = (x @ tuner.down.weight.T).unflatten(2, (num_heads, rank))
    q, k, v = ((z.transpose(1, 2) @ part).transpose(1, 2).flatten(2) for part in tuner.qkv.chunk(3, -1))
    expected = torch.stack([attention(q[i], k[i], v[i], num_heads)[0] for i in range(2)])
    torch.testing.assert_close(tuner(x), (z.flatten(2) + expected) @ tuner.o.weight.T)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_tuner_of_each_kind_gives_exactly_zero_and_starts_alike_from_a_seed(kind, attn):
    x, text = torch.randn(2, 8, 10), torch.randn(2, 5, 7)
    config, widths, same = sdtune.TunerConfig(kind), Widths(10, 12, 7, 7), []
    for dtype in (torch.float32, torch.float32, torch.float16, torch.bfloat16):
        torch.manual_seed(0)
        tuner = build_tuner(config, "attn2", widths, torch.nn.Linear(10, 10)).to(dtype)
        result = tuner(x.to(dtype), Context(attn.to(dtype), text.to(dtype)))
        assert result.shape == x.shape and result.dtype == dtype and not result.any()
        same.append(torch.cat([p.detach().flatten().float() for p in tuner.parameters()]))
    assert torch.equal(same[0], same[1]) and same[0].any()
    assert tuner.state_dict().keys() == dict(tuner.named_parameters()).keys()  # nothing frozen in it


@pytest.mark.parametrize(
    ("kind", "attn1", "attn2", "ff", "block"),
    [
        ("res_attn", 811_200, 811_200, 811_200, 811_200),
        ("res_attn_text", 811_200, 805_056, 811_200, 805_056),
        ("res_attn_conv", 811_200, 811_200, 811_200, 811_200),
        ("res_adapter", 262_240, 262_240, 262_240, 262_240),
        ("res_prefix", 249_600, 249_600, 249_600, 249_600),
        ("res_prompt", 137_280, 135_360, 137_280, 137_280),
    ],
)
def test_parameter_counts_of_each_kind_on_the_shape_of_sd_v1_5(sd15_unet, kind, attn1, attn2, ff, block):
    def count(**fields):
        return sum(map(math.prod, inject.expected_shapes(sd15_unet, sdtune.TunerConfig(**fields)).values()))

    assert [count(kind=kind, ops=[op]) for op in ("attn1", "attn2", "ff", "block")] == [attn1, attn2, ff, block]
    assert count(kind=kind, ops=["attn1", "attn2", "ff"]) == attn1 + attn2 + ff
    assert count(kind=kind) == attn1 + attn2 + ff + (2_296_320 if kind == "res_attn_conv" else 0)
    assert (
        count(kind=kind, ops=["attn1", "attn2", "ff"], ffn_kind="res_adapter", length=32)
        == count(kind=kind, ops=["attn1", "attn2"], length=32) + 811_712
    )


def test_parameter_counts_of_res_attn_layer_on_the_shape_of_sd_v1_5(sd15_unet):
    def count(ops):
        config = sdtune.TunerConfig("res_attn_layer", ops=ops)
        return sum(map(math.prod, inject.expected_shapes(sd15_unet, config).values()))

    widths, attends = [320] * 5 + [640] * 5 + [1280] * 6, 3 * 4**2 * 4
    attn1 = sum(16 * 8 * d + attends for d in widths)
    attn2 = sum(16 * (2 * 2 * d + 2 * (768 + d)) + attends for d in widths)
    ff = sum(16 * (d + 8 * d + 4 * d + d) + attends for d in widths)
    assert [count([op]) for op in ("attn1", "attn2", "ff")] == [attn1, attn2, ff]
    assert count(None) == attn1 + attn2 + ff == 5_993_472


def test_the_fields_that_matter_to_a_kind_are_known():
    attention = ["ops", "rank", "num_heads", "qkv_bias", "attn_drop", "proj_drop"]
    assert all(fields_of(kind) == ["ops", "rank"] for kind in LORAS) and fields_of("full") == []
    assert fields_of("res_attn") == fields_of("res_attn_text") == fields_of("res_attn_conv") == attention
    assert fields_of("res_attn_layer") == [field for field in attention if field != "qkv_bias"]
    assert all(fields_of(f"res_{kind}") == ["ops", "length", "proj_drop"] for kind in ("adapter", "prefix", "prompt"))


def test_a_second_kind_needs_a_feed_forward_and_baselines_stay_by_themselves():
    config = sdtune.TunerConfig("res_prefix", ops=["attn1", "ff"], ffn_kind="res_attn_text")
    assert sdtune.TunerConfig(**json.loads(json.dumps(asdict(config)))) == config
    for kind in LORAS:
        assert sdtune.TunerConfig(kind, ops=["ff"]).kind == kind
        with pytest.raises(ValueError, match=f"a {kind} can be on attn1, attn2, ff, conv, not on the whole block"):
            sdtune.TunerConfig(kind, ops=["block"])
    with pytest.raises(ValueError, match="a res_attn_layer can be on attn1, attn2, ff, not on the whole block"):
        sdtune.TunerConfig("res_attn_layer", ops=["block"])
    with pytest.raises(ValueError, match=r"ops is \['ff'\]; full fine-tuning changes every layer"):
        sdtune.TunerConfig("full", ops=["ff"])
    for kind in BASELINES:
        with pytest.raises(ValueError, match=f"ffn_kind is 'res_attn'; a {kind} cannot be combined"):
            sdtune.TunerConfig(kind, ffn_kind="res_attn")
    with pytest.raises(ValueError, match=r"ffn_kind is 'res_adapter', but ops is \['attn1', 'block'\], without ff"):
        sdtune.TunerConfig(ops=["attn1", "block"], ffn_kind="res_adapter")


def test_dropout_of_each_kinds_result_acts_only_while_training(attn):
    x = torch.randn(2, 8, 10, dtype=torch.float64)
    for kind in KINDS:
        layer = torch.nn.Linear(10, 10)
        tuner = stirred(build_tuner(sdtune.TunerConfig(kind, proj_drop=0.5), "attn1", Widths(10, 12, 7, 10), layer))
        result = tuner(x, Context(attn))
        assert 0.2 < (result == 0).double().mean() < 0.8
        tuner.eval()
        assert tuner(x, Context(attn)).all() and torch.equal(tuner(x, Context(attn)), tuner(x, Context(attn)))


@pytest.mark.parametrize("kind", ["res_attn", "res_attn_text"])
@pytest.mark.parametrize("rank", [3, 4, 8])
def test_heads_widened_for_cuda_give_the_same(kind, rank, monkeypatch):
    torch.manual_seed(0)
    tuner = build_tuner(sdtune.TunerConfig(kind=kind, rank=rank), "attn1", Widths(32, 32, 32, 32))
    torch.nn.init.normal_(tuner.o.weight)
    x = torch.randn(2, 9, 32)
    plain = tuner(x)
    monkeypatch.setitem(tuner_attention._HEAD_MULTIPLE, "cpu", 8)
    assert torch.allclose(tuner(x), plain, atol=1e-6)
