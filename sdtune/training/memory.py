"""What the gradient through a frozen UNet can do without.

PyTorch keeps for the backward whatever an operation might need. In a frozen UNet a convolution's input serves
nothing, since its weights get no gradient; and what a normalisation or GELU gave is soon computed again from what it
took, which is kept anyway. On Stable Diffusion 1.5's shape with Res-Attn that is 171 of 416 MB (256 px, batch 1,
fp32: the sizes of the tensors that its graph holds), less what is below `LEAST`. A GPU multiplies so fast that the
largest results of all, GEGLU's in the outermost blocks, need not be kept there either.
"""

from functools import partial

import torch
from diffusers.models.activations import GEGLU
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ..kernels.layers import Convolution

MIN_BYTES = 2**20  # bytes of a tensor that is worth not keeping: the time that it costs depends little on the size
MAX_RECOMPUTED_CHANNELS = (
    320  # channels from which a product is computed again, those of the outermost blocks: with more it takes longer
)


class MemorySavingHooks(saved_tensors_hooks):
    """Within `with Frugal(unet):` a forward pass keeps less for its backward, whose gradients are the same bit for bit.

    May be entered again and again; not for autocast. Trained layers are left as they are, so `unet` may have tuners and
    LoRAs; but not a full fine-tuning, whose hooks change what a normalisation gives.
    """

    def __init__(self, unet: nn.Module):
        super().__init__(_pack, _unpack)
        for module in unet.modules():
            if isinstance(module, nn.Conv2d):
                module._conv_forward = partial(_convolve, module)
            elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                module.forward = partial(_mark_recomputable, module.forward)
            elif isinstance(module, GEGLU):
                module.gelu = partial(_mark_recomputable, module.gelu)
                proj = module.proj
                if (
                    isinstance(proj, nn.Linear)
                    and proj.in_features <= MAX_RECOMPUTED_CHANNELS
                    and not proj.weight.requires_grad
                ):
                    proj.forward = partial(_mark_recomputable, proj.forward, on=_is_cuda)


def _mark_recomputable(function, x: torch.Tensor, on=lambda x: True) -> torch.Tensor:
    """function(x), which can be computed again, as its memory knows from now on."""
    result = function(x)
    storage = result.untyped_storage()
    if result.requires_grad and storage.nbytes() == result.nbytes >= MIN_BYTES and on(x):
        storage.again = _Recompute(function, _pack(x.detach()), result.dtype)
    return result


def _pack(saved: torch.Tensor):
    again = getattr(saved.untyped_storage(), "again", None)
    if again is None or saved.dtype != again.dtype:
        return saved
    return again, saved.shape, saved.stride(), saved.storage_offset()


def _unpack(packed) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    again, *where = packed
    return again().as_strided(*where)


class _Recompute:
    """Calls a function once more as it was called, but for its gradient."""

    def __init__(self, function, packed, dtype: torch.dtype):
        self.function, self.packed, self.dtype = function, packed, dtype

    def __call__(self) -> torch.Tensor:
        with torch.no_grad():
            return self.function(_unpack(self.packed))


def _is_cuda(x: torch.Tensor) -> bool:
    return x.is_cuda


def _convolve(conv: nn.Conv2d, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`nn.Conv2d._conv_forward`, keeping x only for a gradient of the weights."""
    light = isinstance(conv, Convolution) and conv.quicker(x, weight, bias)
    if light or weight.requires_grad or not x.requires_grad or x.nbytes < MIN_BYTES:
        return type(conv)._conv_forward(conv, x, weight, bias)
    return _FrozenConvolution.apply(x, weight, bias, conv)


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, conv):
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = x.shape, (conv.stride, conv.padding, conv.dilation, conv.groups)
        return nn.Conv2d._conv_forward(conv, x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        weight, unread = ctx.saved_tensors[0].to(gradient.dtype), gradient.new_empty(ctx.shape)
        found = torch.ops.aten.convolution_backward(
            gradient, unread, weight, None, *ctx.settings[:3], False, [0, 0], ctx.settings[3], [True, False, False]
        )
        return found[0], None, None, None
