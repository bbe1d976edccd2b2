"""Loops in Python that become machine code and run on PyTorch's own threads, on a CPU. Importing this imports Numba.

Numba's own threads would be a second set: those of either keep turning for a while after their work, in the way of the
other's. And Numba takes three times as long to compile what it shares out itself. Compiling takes seconds when a
function is first needed on a machine; after that it is read from disk.
"""

import ctypes

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

fp32 = np.float32
# Sums may be reordered, or they would not be vectorised; but nan and inf stay what they are.
_HOW = dict(fastmath={"reassoc", "contract", "arcp", "nsz"}, error_model="numpy")
inner = numba.njit(**_HOW)  # decorates what the others call
part = numba.njit(nogil=True, **_HOW)  # decorates f(part, parts, *arguments), which `share` calls


@inner
def own_share(part, parts, total):
    """The rounds of a loop that a thread does, all next to one another."""
    return range(total * part // parts, total * (part + 1) // parts)


def outer(function):
    """Decorates f(threads, *arguments), which calls `share` and is called by `call`."""
    try:
        return numba.njit(nogil=True, cache=True, **_HOW)(function)
    except RuntimeError:  # no folder where it could be kept
        return numba.njit(nogil=True, **_HOW)(function)


def call(function, *arguments) -> None:
    """Calls what `outer` gave, for PyTorch's number of threads; tensors become arrays, floats fp32, also in tuples."""
    function(torch.get_num_threads(), *map(_plain, arguments))


def _plain(argument):
    if isinstance(argument, tuple):
        return tuple(map(_plain, argument))
    if isinstance(argument, torch.Tensor):
        return argument.detach().numpy()
    return fp32(argument) if isinstance(argument, float) else argument


# What OpenMP's `parallel` is compiled to, in the library that PyTorch has loaded.
_NAMES = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
try:
    for _name in _NAMES:
        _address = ctypes.cast(getattr(ctypes.CDLL(None), _name), ctypes.c_void_p).value
        llvmlite.binding.add_symbol(_name, _address)
    _found = True
except (AttributeError, OSError, TypeError):  # another OpenMP, or none
    _found = False


def available() -> bool:
    """Whether loops can be shared, and calls of them would not be lost on one who records PyTorch's operations."""
    return _found and not torch.jit.is_tracing() and not torch.compiler.is_compiling()


@intrinsic
def share(typing, function, threads, arguments):
    """Calls what `part` gave in each thread: function(number of the thread, how many there are, *arguments)."""

    def code(context, builder, signature, values):
        taken = types.void(types.intp, types.intp, *arguments.types)
        compiled = function.dispatcher.get_compile_result(taken)
        context.active_code_library.add_linking_library(compiled.library)
        number, nothing, address = ir.IntType(32), ir.VoidType(), cgutils.voidptr_t

        own = cgutils.alloca_once_value(builder, values[2])
        in_thread = ir.Function(
            builder.module, ir.FunctionType(nothing, [address]), builder.module.get_unique_name("in_thread")
        )
        in_thread.linkage = "internal"
        inside = ir.IRBuilder(in_thread.append_basic_block())
        given = inside.load(inside.bitcast(in_thread.args[0], own.type))
        whole = context.get_value_type(types.intp)
        found = [
            inside.sext(inside.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(number, []), n), []),
                        whole)
            for n in _NAMES[1:]
        ]  # fmt: skip
        context.call_internal_no_propagate(
            inside, compiled.fndesc, taken, [*found, *cgutils.unpack_tuple(inside, given)]
        )
        inside.ret_void()

        fork = ir.FunctionType(nothing, [in_thread.type, address, number, number])
        fork = cgutils.get_or_insert_function(builder.module, fork, _NAMES[0])
        count = builder.trunc(values[1], number)
        builder.call(fork, [in_thread, builder.bitcast(own, address), count, number(0)])
        return context.get_dummy_value()

    return types.void(function, threads, arguments), code
