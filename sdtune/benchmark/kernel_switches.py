"""Switches off single CPU kernels for as long as a measurement takes, in the process that measures.

Users switch off all of them with SDTUNE_KERNELS=off; to switch off one is of use to a measurement alone, so no option
does it. A switch replaces the condition under which the kernel is used.
"""

import math
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from unittest.mock import patch


def _never(*_) -> bool:
    return False


# kernel -> the condition that decides whether it is used, and its value with which it never is
SWITCHES = {
    "Winograd convolution": ("sdtune.kernels.cpu.winograd.is_faster", _never),
    "small-head attention": ("sdtune.kernels.cpu.attention.is_faster", _never),
    "memory-saving hooks": ("sdtune.training.memory.MIN_BYTES", math.inf),
}
KERNELS = tuple(name for name in SWITCHES if name != "memory-saving hooks")  # those that SDTUNE_KERNELS=off switches


@contextmanager
def switched_off(names: Iterable[str]):
    """Within the `with`, the named kernels are not used.

    Args:
        names: of `SWITCHES`.
    """
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch(*SWITCHES[name]))
        yield
