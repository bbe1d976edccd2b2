"""Softmax attention of heads at most 8 numbers wide on a CPU, compiled by Numba.

The heads of Res-Attn are as wide as its rank, 4. PyTorch's kernel calls a matrix library for the products, which is
inefficient for so few columns; here products and exponential are computed in one loop. The gradient is that of
FlashAttention: scores are recomputed from the logarithm of each row's sum.
"""

import math

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.cpython.unsafe.tuple import tuple_setitem
from numba.extending import intrinsic
from torch.autograd.function import once_differentiable

from .numba_threads import (
    fp32,
    is_available,
    jit_entry,
    jit_in_order,
    jit_inline,
    jit_thread,
    run,
    run_on_threads,
    thread_range,
)

MAX_HEAD_DIM = 8  # wider heads are faster with PyTorch's kernel
MIN_SCORES = 2**16  # with fewer scores, PyTorch's kernel is faster than the call of this one
ROW_BLOCK = 64  # rows that a thread computes at a time


def is_faster(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether `attention` is faster than PyTorch's for q (B, H, N, R) and k (B, H, M, R)."""
    scores = q[..., 0].numel() * k.shape[2]
    return is_available() and q.shape[-1] <= MAX_HEAD_DIM and scores >= MIN_SCORES and q.dtype != torch.float64


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale * q @ k.T) @ v for q (B, H, N, R) and k, v (B, H, M, R) on a CPU: (B, H, N, R), in q's dtype.

    Computed in fp32. Each row is computed by one thread in a fixed order, so the result does not depend on the number
    of threads.
    """
    return _Attention.apply(q, k, v, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale):
        result, sums = _empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32)
        run(_forward, _zeros(q), scale, q.float(), *map(_transposed, (k, v)), result, sums)
        ctx.save_for_backward(q, k, v, result, sums)
        ctx.scale = scale
        return result.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        q, k, v, result, sums = ctx.saved_tensors
        found = [_empty_like(x) for x in (q, k, v)]
        columns = tuple(map(_transposed, (q, k, v, gradient)))
        taken = (q.float(), k.float(), v.float(), columns, result, sums, gradient.float())
        run(_backward, _zeros(q), ctx.scale, *taken, *found)
        return *(g.to(x.dtype) for g, x in zip(found, (q, k, v))), None


def _zeros(x: torch.Tensor) -> tuple[float, ...]:
    """A tuple of zeros as long as a head is wide; the length of a tuple is known when the loops are compiled."""
    return (0.0,) * x.shape[-1]


def _transposed(x: torch.Tensor) -> torch.Tensor:
    """(B, H, N, R) -> (B, H, R, N) in fp32, contiguous."""
    return x.detach().float().mT.contiguous()


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    """(B, H, N, R) in fp32 with the memory order (B, N, H, R) of the linear layers before and after."""
    return torch.empty(x.transpose(1, 2).shape, dtype=torch.float32).transpose(1, 2)


# ----------------------------------------------------------------------------------------------- compiled by Numba
# Scores are in units of log 2.

_LOG2_E, _MIN_EXPONENT, _MAX_BOUND = (fp32(n) for n in (math.log2(math.e), -126, 30))
_WHOLE = fp32(1.5 * 2**23)  # adding this rounds a number to an integer, which is then in the last bits
# 2**x from -0.5 to 0.5, interpolated at Chebyshev's nodes: the error is at most 0.7 units in the last place
_FIT = np.polynomial.Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5]).convert(kind=np.polynomial.Polynomial)
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = map(fp32, _FIT.coef)


@intrinsic
def _times_power_of_two(typing, p, whole):
    """p * 2**n by their bits, for an integer n from -126 to 127 that was added to `_WHOLE`."""

    def code(context, builder, signature, arguments):
        bits = ir.IntType(32)
        p, whole = (builder.bitcast(argument, bits) for argument in arguments)
        return builder.bitcast(builder.add(p, builder.shl(whole, ir.Constant(bits, 23))), ir.FloatType())

    return types.float32(types.float32, types.float32), code


@jit_in_order
def _exp2(x):
    x = _MIN_EXPONENT if x < _MIN_EXPONENT else x
    whole = x + _WHOLE
    f = x - (whole - _WHOLE)
    return _times_power_of_two((((((_C6 * f + _C5) * f + _C4) * f + _C3) * f + _C2) * f + _C1) * f + _C0, whole)


@jit_inline
def _dot(row, columns, j):
    """The dot product of a row, a tuple, with column j of (rank, N)."""
    total = fp32(0)
    for r in range(len(row)):
        total += row[r] * columns[r, j]
    return total


@jit_inline
def _scaled_row(zeros, rows, i, scale):
    """Row i of (N, rank) times scale, as a tuple, which stays in registers."""
    for r in range(len(zeros)):
        zeros = tuple_setitem(zeros, r, rows[i, r] * scale)
    return zeros


@jit_inline
def _add_scaled(totals, factor, columns, j):
    """totals, a tuple, plus factor times column j of (rank, N)."""
    for r in range(len(totals)):
        totals = tuple_setitem(totals, r, totals[r] + factor * columns[r, j])
    return totals


@jit_inline
def _store_row(to, i, row, scale):
    for r in range(len(row)):
        to[i, r] = row[r] * scale


@jit_inline
def _block_position(task, heads, count):
    """The batch index, head, first row and end row of a block of rows."""
    head, first = task // _num_blocks(count), task % _num_blocks(count) * ROW_BLOCK
    return head // heads, head % heads, first, min(first + ROW_BLOCK, count)


@jit_inline
def _num_blocks(count):
    return (count + ROW_BLOCK - 1) // ROW_BLOCK


@jit_thread
def _forward_part(part, parts, zeros, scale, q, keys, values, result, sums):
    """Fills the result (B, H, N, R), and sums (B, H, N): log2 of each row's sum of exponentials.

    Keys and values are transposed, (B, H, R, M), so that the inner loops run along contiguous memory.
    """
    batch, heads, count, _ = q.shape
    others, scale = keys.shape[3], scale * _LOG2_E
    for task in thread_range(part, parts, batch * heads * _num_blocks(count)):
        b, h, first, last = _block_position(task, heads, count)
        kh, vh, longest = keys[b, h], values[b, h], fp32(0)
        for j in range(others):
            length = fp32(0)
            for r in range(len(zeros)):
                length += kh[r, j] * kh[r, j]
            longest = max(longest, length)
        for i in range(first, last):
            qi, length = _scaled_row(zeros, q[b, h], i, scale), fp32(0)
            for r in range(len(zeros)):
                length += qi[r] * qi[r]
            top = np.sqrt(length * longest)  # an upper bound of the scores (Cauchy-Schwarz)
            if not top <= _MAX_BOUND:  # the bound may be too far above the scores for exp2
                top = -fp32(np.inf)
                for j in range(others):
                    top = max(top, _dot(qi, kh, j))
            total, weighted = fp32(0), zeros
            for j in range(others):
                p = _exp2(_dot(qi, kh, j) - top)
                total += p
                weighted = _add_scaled(weighted, p, vh, j)
            _store_row(result[b, h], i, weighted, fp32(1) / total)
            sums[b, h, i] = top + np.log2(total)


@jit_entry
def _forward(threads, *arguments):
    run_on_threads(_forward_part, threads, arguments)


@jit_thread
def _backward_q_part(part, parts, zeros, scale, q, keys, values, result, sums, gradient, along, of_q):
    """Fills the gradient of q, and `along` (B, H, N), the dot products of the result with its gradient."""
    batch, heads, count, _ = q.shape
    to_log2 = scale * _LOG2_E
    for task in thread_range(part, parts, batch * heads * _num_blocks(count)):
        b, h, first, last = _block_position(task, heads, count)
        kh, vh = keys[b, h], values[b, h]
        for i in range(first, last):
            qi, di = _scaled_row(zeros, q[b, h], i, to_log2), _scaled_row(zeros, gradient[b, h], i, fp32(1))
            product, total, of_qi = fp32(0), sums[b, h, i], zeros
            for r in range(len(zeros)):
                product += di[r] * result[b, h, i, r]
            along[b, h, i] = product
            for j in range(keys.shape[3]):
                of_score = _exp2(_dot(qi, kh, j) - total) * (_dot(di, vh, j) - product)
                of_qi = _add_scaled(of_qi, of_score, kh, j)
            _store_row(of_q[b, h], i, of_qi, scale)


@jit_thread
def _backward_kv_part(part, parts, zeros, scale, queries, k, v, sums, gradients, along, of_k, of_v):
    """Fills the gradients of k and v; queries and gradients are transposed, (B, H, R, N)."""
    batch, heads, others, _ = k.shape
    to_log2 = scale * _LOG2_E
    for task in thread_range(part, parts, batch * heads * _num_blocks(others)):
        b, h, first, last = _block_position(task, heads, others)
        qh, dh, sh, ah = queries[b, h], gradients[b, h], sums[b, h], along[b, h]
        for j in range(first, last):
            kj, vj = _scaled_row(zeros, k[b, h], j, to_log2), _scaled_row(zeros, v[b, h], j, fp32(1))
            of_kj, of_vj = zeros, zeros
            for i in range(queries.shape[3]):
                p = _exp2(_dot(kj, qh, i) - sh[i])
                of_kj = _add_scaled(of_kj, p * (_dot(vj, dh, i) - ah[i]), qh, i)
                of_vj = _add_scaled(of_vj, p, dh, i)
            _store_row(of_k[b, h], j, of_kj, scale)
            _store_row(of_v[b, h], j, of_vj, fp32(1))


@jit_entry
def _backward(threads, zeros, scale, q, k, v, columns, result, sums, gradient, of_q, of_k, of_v):
    """Fills the gradients of q, k and v from that of the result; `columns` has q, k, v and it transposed."""
    queries, keys, values, gradients = columns
    along = np.empty(sums.shape, np.float32)
    run_on_threads(_backward_q_part, threads, (zeros, scale, q, keys, values, result, sums, gradient, along, of_q))
    run_on_threads(_backward_kv_part, threads, (zeros, scale, queries, k, v, sums, gradients, along, of_k, of_v))
