"""That loops run once in each of PyTorch's threads, and that a thread's failure is seen."""

import pytest
import torch

from sdtune.loops import call, fp32, outer, own_share, part, share


@part
def some_doubled(part, parts, numbers, result, threads):
    for i in own_share(part, parts, len(numbers)):
        result[i] = 2 * numbers[i]
        threads[i] = part


@outer
def doubled(threads, *arguments):
    share(some_doubled, threads, arguments)


@part
def some_failing(part, parts, numbers, which):
    if part == which:
        raise ValueError("in one thread")
    numbers[0] = fp32(1)


@outer
def failing(threads, *arguments):
    share(some_failing, threads, arguments)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_thread_does_its_share(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        numbers, found, by = torch.arange(7.0), torch.zeros(7), torch.full((7,), -1.0)
        call(doubled, numbers, found, by)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, 2 * numbers) and by.unique().tolist() == list(range(threads))


@pytest.mark.parametrize("which", [0, 1])
def test_a_thread_that_fails_is_not_passed_over(which):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(MemoryError):
            call(failing, torch.zeros(1), which)
    finally:
        torch.set_num_threads(before)
    call(failing, torch.zeros(1), -1)
