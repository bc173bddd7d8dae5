"""Ctrl-C, or a polite kill, as a request to stop after the step in progress."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .output import Output


@contextmanager
def stop_on_interrupt(output: Output) -> Iterator[Callable[[], bool]]:
    """Inside the block a first signal is only noted, and a second one ends the command at once.

    Yields the function that says whether to stop.
    """
    stopping: list[int] = []

    def ask(number: int, frame: object) -> None:
        if stopping:
            raise KeyboardInterrupt
        stopping.append(number)
        output.note("stopping after this step; press Ctrl-C again to stop without saving")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(stopping)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
