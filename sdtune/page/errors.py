"""The errors of the page, and how an error reads for somebody who uses it."""

import traceback
from contextlib import suppress

from ..adapters import disk
from ..training.errors import DataError, TrainError, is_out_of_memory


class PageError(ValueError):
    """An error that the user of the page can correct; the message says how."""


class JobStopped(Exception):
    """Raised inside a job after its window has stopped it."""


def plain_message(error: BaseException) -> str:
    """The message for the page. An unexpected error is also printed with its traceback on the terminal."""
    if isinstance(error, DataError):
        return "The images cannot be used: " + "; ".join(error.problems)
    if isinstance(error, (ValueError, TrainError)):
        return " ".join(str(error).split())
    if disk.is_full(error):
        return "The disk of the page's output folder is full. Free some space, then try again."
    with suppress(OSError, ValueError):  # the terminal may be gone
        traceback.print_exception(error)
    if is_out_of_memory(error):
        return "The memory is full. Try a smaller size, fewer images or a smaller batch."
    text = " ".join(str(error).split())[:300]
    return f"Something went wrong ({type(error).__name__}: {text}). The terminal shows the full error."
