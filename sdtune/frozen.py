"""Layers of frozen models that compute what they did, but for rounding, in less time.

On a CPU in fp32 these are linear layers and convolutions; on a GPU in half precision group norms, with the SiLU behind
them, of pictures that lie as `lay_out` lets them, and GEGLU. Nowhere else anything changes: not in other precisions,
where weights are trained, or in what is saved.
"""

from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from diffusers.models import activations, resnet
from llvmlite import binding
from torch import nn
from torch.autograd.function import once_differentiable


def quicken(model: nn.Module) -> nn.Module:
    """Turns a model's layers into those that are below, where there is one; gives the model."""
    for module in model.modules():
        quicker = QUICKER.get(type(module))
        if quicker and all(getattr(module, name) == value for name, value in getattr(quicker, "SETTINGS", {}).items()):
            module.__class__ = quicker
    return model


def plain(model: nn.Module) -> nn.Module:
    """Undoes `quicken`."""
    for module in model.modules():
        if type(module) in QUICKER.values():
            module.__class__ = type(module).__base__
    return model


def lay_out(model: nn.Module) -> nn.Module:
    """On a GPU, in half precision: convolutions get their weights, and so give their results, in channels_last.

    The GPU's quickest convolutions want that; otherwise they rearrange weights and pictures at each call. The weights
    of a LoRA keep their place: who trains them holds it.
    """
    for name, module in model.named_modules():
        weight = module.weight if isinstance(module, nn.Conv2d) and "lora_" not in name else None
        if weight is not None and weight.is_cuda and weight.dtype in HALF and weight.stride(3) == 1:
            # not `contiguous`, which leaves a 1x1 as it is, and so what it gives
            weight.data = torch.empty_like(weight, memory_format=torch.channels_last).copy_(weight.data)
    return model


HALF = (torch.float16, torch.bfloat16)


