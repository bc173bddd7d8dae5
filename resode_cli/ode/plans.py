"""Backward plans: where the backward sweep takes each step's state from.

The sweep of `adjoint.py` needs the state x_n at n = N-1 … 0, takes one taped evaluation of the
increment Φ_n there and multiplies the adjoint into it. Methods differ only in the state, so a
method is a function from a depth to a plan, one value per step. A new method is a new plan.

| method       | state at step n                                      | evaluations per step of Φ |
| checkpoint   | held, or run forward again from a held one: exact    | 1 … 2                     |
| euler        | reverse Euler, carry the prediction (eq. 6–7)        | 2                         |
| heun         | reverse Heun, carry the prediction (eq. 8–9)         | 2                         |
| pc           | modified reverse Euler, carry the corrected state    | 2                         |

Reversing a step is a fixed-point iteration x ← G(x) = x_{n+1} − h Φ_n(x): reverse Euler is its first
iterate from x_{n+1}, and the taped evaluation of Φ_n, which the gradient needs anyway, gives one more.
`pc` (predictor, corrector) carries that one instead of the prediction. Two classical refinements cost
no evaluation: Anderson's mixing of the two iterates, and Milne's modifier, which adds to a prediction
the error that the prediction of the step before turned out to have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from ..errors import UsageError, unknown


class Prediction(Enum):
    """Where the first estimate x̂_n of the state comes from."""

    HELD = "held"  # an anchor of the forward pass, or a state that an earlier replay held
    REPLAY = "replay"  # run forward from the nearest held state below
    REVERSE_EULER = "reverse euler"  # x_{n+1} − h Φ_n(x_{n+1})
    REVERSE_SCHEME = "reverse scheme"  # the forward rule's own step back


class Carry(Enum):
    """What goes on to step n-1 as the estimate of x_n. z: the iterate before x̂_n, and G its next."""

    PREDICTED = "predicted"  # x̂_n as it is: the paper
    CORRECTED = "corrected"  # G(x̂_n) = x_{n+1} − h Φ_n(x̂_n), with Φ_n(x̂_n) the taped value: free
    MIXED = "mixed"  # (1 − β) G(x̂_n) + β G(z): Anderson's mixing of depth 1, β per image


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

    `modified` and MIXED go with reverse Euler: the scheme's own step back is no iterate of G.
    """

    prediction: Prediction
    hold: tuple[int, ...] = ()
    modified: bool = False
    corrections: int = 0
    carry: Carry = Carry.PREDICTED

    @property
    def exact(self) -> bool:
        return self.prediction in (Prediction.HELD, Prediction.REPLAY)


@dataclass(frozen=True)
class Plan:
    """A backward plan of a stage: the states held from the forward pass, and a StepPlan per step."""

    method: str
    anchors: tuple[int, ...]
    steps: tuple[StepPlan, ...]

    @property
    def depth(self) -> int:
        return len(self.steps)

    @property
    def exact(self) -> bool:
        """Whether every state is the forward pass's own, so that the gradient is backprop's."""
        return all(step.exact for step in self.steps)


_HELD = StepPlan(Prediction.HELD)


def _checkpoint(depth: int, every: int | None) -> Plan:
    every = every or 1
    anchors = tuple(range(0, depth, every))
    steps = []
    for n in range(depth):
        anchor = n - n % every
        top = min(anchor + every, depth) - 1
        if n == anchor or n < top:
            steps.append(_HELD)
        else:
            steps.append(StepPlan(Prediction.REPLAY, hold=tuple(range(anchor + 1, top))))
    return Plan("checkpoint", anchors, tuple(steps))


def _reversal(method: str, step: StepPlan) -> Callable[[int, int | None], Plan]:
    def build(depth: int, every: int | None) -> Plan:
        anchors = tuple(range(0, depth, every)) if every else ()
        steps = tuple(_HELD if n in set(anchors) else step for n in range(depth))
        return Plan(method, anchors, steps)

    return build


_BUILDERS: dict[str, Callable[[int, int | None], Plan]] = {
    "checkpoint": _checkpoint,
    "euler": _reversal("euler", StepPlan(Prediction.REVERSE_EULER)),
    "heun": _reversal("heun", StepPlan(Prediction.REVERSE_SCHEME)),
    "pc": _reversal("pc", StepPlan(Prediction.REVERSE_EULER, modified=True, carry=Carry.MIXED)),
}

METHODS = ("backprop", *_BUILDERS)


def required_scheme(method: str) -> str | None:
    """The forward rule a method is tied to, if any: reverse Heun retraces Heun steps only."""
    return "heun" if method == "heun" else None


@dataclass(frozen=True)
class Adjoint:
    """The method of the backward pass, and the spacing of its anchors (None: the method's own)."""

    method: str = "backprop"
    anchors: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("adjoint", self.method, METHODS)
        if self.anchors is not None and self.anchors < 1:
            raise UsageError(f"anchors every {self.anchors} steps: must be 1 or more")
        if self.anchors is not None and self.method == "backprop":
            raise UsageError("backprop holds every activation and takes no anchors")

    def plan(self, depth: int, scheme: str) -> Plan | None:
        """The plan for a stage of `depth` steps under a forward rule; None for backprop."""
        needed = required_scheme(self.method)
        if needed is not None and needed != scheme:
            raise UsageError(
                f"adjoint {self.method!r} retraces the {needed} forward rule, but the stage uses {scheme!r}"
            )
        return _build(self.method, depth, self.anchors)


@lru_cache(maxsize=256)
def _build(method: str, depth: int, anchors: int | None) -> Plan | None:
    return None if method == "backprop" else _BUILDERS[method](depth, anchors)
