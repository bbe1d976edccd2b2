"""The softmax attention of heads a few numbers wide that Res-Attn needs.

Heads of Res-Attn are as wide as its rank, 4 by default, for which PyTorch has no fast kernel. `sdtune.kernels` has one
where Numba (CPU) or Triton (CUDA) is installed; without it, or with SDTUNE_KERNELS=off, PyTorch's own is used.
"""

import torch
import torch.nn.functional as F

from .. import kernels

# CUDA's fused attention kernels need a head width that is a multiple of this. Zero columns in q, k and v change neither
# q.k (the scale is given explicitly) nor the first `rank` columns of the result, so padding is exact.
_HEAD_MULTIPLE = {"cuda": 8}


def attention(scale: float, *qkv: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    """softmax(scale * q @ k.T) @ v, as (B, N, H * R).

    The N x N scores are never stored, except on a CPU with dropout, where PyTorch has no fused kernel.

    Args:
        scale: factor of the scores.
        qkv: q, k and v packed in one tensor (B, N, 3, H, R), or q (B, N, 1, H, R) and k, v (B, M, 2, H, R).
        dropout: share of the attention weights that are set to zero, from 0 to below 1.
    """
    result = None if dropout else kernels.attention(scale, *qkv)
    if result is None:
        q, k, v = (part.transpose(1, 2) for x in qkv for part in _pad_heads(x).unbind(2))
        result = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        result = result[..., : qkv[0].shape[-1]].transpose(1, 2)
    return result.flatten(2)


def _pad_heads(x: torch.Tensor) -> torch.Tensor:
    """The last dimension padded with zeros to the multiple that x's device needs."""
    missing = -x.shape[-1] % _HEAD_MULTIPLE.get(x.device.type, 1)
    return F.pad(x, (0, missing)) if missing else x
