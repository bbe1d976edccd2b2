"""That the quicker convolution on a CPU is the convolution, gradient included, whatever it is given."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sdtune.kernels.cpu import winograd


def example_of(batch=1, channels=32, count=32, height=24, width=24, seed=0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width, generator=random)
    weight = torch.randn(count, channels, 3, 3, generator=random) / (9 * channels) ** 0.5
    aim = torch.randn(batch, count, height, width, generator=random)
    return x, weight, torch.randn(count, generator=random), aim


def with_gradient(function, x, weight, bias, aim) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    result = function(x, weight, bias)
    return [result.detach(), *torch.autograd.grad(result, x, aim)]


def plain(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=1)


def require_alike(found, args):
    x, weight, bias, aim = args
    truth = with_gradient(plain, *(a.double() for a in args))
    flipped = weight.flip(2, 3).transpose(0, 1)
    sums = plain(x.abs(), weight.abs(), bias.abs()), plain(aim.abs(), flipped.abs(), None)
    for own, exact, terms in zip(found, truth, sums):  # rounding is of the sums of absolute values
        assert own.shape == exact.shape
        assert (own - exact).abs().max() <= 12 * torch.finfo(torch.float32).eps * terms.max()


@settings(deadline=None, max_examples=40, derandomize=True)
@example(batch=1, channels=32, count=32, height=4, width=4, pieces=False, seed=0)
@example(batch=2, channels=130, count=33, height=4, width=560, pieces=False, seed=0)
@example(batch=3, channels=40, count=60, height=12, width=8, pieces=True, seed=0)
@example(batch=3, channels=40, count=60, height=18, width=11, pieces=True, seed=0)  # tiles reach beyond both sides
@given(
    batch=st.integers(1, 3), channels=st.integers(1, 140), count=st.integers(1, 140), height=st.integers(1, 36),
    width=st.integers(1, 36), pieces=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_it_is_the_convolution_and_its_gradient(batch, channels, count, height, width, pieces, seed):
    args = example_of(batch, channels, count, height, width, seed)
    with pytest.MonkeyPatch.context() as patch:
        if pieces:  # as for pictures that are larger than what is held at a time
            patch.setattr(winograd, "_MAX_INPUT", 36 * channels * -(-width // 4) * 2)
            patch.setattr(winograd, "_MAX_WEIGHTS", 36 * channels * 20)
        require_alike(with_gradient(winograd.convolution, *args), args)


def test_its_rounding_is_near_that_of_pytorch_s_own():
    args = example_of(2, 320, 320, 16, 16)
    exact = plain(*(a.double() for a in args[:3]))
    own, theirs = ((f(*args[:3]) - exact).square().mean().sqrt() for f in (winograd.convolution, plain))
    assert own < 5e-6 * exact.square().mean().sqrt() and own < 10 * theirs


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    x, weight, bias, _ = example_of(height=32, width=32)
    x[0, 3, 9, 14] = bad
    spoilt = ~winograd.convolution(x, weight, bias).isfinite()
    assert spoilt[~plain(x, weight, bias).isfinite()].all()
    assert spoilt.sum((2, 3)).max() <= 16 * 9  # no farther than the tiles next to it


def test_nothing_depends_on_the_number_of_threads():
    args, before, found = example_of(2, 64, 64), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(with_gradient(winograd.convolution, *args))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[0], others))
