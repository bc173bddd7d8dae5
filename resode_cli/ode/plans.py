"""Backward plans: where the backward sweep takes each step's state from.

x: state; h: step size; n: step; N: depth; Φ: increment of the forward rule, x_{n+1} = x_n + h Φ_n(x_n).
Equation numbers are those of Sander, Ablin, Peyré (NeurIPS 2022).

Reversing a step is a fixed-point iteration x ← G(x) = x_{n+1} − h Φ_n(x): reverse Euler is its first
iterate from x_{n+1}, and the taped evaluation of Φ_n, which the gradient needs anyway, gives one more.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Prediction(Enum):
    """Where the first estimate x̂_n of the state comes from."""

    HELD = "held"  # an anchor of the forward pass, or a state that an earlier replay held
    REPLAY = "replay"  # run forward from the nearest held state below
    REVERSE_EULER = "reverse euler"  # x_{n+1} − h Φ_n(x_{n+1})
    REVERSE_SCHEME = "reverse scheme"  # the forward rule's own step back
    # x_{n+1} − h (2Φ_{n+1} − Φ_{n+2}), from values the sweep has: no evaluation. Reverse Euler where
    # those values say nothing of Φ_n: at a run's last step, unless the forward pass found them to.
    EXTRAPOLATED = "extrapolated"


class Carry(Enum):
    """What goes on to step n-1 as the estimate of x_n. z: the iterate before x̂_n, and G its next."""

    PREDICTED = "predicted"  # x̂_n as it is: the paper
    CORRECTED = "corrected"  # G(x̂_n) = x_{n+1} − h Φ_n(x̂_n), with Φ_n(x̂_n) the taped value: free
    # (1 − β) G(x̂_n) + β G(z): Anderson's mixing of depth 1, β per image. CORRECTED where there is no z.
    MIXED = "mixed"


@dataclass(frozen=True)
class StepPlan:
    """How the sweep gets the state of one step.

    prediction: the first estimate x̂_n.
    hold: with REPLAY, the earlier states to hold on the way (they are HELD for later steps).
    modified: add the defect of step n+1's reverse Euler prediction (what was carried minus it) to this
        step's. Both are −h² Φ' Φ to leading order, so the sum is better by one order where the field is
        smooth in depth, and of the same order where it is not.
    corrections: extra fixed-point evaluations x̂ ← x_{n+1} − h Φ_n(x̂).
    carry: the estimate that goes on to step n-1.

    `modified` and MIXED go with iterates of G: the scheme's own step back is none.
    """

    prediction: Prediction
    hold: tuple[int, ...] = ()
    modified: bool = False
    corrections: int = 0
    carry: Carry = Carry.PREDICTED

    @property
    def exact(self) -> bool:
        return self.prediction in (Prediction.HELD, Prediction.REPLAY)


HELD = StepPlan(Prediction.HELD)


@dataclass(frozen=True)
class Plan:
    """A backward plan of a stage: the states held from the forward pass, and a StepPlan per step.

    slices: parts of the batch that are run, and evaluated again, one after the other.
    bits: the states are held as codes of so many bits a number, with the signs of the rectifiers; None: as they are.
    """

    method: str
    anchors: tuple[int, ...]
    steps: tuple[StepPlan, ...]
    slices: int = 1
    bits: int | None = None

    @property
    def depth(self) -> int:
        return len(self.steps)

    @property
    def exact(self) -> bool:
        """Whether every state is the forward pass's own, so that the gradient is backprop's."""
        return self.reverses_nothing and self.bits is None

    @property
    def reverses_nothing(self) -> bool:
        """Whether every state is held or run again from one that is: the sweep then estimates none."""
        return all(step.exact for step in self.steps)

    @property
    def extrapolates(self) -> bool:
        return any(step.prediction is Prediction.EXTRAPOLATED for step in self.steps)

    @property
    def states_kept(self) -> int:
        """States that the graph keeps between forward and backward: the anchors, and for a reversal x_0 and x_N."""
        return len(self.anchors) if self.reverses_nothing else len({0, self.depth, *self.anchors})

    @property
    def most_states_held(self) -> int:
        """States held at a time at most, those held by replays included."""
        held, most = set(self.anchors), 0
        for n in reversed(range(self.depth)):
            step = self.steps[n]
            held.update(step.hold)
            most = max(most, len(held | {n}) if step.prediction is Prediction.REPLAY else len(held))
            held.discard(n)
        return (
            most if self.reverses_nothing else max(most, len(self.anchors)) + len({0, self.depth} - set(self.anchors))
        )
