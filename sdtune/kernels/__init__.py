"""Faster ways to the same results, equal but for rounding. Everything here is optional.

The rest of sdtune calls `attention`, `optimize`, `restore` and `to_channels_last`; nothing here knows the rest of
sdtune. `cpu/` needs Numba, `cuda/` needs Triton; where they are missing PyTorch's own operations are used.
SDTUNE_KERNELS=off in the environment switches all of it off.
"""

import os


def is_enabled() -> bool:
    """Whether the kernels may be used: SDTUNE_KERNELS is not "off".

    Raises:
        ValueError: if SDTUNE_KERNELS is neither "on" nor "off".
    """
    value = os.environ.get("SDTUNE_KERNELS", "on")
    if value not in ("on", "off"):
        raise ValueError(f"the environment variable SDTUNE_KERNELS is {value!r}; it must be on or off")
    return value == "on"


def attention(scale: float, *qkv):
    """softmax(scale * q @ k.T) @ v of heads a few numbers wide, (B, N, H, R), or None where no kernel suits.

    Args:
        scale: factor of the scores.
        qkv: q, k and v packed in one tensor (B, N, 3, H, R), or q (B, N, 1, H, R) and k, v (B, M, 2, H, R).
    """
    if not is_enabled():
        return None
    from .dispatch import has_numba, on_cuda_in_half

    if qkv[0].is_cuda and all(map(on_cuda_in_half, qkv)):
        from .cuda import attention as cuda_attention

        if qkv[0].shape[-1] <= cuda_attention.MAX_HEAD_DIM:
            return cuda_attention.attention(scale, *qkv)
    elif qkv[0].device.type == "cpu" and has_numba():
        from .cpu import attention as cpu_attention

        q, k, v = (part.transpose(1, 2) for x in qkv for part in x.unbind(2))
        if cpu_attention.is_faster(q, k):
            return cpu_attention.attention(q, k, v, scale).transpose(1, 2)
    return None


def optimize(model):
    """Gives the frozen layers of a diffusers model their faster forward pass, in place, and returns the model.

    Names, weights and what is saved stay as they are: only the class of a layer changes.
    """
    if is_enabled():
        from .layers import optimize_layers

        optimize_layers(model)
    return model


def restore(model):
    """Undoes `optimize`, in place, and returns the model."""
    from .layers import restore_layers

    return restore_layers(model)


def to_channels_last(model, kept):
    """On a GPU in half precision lets the weights of convolutions lie in channels_last, in place; returns the model.

    The GPU's fastest convolutions need that order; otherwise they rearrange weights and pictures at each call.

    Args:
        kept: a regular expression found in the paths of modules whose weights keep their memory.
    """
    if is_enabled():
        from .layers import convolutions_to_channels_last

        convolutions_to_channels_last(model, kept)
    return model
