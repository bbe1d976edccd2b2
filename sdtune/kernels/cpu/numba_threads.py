"""Loops in Python, compiled by Numba and run on PyTorch's own threads.

Numba's own thread pool would be a second one, and threads of both pools wait in busy loops after their work, which
slows the other pool. Numba's parallel loops also take three times as long to compile. Compiling takes seconds when a
function is first used on a machine; after that the machine code is read from disk.
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

from ..dispatch import is_traced

fp32 = np.float32
# Sums may be reordered, or they would not be vectorised; nan and inf keep their meaning.
_JIT_OPTIONS = dict(fastmath={"reassoc", "contract", "arcp", "nsz"}, error_model="numpy")
# Functions that others call must be inlined. A function of its own would be compiled twice, alone and with its caller,
# with sums in different orders; the process that compiles would run the one, and those that read from disk the other.
_INLINE_OPTIONS = dict(forceinline=True, **_JIT_OPTIONS)
jit_inline = numba.njit(**_INLINE_OPTIONS)  # for functions that compiled functions call
jit_in_order = numba.njit(**_INLINE_OPTIONS | dict(fastmath={"contract"}))  # the same with sums in the written order
jit_thread = numba.njit(nogil=True, **_INLINE_OPTIONS)  # for f(part, parts, *arguments) that `run_on_threads` calls


@jit_inline
def thread_range(part, parts, total):
    """The iterations of a loop of `total` that thread `part` of `parts` does: one contiguous range."""
    return range(total * part // parts, total * (part + 1) // parts)


def jit_entry(function):
    """Decorates f(threads, *arguments), which calls `run_on_threads` and is called by `run`."""
    try:
        return numba.njit(nogil=True, cache=True, **_JIT_OPTIONS)(function)
    except RuntimeError:  # there is no folder for the compiled code
        return numba.njit(nogil=True, **_JIT_OPTIONS)(function)


def run(function, *arguments) -> None:
    """Calls a `jit_entry` function with PyTorch's number of threads.

    Tensors are passed as NumPy arrays and floats as fp32, also inside tuples.
    """
    function(torch.get_num_threads(), *map(_to_numpy, arguments))


def _to_numpy(argument):
    if isinstance(argument, tuple):
        return tuple(map(_to_numpy, argument))
    if isinstance(argument, torch.Tensor):
        return argument.detach().numpy()
    return fp32(argument) if isinstance(argument, float) else argument


# The functions that OpenMP's `parallel` compiles to, from the library that PyTorch has loaded.
_NAMES = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
try:
    for _name in _NAMES:
        _address = ctypes.cast(getattr(ctypes.CDLL(None), _name), ctypes.c_void_p).value
        llvmlite.binding.add_symbol(_name, _address)
    _openmp_found = True
except (AttributeError, OSError, TypeError):  # another OpenMP, or none
    _openmp_found = False


def is_available() -> bool:
    """Whether loops can run on PyTorch's threads here; not while PyTorch traces, which would lose the calls."""
    return _openmp_found and not is_traced()


@intrinsic
def run_on_threads(typing, function, threads, arguments):
    """Calls a `jit_thread` function in each thread: function(number of the thread, number of threads, *arguments).

    Raises:
        MemoryError: if a thread raised, which in loops like these only an allocation does.
    """

    def code(context, builder, signature, values):
        taken = types.void(types.intp, types.intp, *arguments.types)
        compiled = function.dispatcher.get_compile_result(taken)
        context.active_code_library.add_linking_library(compiled.library)
        module, number, address = builder.module, ir.IntType(32), cgutils.voidptr_t

        def external(name: str, result, *takes):
            return cgutils.get_or_insert_function(module, ir.FunctionType(result, takes), name)

        given = cgutils.alloca_once_value(builder, cgutils.make_anonymous_struct(builder, [values[2], number(0)]))

        in_thread = ir.Function(module, ir.FunctionType(ir.VoidType(), [address]), module.get_unique_name("in_thread"))
        in_thread.linkage = "internal"
        inside = ir.IRBuilder(in_thread.append_basic_block())
        seen = inside.bitcast(in_thread.args[0], given.type)
        whole = context.get_value_type(types.intp)
        place = [inside.sext(inside.call(external(name, number), []), whole) for name in _NAMES[1:]]
        passed = cgutils.unpack_tuple(inside, inside.load(cgutils.gep_inbounds(inside, seen, 0, 0)))
        status, _ = context.call_internal_no_propagate(inside, compiled.fndesc, taken, [*place, *passed])
        with cgutils.if_unlikely(inside, status.is_error):
            inside.store(number(1), cgutils.gep_inbounds(inside, seen, 0, 1))
        inside.ret_void()

        fork = external(_NAMES[0], ir.VoidType(), in_thread.type, address, number, number)
        builder.call(fork, [in_thread, builder.bitcast(given, address), builder.trunc(values[1], number), number(0)])
        failed = builder.load(cgutils.gep_inbounds(builder, given, 0, 1))
        with cgutils.if_unlikely(builder, cgutils.is_not_null(builder, failed)):
            context.call_conv.return_user_exc(builder, MemoryError, ("a thread could not allocate memory",))
        return context.get_dummy_value()

    return types.void(function, threads, arguments), code
