"""Settings of glibc's heap with which training and inference on a CPU need less memory and time."""

import ctypes
import os
import sys
from contextlib import suppress


def heap_environment() -> dict[str, str]:
    """The environment variables for a process whose heap is less fragmented; empty with a GPU, or if they are set.

    PyTorch aligns tensors, so glibc cuts each of them from a larger block. The small pieces that are left over go into
    caches, from which glibc serves the next small object. As long as that object lives, the freed memory of the tensor
    cannot be merged and is too small for another tensor of the same size. Without these caches a training step needs a
    fifth to a quarter less memory, and no more time.
    """
    has_gpu = any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")))  # NVIDIA, AMD, WSL
    if has_gpu or sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return {}
    return {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"}


def restart_with_heap_settings() -> None:
    """Restarts this process with `heap_environment`, which glibc reads only at the start of a process.

    To be called first, before anything that takes time.
    """
    if heap_environment():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | heap_environment())


def keep_freed_memory() -> None:
    """From now on, this process keeps the memory that it frees. Only on machines without a GPU, and with glibc.

    Otherwise glibc returns large blocks to the system, which must clear them page by page when they are next needed.
    In inference with Stable Diffusion 1.5's shape this takes an eighth to a quarter of the time.
    """
    import torch

    if torch.accelerator.is_available():
        return
    mmap_max, trim_threshold, arena_max = -4, -1, -8  # as in malloc.h
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(arena_max, 1)  # the arenas of other threads cannot hold large blocks
