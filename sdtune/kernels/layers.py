"""Faster versions of the layers of frozen diffusers models, equal but for rounding.

On a CPU in fp32 these are 3x3 convolutions; on a GPU in half precision group norms with the SiLU that follows them, of
pictures in channels_last, and GEGLU. In other precisions, and where weights are trained, the layers compute as before.
"""

import re

import torch
from diffusers.models import activations, resnet
from torch import nn

from .dispatch import HALF_DTYPES, has_numba, is_traced, on_cuda_in_half


def optimize_layers(model: nn.Module) -> nn.Module:
    """Changes the class of each layer that has a faster version here, and returns the model."""
    for module in model.modules():
        faster = FASTER_LAYERS.get(type(module))
        if faster and _has_settings(module, getattr(faster, "SETTINGS", {})):
            module.__class__ = faster
    return model


def _has_settings(module: nn.Module, settings: dict) -> bool:
    return all(getattr(module, name) == value for name, value in settings.items())


def restore_layers(model: nn.Module) -> nn.Module:
    """Undoes `optimize_layers`, and returns the model."""
    for module in model.modules():
        if type(module) in FASTER_LAYERS.values():
            module.__class__ = type(module).__base__
    return model


def convolutions_to_channels_last(model: nn.Module, kept: re.Pattern) -> nn.Module:
    """On a GPU in half precision, puts the weights of convolutions, and so their results, into channels_last.

    Args:
        kept: found in the paths of modules whose weights keep their memory.
    """
    for name, module in model.named_modules():
        weight = module.weight if isinstance(module, nn.Conv2d) and not kept.search(name) else None
        if weight is not None and weight.is_cuda and weight.dtype in HALF_DTYPES and weight.stride(3) == 1:
            # `contiguous` would leave the weights of a 1x1 convolution, and so its results, in the other order
            weight.data = torch.empty_like(weight, memory_format=torch.channels_last).copy_(weight.data)
    return model


def _is_frozen(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a layer computes in fp32 on a CPU and its weights get no gradient."""
    trained = torch.is_grad_enabled() and (weight.requires_grad or bias is not None and bias.requires_grad)
    in_fp32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and in_fp32 and x.is_contiguous() and not trained and not is_traced()


class Convolution(nn.Conv2d):
    """A 3x3 convolution: Winograd's algorithm where it is faster, which is for many pixels."""

    SETTINGS = dict(
        kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, padding_mode="zeros"
    )  # fmt: skip

    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        compute = self.faster_function(x, weight, bias) or super()._conv_forward
        return compute(x, weight, bias)

    def faster_function(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
        """The function that is faster than PyTorch's and saves no x for its gradient; None where there is none."""
        if not _is_frozen(x, weight, bias) or x.dim() != 4 or not has_numba():
            return None
        if not _has_settings(self, self.SETTINGS):  # such as a padding_mode for tiles, set after the model was loaded
            return None
        from .cpu import winograd  # compiles with Numba

        return winograd.convolution if winograd.is_faster(x, weight) else None


class GroupNorm(nn.GroupNorm):
    """A group norm for channels_last, which PyTorch computes only after copying into the other order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._compute(x) if self._is_faster(x) else super().forward(x)

    def _compute(self, x: torch.Tensor, silu: bool = False) -> torch.Tensor:
        from .cuda import layers  # compiles with Triton

        return layers.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, silu)

    def _is_faster(self, x: torch.Tensor) -> bool:
        if not on_cuda_in_half(x) or x.dim() != 4 or self.weight is None:
            return False
        trained = torch.is_grad_enabled() and (self.weight.requires_grad or self.bias.requires_grad)
        in_channels_last = x.is_contiguous(memory_format=torch.channels_last) and x[0, 0].numel() > 1
        same_place = self.weight.dtype == x.dtype and self.weight.device == x.device  # an offloaded one is elsewhere
        return in_channels_last and same_place and not trained


class ResnetBlock2D(resnet.ResnetBlock2D):
    """diffusers' residual block with its usual settings: a norm and its SiLU are one kernel; no division by 1."""

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
        """The nonlinearity of the norm of x, computed apart where a tuner's hook changes the norm's result."""
        usual = type(norm) is GroupNorm and type(self.nonlinearity) is nn.SiLU and not norm._forward_hooks
        return norm._compute(x, silu=True) if usual and norm._is_faster(x) else self.nonlinearity(norm(x))


class GEGLU(activations.GEGLU):
    """diffusers' GEGLU as one kernel."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if not on_cuda_in_half(hidden_states) or args or kwargs:
            return super().forward(hidden_states, *args, **kwargs)
        from .cuda import layers  # compiles with Triton

        return layers.geglu(self.proj(hidden_states))


FASTER_LAYERS = {
    nn.Conv2d: Convolution,
    nn.GroupNorm: GroupNorm,
    resnet.ResnetBlock2D: ResnetBlock2D,
    activations.GEGLU: GEGLU,
}
