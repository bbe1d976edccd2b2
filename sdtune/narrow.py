"""Softmax attention of heads a few numbers wide, on a CPU.

A Res-Attn tuner's heads are as wide as its rank: 4. PyTorch's kernel leaves the products of attention to a matrix
library, which is made for more columns than that; here they share one loop with the exponential between them, in
machine code that Numba makes when it is first needed (seconds, once on a machine: it is kept on disk). The gradient is
that of FlashAttention: scores are computed again from the logarithm of each row's sum.

Importing this imports Numba; so import it where there is something to compute on a CPU.
"""

import math
import threading

import numba
import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba.extending import intrinsic
from torch.autograd.function import once_differentiable

WIDEST = 8  # heads that this is for
FEWEST = 2**16  # scores: for fewer, PyTorch's kernel is done before this one is called
BLOCK = 64  # rows that a thread takes at a time


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale * q @ k.T) @ v for q (B, H, N, R) and k, v (B, H, M, R) on a CPU: (B, H, N, R), in q's dtype.

    Where PyTorch's `scaled_dot_product_attention` is as fast it is that, elsewhere the same but for rounding, in fp32.
    Each row is computed by one thread in a fixed order, so nothing depends on the number of threads.
    """
    scores = q[..., 0].numel() * k.shape[2]
    if q.shape[-1] > WIDEST or scores < FEWEST or q.dtype == torch.float64:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return _Attention.apply(q, k, v, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale):
        result, sums = _empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32)
        _call(_forward, scale, q, k, v, result, sums)
        ctx.save_for_backward(q, k, v, result, sums)
        ctx.scale = scale
        return result.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        q, k, v, result, sums = ctx.saved_tensors
        found = [_empty_like(x) for x in (q, k, v)]
        _call(_backward, ctx.scale, q, k, v, result, sums, gradient, *found)
        return *(g.to(x.dtype) for g, x in zip(found, (q, k, v))), None


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    """(B, H, N, R) in fp32 that lies as (B, N, H, R), which is how the linear layers before and behind want it."""
    return torch.empty(x.transpose(1, 2).shape, dtype=torch.float32).transpose(1, 2)


_alone = threading.Lock()  # without OpenMP Numba ends the process when two threads call it at once


def _call(loops, scale: float, *tensors: torch.Tensor) -> None:
    width = (0,) * tensors[0].shape[-1]  # a tuple, since its length is known when the loops are compiled
    threads = torch.get_num_threads()
    with _alone:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        torch.set_num_threads(threads)  # the first call starts Numba's threads, and with OpenMP's number sets PyTorch's
        loops(width, np.float32(scale), *(x.detach().float().numpy() for x in tensors))


# ----------------------------------------------------------------------------------------------- compiled by Numba
# Scores are in units of log 2. Sums may be reordered, or they would not be vectorised; but nan and inf stay what they
# are. Nothing is allocated for a single row, since threads wait for one another there.

_HOW = dict(fastmath={"reassoc", "contract", "arcp", "nsz"})
_inner = numba.njit(inline="always", **_HOW)


def _outer(function):
    try:
        return numba.njit(parallel=True, nogil=True, cache=True, **_HOW)(function)
    except RuntimeError:  # no folder where it could be kept
        return numba.njit(parallel=True, nogil=True, **_HOW)(function)


_fp32 = np.float32
_LOG2_E, _LOG_2, _LEAST, _HALF, _SAFE = (_fp32(n) for n in (math.log2(math.e), math.log(2), -126, 0.5, 30))
# 2**x from -0.5 to 0.5: the Taylor series, whose next term is below half a unit in the last place
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = (_fp32(math.log(2) ** n / math.factorial(n)) for n in range(7))


@intrinsic
def _two_to(typing, n):
    """2**n of a whole fp32 n from -126 to 127, by its bits."""

    def code(context, builder, signature, arguments):
        bits = ir.IntType(32)
        exponent = builder.add(builder.fptosi(arguments[0], bits), ir.Constant(bits, 127))
        return builder.bitcast(builder.shl(exponent, ir.Constant(bits, 23)), ir.FloatType())

    return numba.float32(numba.float32), code


@_inner
def _exp2(x):
    x = _LEAST if x < _LEAST else x
    n = np.floor(x + _HALF)
    f = x - n
    return ((((((_C6 * f + _C5) * f + _C4) * f + _C3) * f + _C2) * f + _C1) * f + _C0) * _two_to(n)


@_inner
def _dot(a, b):
    total = _fp32(0)
    for j in range(len(a)):
        total += a[j] * b[j]
    return total


@_inner
def _product(row, columns, j, rank):
    """Of a row (rank,) and column j of (rank, N)."""
    total = _fp32(0)
    for r in range(rank):
        total += row[r] * columns[r, j]
    return total


@_outer
def _columns(x, factor):
    """(B, H, N, R) -> (B, H, R, N), contiguous and multiplied: what the inner loops run along."""
    batch, heads, count, width = x.shape
    found = np.empty((batch, heads, width, count), np.float32)
    for head in numba.prange(batch * heads):
        b, h = head // heads, head % heads
        for r in range(width):
            for i in range(count):
                found[b, h, r, i] = x[b, h, i, r] * factor
    return found


@_inner
def _blocks(count):
    return (count + BLOCK - 1) // BLOCK


@_inner
def _place(task, heads, count):
    """Of a block of rows: the batch's element, the head, the first row and the one after the last."""
    head, first = task // _blocks(count), np.int64(task % _blocks(count)) * BLOCK
    return head // heads, head % heads, first, min(first + BLOCK, count)


