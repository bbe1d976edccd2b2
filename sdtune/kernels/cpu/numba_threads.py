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

from ..dispatch import is_traced

fp32 = np.float32
# Sums may be reordered, or they would not be vectorised; but nan and inf stay what they are.
_JIT_OPTIONS = dict(fastmath={"reassoc", "contract", "arcp", "nsz"}, error_model="numpy")
jit_inline = numba.njit(**_JIT_OPTIONS)  # decorates what the others call
jit_in_order = numba.njit(**_JIT_OPTIONS | dict(fastmath={"contract"}))  # as `inner`, and its sums are not reordered
jit_thread = numba.njit(nogil=True, **_JIT_OPTIONS)  # decorates f(part, parts, *arguments), which `share` calls


@jit_inline
def thread_range(part, parts, total):
    """The rounds of a loop that a thread does, all next to one another."""
    return range(total * part // parts, total * (part + 1) // parts)


def jit_entry(function):
    """Decorates f(threads, *arguments), which calls `share` and is called by `call`."""
    try:
        return numba.njit(nogil=True, cache=True, **_JIT_OPTIONS)(function)
    except RuntimeError:  # no folder where it could be kept
        return numba.njit(nogil=True, **_JIT_OPTIONS)(function)


def run(function, *arguments) -> None:
    """Calls what `outer` gave, for PyTorch's number of threads; tensors become arrays, floats fp32, also in tuples."""
    function(torch.get_num_threads(), *map(_to_numpy, arguments))


def _to_numpy(argument):
    if isinstance(argument, tuple):
        return tuple(map(_to_numpy, argument))
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


def is_available() -> bool:
    """Whether loops can be shared, and calls of them would not be lost."""
    return _found and not is_traced()


@intrinsic
def run_on_threads(typing, function, threads, arguments):
    """Calls what `part` gave in each thread: function(number of the thread, how many there are, *arguments).

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
