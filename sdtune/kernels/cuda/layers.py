"""Group norm with SiLU, and GEGLU, of a frozen UNet on a GPU in half precision, in Triton.

`group_norm` is for pictures in channels_last, the order that convolutions need: PyTorch's own kernel copies such a
picture into the other order, and the next convolution copies it back. The SiLU that follows can be part of the kernel,
and then no tensor is saved for it. `geglu` is one kernel where PyTorch needs four, and five for the gradient.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

TILE = 8192  # elements of a group per program
BLOCK = 1024  # results per program in `geglu`


def group_norm(
    x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float, silu: bool = False
) -> torch.Tensor:
    """`F.group_norm` of x (B, C, H, W), followed by `F.silu` if `silu`, equal but for rounding.

    x and the result are in channels_last. Only x has a gradient.
    """
    return _GroupNorm.apply(x, groups, weight, bias, eps, silu)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps, silu):
        result, moments = torch.empty_like(x), _partial(x, groups)
        _launch(_moments, x, groups, x, moments)
        _launch(_normalise, x, groups, x, weight, bias, result, moments, eps, SILU=silu)
        ctx.save_for_backward(x, weight, bias, moments)
        ctx.groups, ctx.eps, ctx.silu = groups, eps, silu
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, bias, moments = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        found, sums = torch.empty_like(x), _partial(x, ctx.groups)
        given = x, weight, bias, gradient
        _launch(_sums, x, ctx.groups, *given, moments, sums, ctx.eps, SILU=ctx.silu)
        _launch(_differentiate, x, ctx.groups, *given, found, moments, sums, ctx.eps, SILU=ctx.silu)
        return found, None, None, None, None, None


def _tile(x: torch.Tensor, groups: int) -> tuple[int, int, int]:
    """The channels of a group, the next power of two of them, and the pixels per program."""
    width = x.shape[1] // groups
    padded = triton.next_power_of_2(width)
    pixels = x.shape[2] * x.shape[3]
    return width, padded, min(triton.next_power_of_2(pixels), max(1, TILE // padded))


def _partial(x: torch.Tensor, groups: int) -> torch.Tensor:
    """An empty tensor for two numbers of each part of each group."""
    parts = triton.cdiv(x.shape[2] * x.shape[3], _tile(x, groups)[2])
    return torch.empty(len(x) * groups, parts, 2, device=x.device, dtype=torch.float32)


def _launch(kernel, x: torch.Tensor, groups: int, *arguments, **constants) -> None:
    pixels, (width, padded, rows) = x.shape[2] * x.shape[3], _tile(x, groups)
    parts = triton.cdiv(pixels, rows)
    sizes = dict(WIDTH=width, PADDED=padded, ROWS=rows, PARTS=triton.next_power_of_2(parts))
    kernel[(parts, len(x) * groups)](*arguments, pixels, groups, **sizes, **constants)


@triton.jit
def _place(pixels, groups, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """The positions of this program's elements in x, a mask of those that exist, and their channels."""
    part, group = tl.program_id(0), tl.program_id(1)
    rows, columns = part * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    channels = group % groups * WIDTH + columns
    first = (group // groups).to(tl.int64) * pixels * groups * WIDTH
    at = first + rows[:, None] * (groups * WIDTH) + channels[None, :]
    return at, (rows < pixels)[:, None] & (columns < WIDTH)[None, :], channels, columns < WIDTH


@triton.jit
def _all_moments(M, pixels, eps, WIDTH: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """Mean and 1 / standard deviation of this program's group, from those of its parts (Chan et al., 1979)."""
    group, parts, every = tl.program_id(1), tl.num_programs(0), tl.arange(0, PARTS)
    at = M + (group * parts + every) * 2
    means = tl.load(at, every < parts, 0.0)
    squares = tl.load(at + 1, every < parts, 0.0)
    counts = tl.minimum(tl.maximum(pixels - every * ROWS, 0), ROWS).to(tl.float32) * WIDTH
    total = (pixels * WIDTH).to(tl.float32)
    mean = tl.sum(means * counts) / total
    variance = (tl.sum(squares) + tl.sum(counts * (means - mean) * (means - mean))) / total
    return mean, 1 / tl.sqrt(variance + eps)


@triton.jit
def _moments(X, M, pixels, groups, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """Of each part: its mean, and the sum of squares around it."""
    at, there, _, _ = _place(pixels, groups, WIDTH, PADDED, ROWS)
    x = tl.load(X + at, there, 0.0).to(tl.float32)
    count = tl.minimum(pixels - tl.program_id(0) * ROWS, ROWS) * WIDTH
    mean = tl.sum(x) / count
    around = tl.where(there, x - mean, 0.0)
    own = M + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(own, mean)
    tl.store(own + 1, tl.sum(around * around))


@triton.jit
def _scaled(
    X, W, B, M, eps, pixels, at, there, channels, inside, WIDTH: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr
):
    """x without mean and scale, its weights, the norm's result, and 1 / standard deviation."""
    mean, inverse = _all_moments(M, pixels, eps, WIDTH, ROWS, PARTS)
    x = (tl.load(X + at, there, 0.0).to(tl.float32) - mean) * inverse
    weight = tl.load(W + channels, inside, 0.0).to(tl.float32)[None, :]
    return x, weight, x * weight + tl.load(B + channels, inside, 0.0).to(tl.float32)[None, :], inverse


@triton.jit
def _normalise(
    X, W, B, Y, M, eps, pixels, groups,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    at, there, channels, inside = _place(pixels, groups, WIDTH, PADDED, ROWS)
    _, _, y, _ = _scaled(X, W, B, M, eps, pixels, at, there, channels, inside, WIDTH, ROWS, PARTS)
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(Y + at, y.to(Y.dtype.element_ty), there)


@triton.jit
def _gradient_of_scaled(
    X, W, B, G, M, eps, pixels, at, there, channels, inside,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """The gradient of x without mean and scale, that x, and 1 / standard deviation."""
    x, weight, y, inverse = _scaled(X, W, B, M, eps, pixels, at, there, channels, inside, WIDTH, ROWS, PARTS)
    g = tl.load(G + at, there, 0.0).to(tl.float32)
    if SILU:
        part = tl.sigmoid(y)
        g = g * part * (1 + y * (1 - part))
    return g * weight, x, inverse


@triton.jit
def _sums(
    X, W, B, G, M, S, eps, pixels, groups,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Of each part: the sum of the gradient, and of the gradient times x."""
    at, there, channels, inside = _place(pixels, groups, WIDTH, PADDED, ROWS)
    g, x, _ = _gradient_of_scaled(X, W, B, G, M, eps, pixels, at, there, channels, inside, WIDTH, ROWS, PARTS, SILU)
    own = S + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(own, tl.sum(g))
    tl.store(own + 1, tl.sum(g * x))


@triton.jit
def _differentiate(
    X, W, B, G, D, M, S, eps, pixels, groups,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    at, there, channels, inside = _place(pixels, groups, WIDTH, PADDED, ROWS)
    g, x, inverse = _gradient_of_scaled(
        X, W, B, G, M, eps, pixels, at, there, channels, inside, WIDTH, ROWS, PARTS, SILU
    )
    every, total = tl.arange(0, PARTS), (pixels * WIDTH).to(tl.float32)
    own = S + (tl.program_id(1) * tl.num_programs(0) + every) * 2
    of_g = tl.sum(tl.load(own, every < tl.num_programs(0), 0.0)) / total
    of_both = tl.sum(tl.load(own + 1, every < tl.num_programs(0), 0.0)) / total
    tl.store(D + at, (inverse * (g - of_g - x * of_both)).to(D.dtype.element_ty), there)


def geglu(x: torch.Tensor) -> torch.Tensor:
    """GEGLU: h * gelu(g) for x (..., 2 D), the concatenation of h and g: (..., D)."""
    return _Geglu.apply(x.contiguous())


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        result = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        _gate[(triton.cdiv(result.numel(), BLOCK),)](x, result, result.numel(), D=result.shape[-1], BLOCK=BLOCK)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        found, gradient = torch.empty_like(x), gradient.contiguous()
        of_gate = _gate_backward[(triton.cdiv(gradient.numel(), BLOCK),)]
        of_gate(x, gradient, found, gradient.numel(), D=gradient.shape[-1], BLOCK=BLOCK)
        return found


@triton.jit
def _halves(X, total, D: tl.constexpr, BLOCK: tl.constexpr):
    """The positions of this program's elements in the result and in x, and a mask of those that exist."""
    own = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return own, own // D * (2 * D) + own % D, own < total


@triton.jit
def _gate(X, Y, total, D: tl.constexpr, BLOCK: tl.constexpr):
    own, at, there = _halves(X, total, D, BLOCK)
    h = tl.load(X + at, there, 0.0).to(tl.float32)
    g = tl.load(X + at + D, there, 0.0).to(tl.float32)
    y = h * g * 0.5 * (1 + tl.math.erf(g * 0.7071067811865476))
    tl.store(Y + own, y.to(Y.dtype.element_ty), there)


@triton.jit
def _gate_backward(X, G, D_X, total, D: tl.constexpr, BLOCK: tl.constexpr):
    own, at, there = _halves(X, total, D, BLOCK)
    h = tl.load(X + at, there, 0.0).to(tl.float32)
    g = tl.load(X + at + D, there, 0.0).to(tl.float32)
    gradient = tl.load(G + own, there, 0.0).to(tl.float32)
    below = 0.5 * (1 + tl.math.erf(g * 0.7071067811865476))  # the normal distribution, and its density next
    density = tl.exp(-0.5 * g * g) * 0.3989422804014327
    tl.store(D_X + at, (gradient * g * below).to(D_X.dtype.element_ty), there)
    tl.store(D_X + at + D, (gradient * h * (below + g * density)).to(D_X.dtype.element_ty), there)
