"""How long a phase goes on where nobody says how many training steps it takes, and at which rate."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from .results import PhaseCost, PhaseResult

# What each phase may take of the time that is left, in parts.
PARTS = {"blocks": 1.0, "stages": 1.0, "logits": 4.0, "refine": 0.5}
FIRST = {"blocks": 256, "stages": 512, "logits": 1024, "refine": 128}  # training steps of the first round
FEWEST = 8  # of a round
GAIN = 0.05  # of what a phase lowers: a round that gains less is the last
SLOWER = 1 / 3  # the rate after a round that made things worse
UNDONE = 2  # such rounds, and a phase ends
RATES = (3e-4, 1e-3, 3e-3)  # that are tried
PROBED_OVER = 16  # training steps
NEARLY = 1.25  # times the lowest score
TRIAL = PROBED_OVER * len(RATES)  # training steps
SMALL = 0.5  # of its steps, which a phase may spend on that besides
LATE = 0.25  # of its time, by which a phase may exceed it


class Rounds:
    """Rounds of a phase: each takes twice as many steps as the one before, the last what time is left for.

    A phase may take its part of the time that the phases before it have left. costs: predicted; what steps were seen
    to take comes in their place.
    """

    def __init__(self, costs: Sequence[PhaseCost], seconds: float, *, began: float) -> None:
        self.phases = [cost.phase for cost in costs]
        self.per_step = {cost.phase: cost.seconds_per_step for cost in costs}
        self.until = began + seconds
        self.number = 0

    def begin(self, phase: str) -> None:
        """The rounds of the next phase."""
        here = self.phases.index(phase)
        now = time.perf_counter()
        self.share = max(self.until - now, 0) * PARTS[phase] / sum(PARTS[later] for later in self.phases[here:])
        self.phase, self.phase_until = phase, now + self.share
        self.planned, self.number, self.undone, self.slower = FIRST[phase], 1, 0, 1.0
        self.over = self.out_of_time = False
        self.gains = True  # did the round before

    def measured(self, phase: str, seconds_per_step: float) -> None:
        """What its steps were seen to take; those of later phases are taken to be mispredicted likewise."""
        wrong = seconds_per_step / self.per_step[phase]
        for later in self.phases[self.phases.index(phase) :]:
            self.per_step[later] *= wrong

    def bears_a_probe(self, phase: str, steps: int | None) -> bool:
        """Whether trying rates takes a small part of the phase. steps: None, as many as there is time for."""
        steps = int(self.share / max(self.per_step[phase], 1e-9)) if steps is None else steps
        return steps * SMALL >= TRIAL

    def overdue(self) -> bool:
        """Whether a round takes much longer than was predicted."""
        return time.perf_counter() > self.phase_until + LATE * self.share

    def steps(self) -> int:
        """Training steps of the next round; 0: there is none.

        The first one takes a quarter of the time at most, so that a rate that is too high costs no more.
        """
        if self.over:
            return 0
        left = max(self.phase_until - time.perf_counter(), 0)
        affordable = int(left / max(self.per_step[self.phase], 1e-9))
        if self.number == 1:  # a phase that is asked for is tried
            self.planned = max(min(FIRST[self.phase], affordable // 4), FEWEST)
            return self.planned
        if affordable < max(FEWEST, self.planned / 4):
            self.out_of_time = self.gains
            return 0
        return affordable if affordable < 2.5 * self.planned else self.planned

    def ended(self, result: PhaseResult, before: float, after: float) -> None:
        """A round has ended; before and after: what the phase lowers."""
        if result.steps:
            self.measured(self.phase, result.training_seconds / result.steps)
        self.number += 1
        self.gains = after < before * (1 - GAIN)
        if result.ended == "settled":
            self.over = True
        if result.ended == "reverted":
            self.undone, self.slower = self.undone + 1, SLOWER
            self.over = self.undone == UNDONE
            return
        self.slower, self.undone = 1.0, 0
        self.over = self.over or (self.planned >= FIRST[self.phase] and not self.gains)
        self.planned *= 2


def largest(scores: Mapping[float, float]) -> float:
    """The largest rate that leads to nearly the lowest score; the smallest rate, where none does to a number.

    What is best over the few steps of a probe is too low for a phase of many, whose rate falls to 0.
    """
    finite = {rate: score for rate, score in scores.items() if math.isfinite(score)}
    if not finite:
        return min(scores)
    return max(rate for rate, score in finite.items() if score <= NEARLY * min(finite.values()))
