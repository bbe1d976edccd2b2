"""Settings of the C library's heap that let training and drawing on a CPU need less memory and time."""

import ctypes
import os
import sys
from contextlib import suppress


def heap_environment() -> dict[str, str]:
    """What to add to a process's environment for its heap to have fewer holes; empty with a GPU, or if set.

    PyTorch aligns tensors, so glibc cuts each from a larger block. Small pieces are left over, which it caches apart
    and gives to the next small object. While that lives, the place of the tensor, once free, is too small for another
    one of its size. Without these caches a step needs a fifth to a quarter less memory and is not slower.
    """
    gpu = any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")))  # NVIDIA's, AMD's, Windows's in WSL
    if gpu or sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return {}
    return {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"}


def restart_with_heap_settings() -> None:
    """Starts this process anew in `calm_heap`, which only a start can set. To be called before all that takes time."""
    if heap_environment():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | heap_environment())


def keep_freed_memory() -> None:
    """Lets this process keep what it frees, for the next step; where there is no GPU, and the C library is glibc's.

    Large blocks would go back to the system at once, which clears them page by page when they are next needed. In
    drawing with Stable Diffusion 1.5's shape that is an eighth to a quarter of the time.
    """
    import torch

    if torch.accelerator.is_available():
        return
    mmap_max, trim_threshold, arena_max = -4, -1, -8  # the numbers of malloc.h
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(arena_max, 1)  # arenas of other threads could not hold large blocks
