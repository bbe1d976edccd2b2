"""Catches the signals that end a run, so that it can write a checkpoint first."""

import os
import signal

from . import launch

SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]  # Windows has no SIGHUP


class CatchSignals:
    """In a `with`, stores SIGINT, SIGTERM or SIGHUP in `number` instead of ending the process; a second one ends it as
    usual. A signal that the process ignores, as SIGHUP under nohup, stays ignored.

    Under `accelerate launch` the end of the launcher counts as SIGTERM, because the launcher does not pass signals on.
    """

    def __enter__(self):
        self._number = 0
        self._launcher = os.getppid() if launch.ACCELERATE_PRECISION in os.environ else None
        self._old_handlers = {}
        try:
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._old_handlers[number] = signal.signal(number, self._store)
        except ValueError:  # not in the main thread: there the caller handles signals
            pass
        return self

    @property
    def number(self) -> int:
        """The number of the signal that was caught, 0 for none."""
        if self._launcher and os.getppid() != self._launcher:
            return signal.SIGTERM
        return self._number

    def _store(self, number, _frame):
        self._number = number
        signal.signal(number, self._old_handlers[number])

    def __exit__(self, *_):
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
