"""Softmax attention of heads at most 16 numbers wide on a GPU in half precision, in Triton.

PyTorch's kernels are made for heads of 64 numbers and more; for heads of 4 they need further kernels that pad, cut and
gather. The method is FlashAttention's. The gradient uses no atomic sums, so it is the same in each run.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

LOG2_E = 1.4426950408889634  # exp(x) is exp2(x * LOG2_E)
MAX_HEAD_DIM = 16  # the least width of a matrix product in Triton, to which heads are padded


def attention(scale: float, *projected: torch.Tensor) -> torch.Tensor:
    """softmax(scale * q @ k.T) @ v, computed in fp32: (B, N, H, R).

    Args:
        projected: q, k and v packed as (B, N, 3, H, R), or q (B, N, 1, H, R) and k, v (B, M, 2, H, R).
    """
    return _Attention.apply(scale, *projected)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, *projected):
        q, k, v = parts = _parts(projected)
        batch, rows, heads, width = q.shape
        result = torch.empty_like(q, memory_format=torch.contiguous_format)
        sums = torch.empty(batch, heads, rows, device=q.device, dtype=torch.float32)
        tile = _tile(64, 256 if k.shape[1] >= 4096 else 128, rows, k.shape[1])
        places = [n for x in (*parts, result) for n in _strides(x)]
        _forward[(triton.cdiv(rows, tile["ROWS"]), batch * heads)](
            *parts, result, sums, scale * LOG2_E, rows, k.shape[1], heads, *places, R=width, **tile
        )
        ctx.save_for_backward(result, sums, *projected)
        ctx.scale = scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        result, sums, *projected = ctx.saved_tensors
        gradient = gradient.contiguous()
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in projected]
        parts, found_parts = _parts(projected), _parts(found)
        batch, rows, heads, width = parts[0].shape
        columns = parts[1].shape[1]
        tile = _tile(*((128, 64) if min(rows, columns) >= 4096 else (64, 128)), rows, columns)
        row_parts, column_parts = (triton.cdiv(n, tile["ROWS"]) for n in (rows, columns))
        places = [n for x in (*parts, result, *found_parts) for n in _strides(x)]
        _backward[(row_parts + column_parts, batch * heads)](
            *parts, result, gradient, sums, *found_parts, ctx.scale * LOG2_E, ctx.scale, rows, columns, heads,
            row_parts, *places, R=width, **tile,
        )  # fmt: skip
        return None, *found


def _parts(projected) -> list[torch.Tensor]:
    """q, k and v, each (B, its tokens, H, R)."""
    return [part for x in projected for part in x.unbind(2)]


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(2), x.stride(1)


def _tile(own: int, others: int, rows: int, columns: int) -> dict:
    """The sizes of a program: its own tokens, and the other tokens that it loads at a time."""
    even = all(n % size == 0 for n in (rows, columns) for size in (own, others))
    return dict(ROWS=own, COLUMNS=others, EVEN=even, W=MAX_HEAD_DIM, num_warps=4, num_stages=2)


@triton.jit
def _load(X, first, count, stride, R: tl.constexpr, W: tl.constexpr, TOKENS: tl.constexpr, EVEN: tl.constexpr):
    """Heads of some tokens, (TOKENS, W), zero outside the tensor."""
    at, width = first + tl.arange(0, TOKENS), tl.arange(0, W)
    there = (width < R)[None, :]
    if not EVEN:
        there = there & (at < count)[:, None]
    return tl.load(X + at[:, None] * stride + width[None, :], there, 0.0)


@triton.jit
def _store(X, x, first, count, stride, R: tl.constexpr, W: tl.constexpr, TOKENS: tl.constexpr):
    at, width = first + tl.arange(0, TOKENS), tl.arange(0, W)
    there = (width < R)[None, :] & (at < count)[:, None]
    tl.store(X + at[:, None] * stride + width[None, :], x.to(X.dtype.element_ty), there)


@triton.jit
def _forward(
    Q, K, V, OUT, L, scale2, rows, columns, heads,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on,
    R: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The result, and the logarithm (base 2) of each row's sum."""
    first, b, h = tl.program_id(0) * ROWS, (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    Q, K, V, OUT = Q + b * qb + h * qh, K + b * kb + h * kh, V + b * vb + h * vh, OUT + b * ob + h * oh
    q = _load(Q, first, rows, qn, R, W, ROWS, EVEN)
    most, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, W), tl.float32)
    for j in range(0, columns, COLUMNS):
        k = _load(K, j, columns, kn, R, W, COLUMNS, EVEN)
        v = _load(V, j, columns, vn, R, W, COLUMNS, EVEN)
        scores = tl.dot(q, tl.trans(k))
        if not EVEN:
            scores = tl.where((j + tl.arange(0, COLUMNS) < columns)[None, :], scores, float("-inf"))
        now = tl.maximum(most, tl.max(scores, 1) * scale2)
        p = tl.math.exp2(scores * scale2 - now[:, None])
        shrink = tl.math.exp2(most - now)
        total = total * shrink + tl.sum(p, 1)
        result = tl.dot(p.to(v.dtype), v, result * shrink[:, None])
        most = now
    _store(OUT, result / total[:, None], first, rows, on, R, W, ROWS)
    at = first + tl.arange(0, ROWS)
    tl.store(L + tl.program_id(1) * rows + at, most + tl.math.log2(total), at < rows)


