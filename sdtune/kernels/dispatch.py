"""Which kernels this machine and this call can use."""

from functools import cache
from importlib.util import find_spec

import torch

HALF_DTYPES = (torch.float16, torch.bfloat16)


def is_traced() -> bool:
    """Whether PyTorch is recording its operations (jit.trace, compile): what is not one of them would be lost."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def on_cuda_in_half(x: torch.Tensor) -> bool:
    """Whether kernels in Triton can take x: on a GPU in half precision, not traced, where Triton is installed."""
    return x.is_cuda and x.dtype in HALF_DTYPES and _runs_triton(x.device) and not is_traced()


@cache
def _runs_triton(device: torch.device) -> bool:
    """PyTorch for GPUs brings Triton on Linux; it supports NVIDIA's Ampere and later, and AMD's GPUs of those years."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def has_numba() -> bool:
    """Whether Numba, which compiles the CPU kernels, is installed."""
    return find_spec("numba") is not None
