"""The signals that ask a command to stop: Ctrl-C, a polite kill, and a terminal that is closed."""

from __future__ import annotations

import signal

SIGNALS = [number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]


class Stopped(KeyboardInterrupt):
    """A signal that asks the command to stop, heeded where nothing is lost by it. number: the signal's.

    heeded: whoever catches it sets it; else the signal is taken for swallowed, and raised again.
    """

    def __init__(self, number: int) -> None:
        super().__init__("interrupted")
        self.number = number
        self.heeded = False


def exit_code(number: int) -> int:
    """Of a command that a signal ended, as shells count."""
    return 128 + number