@triton.jit
def _backward(
    Q, K, V, OUT, G, L, DQ, DK, DV, scale2, scale, rows, columns, heads, row_parts,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on, dqb, dqh, dqn, dkb, dkh, dkn, dvb, dvh, dvn,
    R: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The first `row_parts` programs compute the gradient of q for some rows, the others those of k and v."""
    part, b, h = tl.program_id(0), (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    Q, K, V, L = Q + b * qb + h * qh, K + b * kb + h * kh, V + b * vb + h * vh, L + tl.program_id(1) * rows
    OUT, G = OUT + b * ob + h * oh, G + b * ob + h * oh
    if part < row_parts:
        first = part * ROWS
        at = first + tl.arange(0, ROWS)
        q = _load(Q, first, rows, qn, R, W, ROWS, EVEN)
        g = _load(G, first, rows, on, R, W, ROWS, EVEN)
        o = _load(OUT, first, rows, on, R, W, ROWS, EVEN)
        sums = tl.load(L + at, at < rows, 0.0)
        mean = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        dq = tl.zeros((ROWS, W), tl.float32)
        for j in range(0, columns, COLUMNS):
            k = _load(K, j, columns, kn, R, W, COLUMNS, EVEN)
            v = _load(V, j, columns, vn, R, W, COLUMNS, EVEN)
            p = tl.math.exp2(tl.dot(q, tl.trans(k)) * scale2 - sums[:, None])
            if not EVEN:  # the zero score of a masked column may be far above the true ones, and then p is infinite
                p = tl.where((j + tl.arange(0, COLUMNS) < columns)[None, :], p, 0.0)
            ds = p * (tl.dot(g, tl.trans(v)) - mean[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq)
        _store(DQ + b * dqb + h * dqh, dq * scale, first, rows, dqn, R, W, ROWS)
    else:
        first = (part - row_parts) * ROWS
        k = _load(K, first, columns, kn, R, W, ROWS, EVEN)
        v = _load(V, first, columns, vn, R, W, ROWS, EVEN)
        dk, dv = tl.zeros((ROWS, W), tl.float32), tl.zeros((ROWS, W), tl.float32)
        for i in range(0, rows, COLUMNS):
            at = i + tl.arange(0, COLUMNS)
            q = _load(Q, i, rows, qn, R, W, COLUMNS, EVEN)
            g = _load(G, i, rows, on, R, W, COLUMNS, EVEN)
            o = _load(OUT, i, rows, on, R, W, COLUMNS, EVEN)
            sums = tl.load(L + at, at < rows, float("inf"))
            mean = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
            p = tl.math.exp2(tl.dot(k, tl.trans(q)) * scale2 - sums[None, :])
            dv = tl.dot(p.to(g.dtype), g, dv)
            ds = p * (tl.dot(v, tl.trans(g)) - mean[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk)
        _store(DK + b * dkb + h * dkh, dk * scale, first, columns, dkn, R, W, ROWS)
        _store(DV + b * dvb + h * dvh, dv, first, columns, dvn, R, W, ROWS)
