"""When a phase of a fit has gained all that it will."""

from __future__ import annotations

import math

WINDOW, PATIENCE, GAIN = 25, 4, 0.002  # so many windows of steps in which the loss gains less than this share


class Patience:
    """Notices that a loss has stopped falling: its mean over a window, against the lowest so far."""

    def __init__(self) -> None:
        self.window: list[float] = []
        self.lowest = math.inf
        self.idle = 0

    def exhausted(self, loss: float) -> bool:
        self.window.append(loss)
        if len(self.window) < WINDOW:
            return False
        mean = sum(self.window) / WINDOW
        self.window.clear()
        self.idle = 0 if mean < self.lowest * (1 - GAIN) else self.idle + 1
        self.lowest = min(self.lowest, mean)
        return self.idle >= PATIENCE
