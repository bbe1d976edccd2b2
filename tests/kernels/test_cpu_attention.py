"""That the attention of narrow heads on a CPU is attention, gradients included, whatever it is given."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sdtune
from sdtune.kernels.cpu import attention


@pytest.fixture(autouse=True)
def however_few(monkeypatch):
    monkeypatch.setattr(attention, "MIN_SCORES", 0)


def heads(batch: int, count: int, rank: int, seed: int, size: float = 1.0, number: int = 3) -> list[torch.Tensor]:
    """(B, 2, N, R) each, as the tuner's one linear layer leaves them."""
    together = size * torch.randn(batch, count, number, 2, rank, generator=torch.Generator().manual_seed(seed))
    return list(together.permute(2, 0, 3, 1, 4).unbind(0))


def attend(q, k, v, scale):
    """As the tuners choose: the kernel where it is faster, PyTorch's attention elsewhere."""
    if attention.is_faster(q, k):
        return attention.attention(q, k, v, scale)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def with_gradients(function, inputs, aim, scale: float) -> list[torch.Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    result = function(*inputs, scale=scale)
    return [result.detach(), *torch.autograd.grad(result, inputs, aim.to(result.dtype))]


@settings(deadline=None, max_examples=40, derandomize=True)
@example(batch=1, count=1, others=1, rank=4, size=1.0, seed=0)
@example(batch=2, count=65, others=64, rank=4, size=0.0, seed=0)
@example(batch=1, count=130, others=77, rank=4, size=30.0, seed=0)  # one key has all the weight
@given(
    batch=st.integers(1, 3), count=st.integers(1, 200), others=st.integers(1, 200), rank=st.sampled_from([3, 4]),
    size=st.sampled_from([1e-3, 0.3, 1.0, 3.0, 10.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_it_rounds_no_worse_than_pytorch_s_kernel(batch, count, others, rank, size, seed):
    q, aim = heads(batch, count, rank, seed, size, 2)
    k, v = heads(batch, others, rank, seed + 1, size, 2)
    inputs, scale = (q, k, v), rank**-0.5
    truth = with_gradients(F.scaled_dot_product_attention, [x.double() for x in inputs], aim.double(), scale)
    theirs = with_gradients(F.scaled_dot_product_attention, inputs, aim, scale)
    ours = with_gradients(attend, inputs, aim, scale)
    largest = 1.45 * scale * (q @ k.transpose(-1, -2)).abs().max()  # a score, in units of log 2
    of_q, of_k, of_v, of_aim = (x.abs().max().item() for x in (q, k, v, aim))
    terms = (of_v, of_aim * of_v * of_k, of_aim * of_v * of_q, of_aim)  # of the sums, which may cancel each other
    for exact, their, own, term in zip(truth, theirs, ours, terms):
        assert own.shape == exact.shape and own.dtype == torch.float32
        rounding = torch.finfo(torch.float32).eps * (4 + largest) * max(exact.abs().max(), term)
        assert (own - exact).abs().max() <= 2 * (their - exact).abs().max() + rounding


def test_a_tuner_s_result_and_gradients_are_the_same_with_and_without_it(monkeypatch):
    torch.manual_seed(0)
    tuner, x = sdtune.ResAttn(32), torch.randn(2, 200, 32)
    torch.nn.init.normal_(tuner.o.weight)

    def found() -> list[torch.Tensor]:
        result = tuner(x)
        return [result, *torch.autograd.grad(result.square().sum(), list(tuner.parameters()))]

    own = found()
    monkeypatch.setattr(attention, "MIN_SCORES", 2**60)
    plain = found()
    assert not torch.equal(own[0], plain[0])  # it was used
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item()) for a, b in zip(own, plain))


def test_nothing_depends_on_the_number_of_threads_which_stays_what_it_is():
    *inputs, aim = heads(2, 300, 4, 0, number=4)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(with_gradients(attend, inputs, aim, 0.5))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    q, k, v = heads(1, 70, 4, 0)
    q, v = q.clone(), v.clone()
    q[0, 0, 5, 1] = bad
    spoilt = ~attend(q, k, v, 0.5).isfinite().all(-1)
    assert spoilt[0, 0, 5] and spoilt.sum() == 1
    v[0, 1, 9, 2] = bad
    assert not attend(q, k, v, 0.5)[0, 1, :, 2].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_come_back_as_they_came(dtype):
    *inputs, aim = (x.to(dtype) for x in heads(1, 80, 4, 0, number=4))
    truth = with_gradients(F.scaled_dot_product_attention, [x.double() for x in inputs], aim.double(), 0.5)
    for own, exact in zip(with_gradients(attend, inputs, aim, 0.5), truth):
        assert own.dtype == dtype
        assert (own - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_the_scores_take_no_memory():
    code = """if True:
        import resource, torch
        from sdtune.kernels.cpu import attention
        def peak(tokens):
            q = torch.randn(1, tokens, 1, 4).transpose(1, 2).requires_grad_()
            attention.attention(q, q, q, 0.5).sum().backward()
            return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak(512)  # compiles
        print(peak(16384) - before)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert int(done.stdout) < 16384**2 * 4 / 16, done.stderr


def test_it_works_in_many_threads_at_once_and_where_nothing_can_be_kept_on_disk():
    code = """if True:
        import threading, torch
        import numba.core.caching as caching
        caching.FunctionCache._impl_class._locator_classes = []
        from sdtune.kernels.cpu import attention
        attention.MIN_SCORES = 0
        q, found = torch.randn(1, 4, 100, 4).transpose(1, 2), []
        draw = lambda: found.append(attention.attention(q, q, q, 0.5))
        threads = [threading.Thread(target=draw) for _ in range(4)]
        [t.start() for t in threads], [t.join() for t in threads]
        print(len(found), all(torch.equal(found[0], f) for f in found))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["4", "True"], done.stderr
