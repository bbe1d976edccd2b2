"""The exceptions of data sets and of training runs, and how messages show lists and file names."""

import re

from .. import paths


class DataError(ValueError):
    """A data set cannot be used.

    Attributes:
        problems: every problem found, each as one line that names its file.
    """

    def __init__(self, source, problems: list[str]):
        self.problems = [_shorten_words(printable(p)) for p in problems]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{paths.show(source)}: {count}\n" + "\n".join(f"  - {p}" for p in self.problems))


class TrainError(RuntimeError):
    """A run cannot start or continue; the message says what was found and what to do."""


class DiskFullError(TrainError):
    """The disk of the output folder is full; what was being written has been removed."""


class Stopped(TrainError):
    """A signal has ended a run after a checkpoint was written.

    Attributes:
        signum: the number of the signal.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


def shorten_list(names: list[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _shorten_words(text: str) -> str:
    """The text with the middle of words longer than any file name left out."""
    return re.sub(r"\S{300,}", lambda word: f"{word[0][:100]}...{word[0][-50:]}", text)


def printable(text: str) -> str:
    """The text with line breaks, terminal codes and invalid Unicode as escape sequences; file names may hold them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory is full, of the machine or of the GPU."""
    # PyTorch's allocator on a CPU raises a plain RuntimeError, torch.OutOfMemoryError is one too
    told = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in told)
    )
