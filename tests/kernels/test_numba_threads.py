"""That loops run once in each of PyTorch's threads, and that a thread's failure is seen; and that the process which
compiles a kernel computes the same as those that read it from disk."""

import os
import subprocess
import sys

import pytest
import torch

from sdtune.kernels.cpu.numba_threads import fp32, jit_entry, jit_thread, run, run_on_threads, thread_range


@jit_thread
def some_doubled(part, parts, numbers, result, threads):
    for i in thread_range(part, parts, len(numbers)):
        result[i] = 2 * numbers[i]
        threads[i] = part


@jit_entry
def doubled(threads, *arguments):
    run_on_threads(some_doubled, threads, arguments)


@jit_thread
def some_failing(part, parts, numbers, which):
    if part == which:
        raise ValueError("in one thread")
    numbers[0] = fp32(1)


@jit_entry
def failing(threads, *arguments):
    run_on_threads(some_failing, threads, arguments)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_thread_does_its_share(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        numbers, found, by = torch.arange(7.0), torch.zeros(7), torch.full((7,), -1.0)
        run(doubled, numbers, found, by)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, 2 * numbers) and by.unique().tolist() == list(range(threads))


@pytest.mark.parametrize("which", [0, 1])
def test_a_thread_that_fails_is_not_passed_over(which):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(MemoryError):
            run(failing, torch.zeros(1), which)
    finally:
        torch.set_num_threads(before)
    run(failing, torch.zeros(1), -1)


def test_a_kernel_computes_the_same_bits_where_it_is_compiled_and_where_it_is_read_from_disk(tmp_path):
    script = """
import sys, torch
from sdtune.kernels.cpu import winograd
torch.manual_seed(0)
result = torch.empty(2, 32, 32, 32)
winograd.run(winograd._transform_output, torch.randn(36, 32, 128), torch.randn(32), 0, 16, result)
torch.save(result, sys.argv[1])
"""
    found, caches = [], []
    for name in ("compiled", "read"):
        command = [sys.executable, "-c", script, str(tmp_path / name)]
        subprocess.run(command, check=True, env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")})
        found.append(torch.load(tmp_path / name))
        caches.append({path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/**/*.nbc")})
    assert caches[0] and caches[0] == caches[1]  # the second has compiled nothing
    assert torch.equal(*found)
