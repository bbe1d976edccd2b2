"""3x3 convolutions on a CPU with a quarter of the multiplications: Winograd's algorithm.

F(4x4, 3x3) of Lavin & Gray (arXiv 1509.09308, section 4.1): a tile of 4x4 results is a polynomial product, which 6x6
products of values at its points give, where 4x4x3x3 were needed. So the convolution becomes 36 matrix products, between
a transform of the input and one of the results. The points are 0, 3/4, -3/4, 3/2, -3/2 and infinity: symmetric, exact
in binary, and near those of the least rounding error (Barabasz et al., arXiv 1803.10986), so that results differ from
PyTorch's by little more than theirs do from exact ones.

The weights are transformed at each call, which costs little, so that nothing has to be stored.
"""

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from .numba_threads import fp32, is_available, jit_entry, jit_inline, jit_thread, run, run_on_threads, thread_range

MIN_TILES = 32  # with fewer, the transform of the weights costs more than it saves
MIN_CHANNELS = 32  # with fewer, the transform of the input costs more than it saves
MAX_COVERED = 1.25  # area of the tiles over that of the picture: beyond, it is as slow as PyTorch's
_MAX_INPUT, _MAX_WEIGHTS = 2**23, 2**23  # elements of the transformed input and weights at a time


def is_faster(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `convolution` is faster than PyTorch's, for contiguous x in fp32 on a CPU with frozen weights."""
    batch, _, height, width = x.shape
    if 16 * _tiles(height) * _tiles(width) > MAX_COVERED * height * width or batch * height * width < 16 * MIN_TILES:
        return False
    return is_available() and min(weight.shape[:2]) >= MIN_CHANNELS


def convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`torch.nn.functional.conv2d(x, weight, bias, padding=1)` where `is_faster`, with a gradient for x alone.

    Only the weights are saved for the gradient.

    Args:
        x: (B, C, H, W) in fp32.
        weight: (K, C, 3, 3).
        bias: (K,).
    """
    return _Convolution.apply(x, weight, bias)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return _convolve(x, weight, bias, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _convolve(gradient.contiguous(), ctx.saved_tensors[0], None, backward=True), None, None


def _tiles(side: int) -> int:
    """How many tiles cover a side; the last may reach beyond it."""
    return -(-side // 4)


def _convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, backward: bool) -> torch.Tensor:
    """The convolution; or its gradient, which is one with flipped weights and swapped channels."""
    batch, channels, height, width = x.shape
    weight = weight.detach().contiguous().flatten(2)
    count = weight.shape[1 if backward else 0]
    bias = torch.zeros(count) if bias is None else bias
    result = torch.empty(batch, count, height, width)
    down, across = _tiles(height), _tiles(width)
    rows = batch * down  # of tiles, with all pictures stacked vertically
    some_rows = max(1, _MAX_INPUT // (36 * channels * across))
    some = max(16, _MAX_WEIGHTS // (36 * channels))
    for row in range(0, rows, some_rows):
        last = min(row + some_rows, rows)
        v = torch.empty(36, channels, (last - row) * across)
        run(_transform_input, x, row, last, v)
        for first in range(0, count, some):
            own = slice(first, first + some)
            part = weight[:, own] if backward else weight[own]
            u = torch.empty(36, *part.shape[:2])
            run(_transform_weights, part, backward, u)
            m = torch.bmm(u.mT if backward else u, v)
            run(_transform_output, m, bias[own], row, last, result[:, own])
    return result


# ----------------------------------------------------------------------------------------------- compiled by Numba
# Inner loops run over lanes, which are tiles or channels. The inputs and outputs of one line of a transform are in
# arrays of fixed size, since only then LLVM knows that they do not overlap.

_LANES = 128
_p, _q = 0.75, 1.5  # the points
_P1, _P2, _P3, _Q1, _Q2, _Q3 = (fp32(point**n) for point in (_p, _q) for n in (1, 2, 3))
_PRODUCT, _SUM = fp32(_p**2 * _q**2), fp32(_p**2 + _q**2)
_G0, _GP, _GQ = (fp32(1 / n) for n in (_p**2 * _q**2, 2 * _p**2 * (_p**2 - _q**2), 2 * _q**2 * (_q**2 - _p**2)))
_ZERO = fp32(0)


@jit_inline
def _input_line(d0, d1, d2, d3, d4, d5):
    """B^T d of a line d of the input."""
    even_p, odd_p, even_q, odd_q = d4 - _Q2 * d2, _P1 * (d3 - _Q2 * d1), d4 - _P2 * d2, _Q1 * (d3 - _P2 * d1)
    first, last = _PRODUCT * d0 - _SUM * d2 + d4, _PRODUCT * d1 - _SUM * d3 + d5
    return first, even_p + odd_p, even_p - odd_p, even_q + odd_q, even_q - odd_q, last


@jit_inline
def _weight_line(g0, g1, g2):
    """G g of a line g of the weights."""
    even_p, odd_p, even_q, odd_q = _GP * (g0 + _P2 * g2), _GP * _P1 * g1, _GQ * (g0 + _Q2 * g2), _GQ * _Q1 * g1
    return _G0 * g0, even_p + odd_p, even_p - odd_p, even_q + odd_q, even_q - odd_q, g2


@jit_inline
def _output_line(m0, m1, m2, m3, m4, m5):
    """A^T m of a line m of products."""
    even_p, odd_p, even_q, odd_q = m1 + m2, m1 - m2, m3 + m4, m3 - m4
    second, third = _P1 * odd_p + _Q1 * odd_q, _P2 * even_p + _Q2 * even_q
    return m0 + even_p + even_q, second, third, _P3 * odd_p + _Q3 * odd_q + m5


@jit_thread
def _transform_weights_part(part, parts, weight, flipped, u):
    """Fills u (36, K, C), the transform of the weights (K, C, 9)."""
    count, channels, _ = weight.shape
    g, t = np.empty((9, _LANES), np.float32), np.empty((36, _LANES), np.float32)
    for k in thread_range(part, parts, count):
        for first in range(0, channels, _LANES):
            lanes = min(_LANES, channels - first)
            own = weight[k, first : first + lanes]
            for c in range(lanes):
                for i in range(9):
                    g[i, c] = own[c, i]
            if flipped:
                for i in range(4):
                    for c in range(lanes):
                        g[i, c], g[8 - i, c] = g[8 - i, c], g[i, c]
            for j in range(3):
                for c in range(lanes):
                    s = _weight_line(g[j, c], g[3 + j, c], g[6 + j, c])
                    t[j, c], t[6 + j, c], t[12 + j, c], t[18 + j, c], t[24 + j, c], t[30 + j, c] = s
            for i in range(0, 36, 6):
                for c in range(lanes):
                    s = _weight_line(t[i, c], t[i + 1, c], t[i + 2, c])
                    t[i, c], t[i + 1, c], t[i + 2, c], t[i + 3, c], t[i + 4, c], t[i + 5, c] = s
            for i in range(36):
                to = u[i, k, first : first + lanes]
                for c in range(lanes):
                    to[c] = t[i, c]


@jit_entry
def _transform_weights(threads, *arguments):
    run_on_threads(_transform_weights_part, threads, arguments)


@jit_thread
def _transform_input_part(part, parts, x, begin, end, v):
    """Fills v (36, C, tiles), the transform of the rows of tiles from begin to end of all pictures x (B, C, H, W)."""
    batch, channels, height, width = x.shape
    down, across, whole = (height + 3) // 4, (width + 3) // 4, width // 4
    tiles, before = (end - begin) * across, across + 1  # before: the row above and one tile
    inside = np.ones((4, tiles), np.bool_)  # whether there is a tile above, below, to the left, to the right
    for i in range(tiles):
        row, column = (begin + i // across) % down, i % across
        inside[0, i], inside[1, i] = row > 0, row < down - 1
        inside[2, i], inside[3, i] = column > 0, column < across - 1
    apart = np.zeros((4, 4, tiles + 2 * before), np.float32)  # x by row and column inside the tile
    t, s = np.empty((6, 6, _LANES), np.float32), np.empty((6, _LANES), np.float32)
    for c in thread_range(part, parts, channels):
        for row in range(max(begin - 1, 0), min(end + 1, batch * down)):
            at = before + (row - begin) * across
            for r in range(min(4, height - 4 * (row % down))):
                line = x[row // down, c, 4 * (row % down) + r]
                for j in range(whole):
                    for column in range(4):
                        apart[r, column, at + j] = line[4 * j + column]
                for column in range(width - 4 * whole):  # what a tile has beyond the picture stays 0
                    apart[r, column, at + whole] = line[4 * whole + column]
        for first in range(0, tiles, _LANES):
            lanes = min(_LANES, tiles - first)
            above, below = inside[0, first : first + lanes], inside[1, first : first + lanes]
            left, right = inside[2, first : first + lanes], inside[3, first : first + lanes]
            for a in range(6):
                column, at = (a + 3) % 4, before + first + (a + 3) // 4 - 1
                x0, x1 = apart[3, column, at - across :], apart[0, column, at:]
                x2, x3, x4 = apart[1, column, at:], apart[2, column, at:], apart[3, column, at:]
                x5 = apart[0, column, at + across :]
                for i in range(lanes):
                    d0, d5 = x0[i] if above[i] else _ZERO, x5[i] if below[i] else _ZERO
                    d = _input_line(d0, x1[i], x2[i], x3[i], x4[i], d5)
                    t[0, a, i], t[1, a, i], t[2, a, i], t[3, a, i], t[4, a, i], t[5, a, i] = d
            for a in range(6):
                for i in range(lanes):
                    d0, d5 = t[a, 0, i] if left[i] else _ZERO, t[a, 5, i] if right[i] else _ZERO
                    d = _input_line(d0, t[a, 1, i], t[a, 2, i], t[a, 3, i], t[a, 4, i], d5)
                    s[0, i], s[1, i], s[2, i], s[3, i], s[4, i], s[5, i] = d
                for b in range(6):
                    to = v[6 * a + b, c, first : first + lanes]
                    for i in range(lanes):
                        to[i] = s[b, i]


@jit_entry
def _transform_input(threads, *arguments):
    run_on_threads(_transform_input_part, threads, arguments)


@jit_thread
def _transform_output_part(part, parts, m, bias, begin, end, result):
    """Fills the rows of tiles from begin to end of the result (B, K, H, W), from the products m (36, K, tiles)."""
    _, count, tiles = m.shape
    height, width = result.shape[2:]
    down, across, whole = (height + 3) // 4, (width + 3) // 4, width // 4
    t, y = np.empty((4, 6, _LANES), np.float32), np.empty((4, 4, tiles), np.float32)
    for k in thread_range(part, parts, count):
        for first in range(0, tiles, _LANES):
            lanes = min(_LANES, tiles - first)
            for b in range(6):
                m0, m1, m2 = m[b, k, first:], m[6 + b, k, first:], m[12 + b, k, first:]
                m3, m4, m5 = m[18 + b, k, first:], m[24 + b, k, first:], m[30 + b, k, first:]
                for i in range(lanes):
                    s = _output_line(m0[i], m1[i], m2[i], m3[i], m4[i], m5[i])
                    t[0, b, i], t[1, b, i], t[2, b, i], t[3, b, i] = s
            for r in range(4):
                y0, y1, y2, y3 = y[r, 0, first:], y[r, 1, first:], y[r, 2, first:], y[r, 3, first:]
                for i in range(lanes):
                    s = _output_line(t[r, 0, i], t[r, 1, i], t[r, 2, i], t[r, 3, i], t[r, 4, i], t[r, 5, i])
                    y0[i], y1[i], y2[i], y3[i] = s[0] + bias[k], s[1] + bias[k], s[2] + bias[k], s[3] + bias[k]
        for row in range(begin, end):
            at = (row - begin) * across
            for r in range(min(4, height - 4 * (row % down))):
                line = result[row // down, k, 4 * (row % down) + r]
                y0, y1, y2, y3 = y[r, 0, at:], y[r, 1, at:], y[r, 2, at:], y[r, 3, at:]
                for j in range(whole):
                    line[4 * j], line[4 * j + 1], line[4 * j + 2], line[4 * j + 3] = y0[j], y1[j], y2[j], y3[j]
                for column in range(width - 4 * whole):
                    line[4 * whole + column] = y[r, column, at + whole]


@jit_entry
def _transform_output(threads, *arguments):
    run_on_threads(_transform_output_part, threads, arguments)
