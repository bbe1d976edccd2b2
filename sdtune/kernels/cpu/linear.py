"""Products with frozen weights by oneDNN, which is faster than MKL, PyTorch's default, on AMD processors."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class ConvolutionAsProduct(torch.autograd.Function):
    """A 3x3 convolution as one product of the weights, as they lie, with the 3x3 neighbourhood of each pixel.

    PyTorch's convolution rearranges the weights first, which takes longer than the product where pixels are few.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        patches = F.unfold(x, 3, padding=1).transpose(0, 1).flatten(1)  # (9 C, B H W)
        result = _multiply(weight.flatten(1), patches.mT, None)
        result = result.unflatten(1, (len(x), *x.shape[2:])).transpose(0, 1)
        return (result if bias is None else result + bias[:, None, None]).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rows = gradient.flatten(2).mT.flatten(0, 1)  # (B H W, K)
        grad_patches = _multiply_back(rows, ctx.saved_tensors[0].flatten(1)).unflatten(0, (len(gradient), -1)).mT
        return F.fold(grad_patches, gradient.shape[2:], 3, padding=1), None, None


class FrozenLinear(torch.autograd.Function):
    """A linear layer by oneDNN, with a gradient for x alone."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rows = gradient.flatten(0, -2)
        return _multiply_back(rows, ctx.saved_tensors[0]).unflatten(0, gradient.shape[:-1]), None, None


def _multiply_back(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows @ weight, for rows of a gradient: by oneDNN, or by MKL where that is faster, which is without AVX-512."""
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return _multiply(rows, weight.mT, None)
    return (
        rows @ weight if len(rows) >= 512 else (weight.mT @ rows.mT).mT
    )  # MKL is faster with the larger one on the left


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
