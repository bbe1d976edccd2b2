"""Layers of frozen models that compute what they did, but for rounding, in less time; on a CPU, in fp32.

Nowhere else anything changes: not on a GPU, in other precisions, where weights are trained, or in what is saved.
"""

from functools import cache

import torch
from llvmlite import binding
from torch import nn
from torch.autograd.function import once_differentiable


def quicken(model: nn.Module) -> nn.Module:
    """Turns a model's linear layers and 3x3 convolutions into those that are below; gives the model."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
        elif type(module) is nn.Conv2d and all(getattr(module, k) == v for k, v in Convolution.SETTINGS.items()):
            module.__class__ = Convolution
    return model


def plain(model: nn.Module) -> nn.Module:
    """Undoes `quicken`."""
    for module in model.modules():
        if type(module) in (Linear, Convolution):
            module.__class__ = type(module).__base__
    return model


def _is_frozen(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a layer of these computes in fp32 on a CPU and its weights get no gradient."""
    trained = torch.is_grad_enabled() and (weight.requires_grad or bias is not None and bias.requires_grad)
    in_fp32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    recorded = torch.jit.is_tracing() or torch.compiler.is_compiling()
    return x.device.type == "cpu" and in_fp32 and x.is_contiguous() and not trained and not recorded


class Convolution(nn.Conv2d):
    """A 3x3 convolution that `winograd` computes where it can."""

    SETTINGS = dict(
        kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, padding_mode="zeros"
    )  # fmt: skip

    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.is_quick(x, weight, bias):
            from . import winograd

            return winograd.convolution(x, weight, bias)
        return super()._conv_forward(x, weight, bias)

    @staticmethod
    def is_quick(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """Whether `winograd` computes it, which keeps no x for the gradient."""
        if not _is_frozen(x, weight, bias):
            return False
        from . import winograd  # imports Numba, which is needed here only

        return winograd.suits(x, weight)


class Linear(nn.Linear):
    """A linear layer that oneDNN computes on AMD's processors, where MKL, which PyTorch takes, is slower."""

    ROWS = 32  # with fewer, what surrounds the product takes longer than it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() >= self.ROWS * self.in_features and _is_frozen(x, self.weight, self.bias) and _on_amd():
            return _OneDNN.apply(x, self.weight, self.bias)
        return super().forward(x)


@cache
def _on_amd() -> bool:
    return binding.get_host_cpu_name().startswith("znver") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _OneDNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _multiply(gradient, ctx.saved_tensors[0].mT, None), None, None


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