@_outer
def _forward(width, scale, q, k, v, result, sums):
    """Fills the result (B, H, N, R), and sums (B, H, N): log2 of each row's sum of exponentials."""
    batch, heads, count, _ = q.shape
    keys, values, rank, scale = _columns(k, _fp32(1)), _columns(v, _fp32(1)), len(width), scale * _LOG2_E
    for task in numba.prange(batch * heads * _blocks(count)):
        b, h, first, last = _place(task, heads, count)
        kh, vh = keys[b, h], values[b, h]
        qi, p, longest = np.empty(rank, np.float32), np.empty(kh.shape[1], np.float32), _fp32(0)
        for j in range(len(p)):
            length = _fp32(0)
            for r in range(rank):
                length += kh[r, j] * kh[r, j]
            longest = max(longest, length)
        for i in range(first, last):
            for r in range(rank):
                qi[r] = q[b, h, i, r] * scale
            top = np.sqrt(_dot(qi, qi) * longest)  # no score is above it (Cauchy, Schwarz)
            if not top <= _SAFE:  # too far above them for exp2, maybe
                top = -_fp32(np.inf)
                for j in range(len(p)):
                    top = max(top, _product(qi, kh, j, rank))
            total = _fp32(0)
            for j in range(len(p)):
                p[j] = _exp2(_product(qi, kh, j, rank) - top)
                total += p[j]
            for r in range(rank):
                result[b, h, i, r] = _dot(p, vh[r]) / total
            sums[b, h, i] = top + np.log2(total)


@_outer
def _backward(width, scale, q, k, v, result, sums, gradient, of_q, of_k, of_v):
    """Fills the gradients of q, k and v from that of the result."""
    batch, heads, count, _ = q.shape
    to_log2, along, rank = scale * _LOG2_E, np.empty(sums.shape, np.float32), len(width)
    queries, keys = _columns(q, to_log2), _columns(k, _fp32(1))
    gradients, values = _columns(gradient, _fp32(1)), _columns(v, _fp32(1))
    for task in numba.prange(batch * heads * _blocks(count)):
        b, h, first, last = _place(task, heads, count)
        kh, vh, of_score = keys[b, h], values[b, h], np.empty(k.shape[2], np.float32)
        qi, di = np.empty(rank, np.float32), np.empty(rank, np.float32)
        for i in range(first, last):
            product, total = _fp32(0), sums[b, h, i]
            for r in range(rank):
                qi[r], di[r] = q[b, h, i, r] * to_log2, gradient[b, h, i, r]
                product += di[r] * result[b, h, i, r]
            along[b, h, i] = product
            for j in range(len(of_score)):
                of_score[j] = _exp2(_product(qi, kh, j, rank) - total) * (_product(di, vh, j, rank) - product)
            for r in range(rank):
                of_q[b, h, i, r] = _dot(of_score, kh[r]) * scale
    for task in numba.prange(batch * heads * _blocks(k.shape[2])):
        b, h, first, last = _place(task, heads, k.shape[2])
        qh, dh, sh, ah = queries[b, h], gradients[b, h], sums[b, h], along[b, h]
        kj, vj = np.empty(rank, np.float32), np.empty(rank, np.float32)
        p, of_score = np.empty(count, np.float32), np.empty(count, np.float32)
        for j in range(first, last):
            for r in range(rank):
                kj[r], vj[r] = k[b, h, j, r], v[b, h, j, r]
            for i in range(count):
                p[i] = _exp2(_product(kj, qh, i, rank) - sh[i])
                of_score[i] = p[i] * (_product(vj, dh, i, rank) - ah[i])
            for r in range(rank):
                of_k[b, h, j, r] = _dot(of_score, qh[r]) * _LOG_2
                of_v[b, h, j, r] = _dot(p, dh[r])
