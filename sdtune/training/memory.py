"""Saves memory in training: does not save activations that the backward pass of a frozen UNet can do without.

PyTorch saves for the backward pass whatever an operation might need. In a frozen UNet nothing uses the input of a
convolution, because its weights get no gradient; and the result of a normalisation or of GELU is quickly computed a
second time from its input, which is saved anyway. For Stable Diffusion 1.5's shape with Res-Attn this is 171 of 416 MB
(256 px, batch 1, fp32: the sizes of the tensors that the graph holds), less the tensors below `MIN_BYTES`. On a GPU,
where matrix products are fast, the largest results of all, those of GEGLU in the outermost blocks, are recomputed too.
"""

from functools import partial

import torch
from diffusers.models.activations import GEGLU
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ..kernels.layers import Convolution

MIN_BYTES = 2**20  # smaller tensors are saved as usual: the time that a recomputation costs hardly depends on the size
MAX_PROJECTION_WIDTH = 320  # in GEGLU, wider projections are not recomputed: they take too long. SD's outermost blocks


class MemorySavingHooks(saved_tensors_hooks):
    """In a `with`, a forward pass of `unet` saves less for its backward pass. The gradients are the same bit for bit.

    Can be entered any number of times. Does not work with autocast. Trained layers are left as they are, so the UNet
    may have tuners and LoRAs, but full fine-tuning does not work: its hooks change the results of normalisations.
    """

    def __init__(self, unet: nn.Module):
        super().__init__(_pack, _unpack)
        for module in unet.modules():
            if isinstance(module, nn.Conv2d):
                module._conv_forward = partial(_convolve, module)
            elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                module.forward = partial(_call_recomputable, module.forward)
            elif isinstance(module, GEGLU):
                module.gelu = partial(_call_recomputable, module.gelu)
                proj = module.proj
                is_frozen = isinstance(proj, nn.Linear) and not proj.weight.requires_grad
                if is_frozen and proj.in_features <= MAX_PROJECTION_WIDTH:
                    proj.forward = partial(_call_recomputable, proj.forward, condition=_is_cuda)


def _call_recomputable(function, x: torch.Tensor, condition=lambda x: True) -> torch.Tensor:
    """function(x), whose memory is marked with how to compute it a second time, if `condition(x)` and it is large."""
    result = function(x)
    storage = result.untyped_storage()
    if result.requires_grad and storage.nbytes() == result.nbytes >= MIN_BYTES and condition(x):
        storage.recompute = _Recompute(function, _pack(x.detach()), result.dtype)
    return result


def _pack(saved: torch.Tensor):
    """What to keep for the backward pass: the tensor, or how to compute its memory, with its place in that memory."""
    recompute = getattr(saved.untyped_storage(), "recompute", None)
    if recompute is None or saved.dtype != recompute.dtype:
        return saved
    return recompute, saved.shape, saved.stride(), saved.storage_offset()


def _unpack(packed) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    recompute, *place = packed
    return recompute().as_strided(*place)


class _Recompute:
    """Calls a function a second time with the same input, without a gradient."""

    def __init__(self, function, packed, dtype: torch.dtype):
        self.function, self.packed, self.dtype = function, packed, dtype

    def __call__(self) -> torch.Tensor:
        with torch.no_grad():
            return self.function(_unpack(self.packed))


def _is_cuda(x: torch.Tensor) -> bool:
    return x.is_cuda


def _convolve(conv: nn.Conv2d, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`nn.Conv2d._conv_forward`, which saves x only if the weights get a gradient."""
    saves_nothing = isinstance(conv, Convolution) and conv.faster_function(x, weight, bias)
    usual = conv.padding_mode == "zeros"
    if saves_nothing or weight.requires_grad or not x.requires_grad or x.nbytes < MIN_BYTES or not usual:
        return type(conv)._conv_forward(conv, x, weight, bias)
    return _FrozenConvolution.apply(x, weight, bias, conv)


class _FrozenConvolution(torch.autograd.Function):
    """A convolution that saves only its weights: the gradient of x does not depend on x."""

    @staticmethod
    def forward(ctx, x, weight, bias, conv):
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = x.shape, (conv.stride, conv.padding, conv.dilation, conv.groups)
        return nn.Conv2d._conv_forward(conv, x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        weight = ctx.saved_tensors[0].to(gradient.dtype)
        placeholder = gradient.new_empty(ctx.shape)  # convolution_backward reads only the shape of x here
        stride, padding, dilation, groups = ctx.settings
        gradients = torch.ops.aten.convolution_backward(
            gradient, placeholder, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )
        return gradients[0], None, None, None
