"""Ctrl-C, a polite kill and a closed terminal, each heeded where nothing is lost by it."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from ..machine.processes import speaks
from ..machine.signals import SIGNALS, Stopped

LOST = 2.0  # seconds after which a signal that was raised and ended nothing is raised again
ANEW = 0.5  # seconds after which a signal is a second one; terminals, shells and `timeout` send the first one twice


class Stop:
    """What signals have asked for. Called, it says whether to stop.

    A signal ends the command at once, by `Stopped`. Where work is held back from it (`deferred`, `hold`), a first one
    is only noted, and a second Ctrl-C ends the command without saving.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.held = False
        self.at = 0.0
        self.raised: Stopped | None = None
        self.insisting = False

    def __call__(self) -> bool:
        return self.number is not None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals are only noted inside the block."""
        before, self.held = self.held, True
        try:
            yield
        finally:
            self.held = before

    def hold(self) -> None:
        """From now on signals are only noted, to the end of `working`."""
        self.held = True

    def heed(self, number: int, _: Any) -> None:
        """The handler of the signals."""
        leave_closed_terminal()
        now = time.monotonic()
        if self.insisting:
            self.insisting = False
            if not self.held:
                self._raise()
            self._insist()
            return
        again = self.number is not None and now - self.at < ANEW
        noted = self.number is not None
        if not noted:
            self.number = number
        if again:
            return
        self.at = now
        if not self.held:
            self._raise()
        if noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not noted and speaks():
            hint = "; press Ctrl-C again to stop without saving" if number == signal.SIGINT else ""
            _say(f"stopping after this step{hint}\n")

    def _raise(self) -> NoReturn:
        assert self.number is not None
        self.raised = Stopped(self.number)
        self._insist()
        raise self.raised

    def _insist(self) -> None:
        """Raise the signal anew unless it ends something: imports and destructors of others swallow what is raised."""

        def again() -> None:
            if self.number is not None and self.raised is not None and not self.raised.heeded:
                self.insisting = True
                os.kill(os.getpid(), self.number)

        timer = threading.Timer(LOST, again)
        timer.daemon = True
        timer.start()


stop = Stop()


@contextmanager
def listening() -> Iterator[Stop]:
    """Signals are heeded inside the block, but those that the process was told to ignore, as by nohup."""
    stop.number, stop.held, stop.insisting, stop.raised = None, False, False, None
    chosen = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    try:
        with _handled(chosen):
            yield stop
    finally:
        stop.raised = None


@contextmanager
def working() -> Iterator[Stop]:
    """For work that is worth saving: Ctrl-C is heeded even in the background, where shells have it ignored."""
    before = stop.held
    with _handled([signal.SIGINT, signal.SIGTERM]):
        try:
            yield stop
        finally:
            stop.held = before


@contextmanager
def _handled(numbers: list[int]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may choose handlers
        yield
        return
    previous = {number: signal.signal(number, stop.heed) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def leave_closed_terminal() -> None:
    """Send the output nowhere if it goes to a terminal that is gone: writing there is an error."""
    for descriptor in (1, 2):
        try:
            kind = os.fstat(descriptor)
            if stat.S_ISCHR(kind.st_mode) and not os.isatty(descriptor):
                send_nowhere(descriptor)
        except OSError:  # closed
            continue


def send_nowhere(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _say(text: str) -> None:
    """Written past Python's buffers: the signal may have come while those were being written to."""
    with suppress(OSError):
        os.write(2, text.encode())
