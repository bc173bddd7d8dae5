"""--schedule plateau: a learning rate that falls where evaluations get no better.

It is torch's ReduceLROnPlateau: timm's scheduler of that name is about to be removed, and never saved what it counts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..quantities import counted
from .contradictions import PLATEAU
from .settings import Settings


class Plateau:
    """The share of `settings.lr` that the evaluations so far have left.

    After `settings.plateau_evaluations` in a row without a better one it is multiplied by `settings.plateau_factor`,
    down to `settings.min_lr`. What is better is what --best-by says; the model as the run began is not counted, nor is
    an evaluation during --warmup.

    state: what a run's progress keeps of it, changed in place; empty where nothing was seen yet.
    """

    def __init__(self, settings: Settings, state: dict[str, Any]) -> None:
        self.settings, self.state = settings, state
        self.of_one = torch.optim.SGD([torch.zeros(1)], lr=float(state.get("share", 1.0)))
        self.counter = ReduceLROnPlateau(
            self.of_one,
            mode="max",
            factor=settings.plateau_factor,
            patience=settings.plateau_evaluations - 1,  # torch's is the number that changes nothing
            threshold=0.0,
            threshold_mode="abs",
            min_lr=min(settings.min_lr / settings.lr, 1.0),
            eps=0.0,
        )
        self.counter.best = float(state.get("best", -math.inf))
        self.counter.num_bad_epochs = int(state.get("waited", 0))

    @property
    def share(self) -> float:
        return float(self.of_one.param_groups[0]["lr"])

    def lower(self, optimizer: torch.optim.Optimizer) -> None:
        """Lower the rates that the schedule has just set."""
        for group in optimizer.param_groups:
            group["lr"] *= self.share

    def see(self, score: float, step: int) -> str | None:
        """Take in an evaluation, of which a larger score is the better one; what to say where the rate falls."""
        if step <= self.settings.warmup:
            return None
        before = self.share
        self.counter.step(score)
        self.state.update(best=self.counter.best, waited=self.counter.num_bad_epochs, share=self.share)
        if self.share == before:
            return None
        waited, rate = counted(self.settings.plateau_evaluations, "evaluation"), self.settings.lr * self.share
        return f"step {step}: nothing better in {waited}, so the learning rate falls to {rate:.3g}"


def plateau_of(settings: Settings, state: dict[str, Any]) -> Plateau | None:
    """None for another schedule."""
    return Plateau(settings, state) if settings.schedule == PLATEAU else None


def is_state(state: Any) -> bool:
    """Whether what a file says may be the `state` of a `Plateau`."""
    if not isinstance(state, dict) or state.keys() - {"best", "waited", "share"}:
        return False
    best, waited, share = (state.get(name, default) for name, default in (("best", 0.0), ("waited", 0), ("share", 1.0)))
    return type(best) in (int, float) and type(waited) is int and type(share) is float and 0 < share <= 1