def _is_frozen(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a layer of these computes in fp32 on a CPU and its weights get no gradient."""
    trained = torch.is_grad_enabled() and (weight.requires_grad or bias is not None and bias.requires_grad)
    in_fp32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and in_fp32 and x.is_contiguous() and not trained and not recorded()


def recorded() -> bool:
    """Whether PyTorch's operations are being recorded, where what is not one of them would be lost."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


class Convolution(nn.Conv2d):
    """A 3x3 convolution: on few pixels with many weights one product, on many pixels what `winograd` does."""

    SETTINGS = dict(
        kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, padding_mode="zeros"
    )  # fmt: skip
    FEW, MANY = 64, 2**20  # pixels of all pictures together, and weights

    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        compute = self.quicker(x, weight, bias) or super()._conv_forward
        return compute(x, weight, bias)

    @classmethod
    def quicker(cls, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
        """What computes it sooner than PyTorch, and keeps no x for the gradient; None where nothing does."""
        if not _is_frozen(x, weight, bias) or x.dim() != 4:
            return None
        if x[:, 0].numel() <= cls.FEW and weight.numel() >= cls.MANY and _on_amd():
            return _OneProduct.apply
        from . import winograd  # imports Numba, which is needed here only

        return winograd.convolution if winograd.suits(x, weight) else None


class _OneProduct(torch.autograd.Function):
    """The weights as they lie times what surrounds each pixel; PyTorch's convolution rearranges the weights first."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        surroundings = F.unfold(x, 3, padding=1).transpose(0, 1).flatten(1)  # (9 C, B H W)
        result = _multiply(weight.flatten(1), surroundings.mT, None)
        result = result.unflatten(1, (len(x), *x.shape[2:])).transpose(0, 1)
        return (result if bias is None else result + bias[:, None, None]).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rows = gradient.flatten(2).mT.flatten(0, 1)  # (B H W, K)
        of_surroundings = _multiply_back(rows, ctx.saved_tensors[0].flatten(1)).unflatten(0, (len(gradient), -1)).mT
        return F.fold(of_surroundings, gradient.shape[2:], 3, padding=1), None, None


class Linear(nn.Linear):
    """A linear layer whose result oneDNN computes on AMD's processors, where MKL, which PyTorch takes, is slower."""

    ROWS = 32  # with fewer, what surrounds the product takes longer than it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() >= self.ROWS * self.in_features and _is_frozen(x, self.weight, self.bias) and _on_amd():
            return _FrozenLinear.apply(x, self.weight, self.bias)
        return super().forward(x)


class GroupNorm(nn.GroupNorm):
    """A group norm that PyTorch computes in one order of a picture's numbers only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._compute(x) if self._quicker(x) else super().forward(x)

    def _compute(self, x: torch.Tensor, silu: bool = False) -> torch.Tensor:
        from . import gpu_layers  # imports Triton, which is not everywhere

        return gpu_layers.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, silu)

    def _quicker(self, x: torch.Tensor) -> bool:
        if not on_gpu_in_half(x) or x.dim() != 4 or self.weight is None:
            return False
        trained = torch.is_grad_enabled() and (self.weight.requires_grad or self.bias.requires_grad)
        lies_right = x.is_contiguous(memory_format=torch.channels_last) and x[0, 0].numel() > 1
        here = self.weight.dtype == x.dtype and self.weight.device == x.device  # an offloaded one is elsewhere
        return lies_right and here and not trained


class ResnetBlock2D(resnet.ResnetBlock2D):
    """diffusers' block of its usual settings: nothing is divided by 1, and a norm is one with the SiLU behind it."""

    SETTINGS = dict(upsample=None, downsample=None, time_embedding_norm="default", skip_time_act=False,
                    output_scale_factor=1.0)  # fmt: skip

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None, *args, **kwargs) -> torch.Tensor:
        if args or kwargs:
            return super().forward(input_tensor, temb, *args, **kwargs)
        x = self.conv1(self._activated(self.norm1, input_tensor))
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        x = x if temb is None else x + temb
        x = self.conv2(self.dropout(self._activated(self.norm2, x)))
        return (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)) + x

    def _activated(self, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The nonlinearity of the norm of x. A tuner may have a hook on the norm, which changes what it gives."""
        usual = type(norm) is GroupNorm and type(self.nonlinearity) is nn.SiLU and not norm._forward_hooks
        return norm._compute(x, silu=True) if usual and norm._quicker(x) else self.nonlinearity(norm(x))


class GEGLU(activations.GEGLU):
    """diffusers' GEGLU, whose halves PyTorch's kernels take one by one."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if not on_gpu_in_half(hidden_states) or args or kwargs:
            return super().forward(hidden_states, *args, **kwargs)
        from . import gpu_layers  # imports Triton, which is not everywhere

        return gpu_layers.gated(self.proj(hidden_states))


QUICKER = {nn.Conv2d: Convolution, nn.Linear: Linear, nn.GroupNorm: GroupNorm,
           resnet.ResnetBlock2D: ResnetBlock2D, activations.GEGLU: GEGLU}  # fmt: skip


def on_gpu_in_half(x: torch.Tensor) -> bool:
    """Whether kernels in Triton can take x: on a GPU in half precision, not compiled, where there is Triton."""
    return x.is_cuda and x.dtype in HALF and _runs_triton(x.device) and not recorded()


@cache
def _runs_triton(device: torch.device) -> bool:
    """PyTorch for GPUs brings Triton on Linux; it is made for NVIDIA's Ampere and later, and AMD's of those years."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _on_amd() -> bool:
    return binding.get_host_cpu_name().startswith("znver") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _FrozenLinear(torch.autograd.Function):
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
    """rows @ weight, for rows of a gradient: by oneDNN, or by MKL where that is quicker, for want of AVX-512."""
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return _multiply(rows, weight.mT, None)
    return rows @ weight if len(rows) >= 512 else (weight.mT @ rows.mT).mT  # MKL likes the larger one on the left


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
