"""A signal ends a command once, whatever swallows it on the way."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from typing import Any

import pytest

from resode_cli.commands import interrupt
from resode_cli.commands.interrupt import listening
from resode_cli.machine.signals import Stopped


def test_a_signal_that_something_swallowed_is_raised_again(monkeypatch: Any) -> None:
    """As imports do, and destructors: what is raised inside them goes no further."""
    monkeypatch.setattr(interrupt, "LOST", 0.2)
    with pytest.raises(Stopped), listening():
        with suppress(Stopped):
            signal.raise_signal(signal.SIGTERM)
            time.sleep(5)  # ends at once: the signal is raised here
        for _ in range(100):
            time.sleep(0.05)


def test_one_that_was_heeded_is_not(monkeypatch: Any) -> None:
    monkeypatch.setattr(interrupt, "LOST", 0.1)
    with listening():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Stopped as stopped:
            stopped.heeded = True
        time.sleep(0.5)
