"""The adjoint methods: a method is a function from a depth to a plan. A new method is a new plan.

| method     | state at step n                                                      | evaluations of Φ per step |
| checkpoint | held, or run forward again from a held one: exact                    | 1 … 3                     |
| multistep  | extrapolated from taped values, carry the corrected state            | 1, and 1 more per run     |
| pc         | modified reverse Euler, carry the corrected state                    | 2                         |
| euler      | reverse Euler, carry the prediction (the paper's eq. 6–7)            | 2                         |
| heun       | Heun's rule with time reversed, carry the prediction                 | 2                         |
| heunnet    | the same of the paper's rule (eq. 8–9)                               | 2                         |

So does every other forward rule that has a step back of its own: its name is that of the method.

`pc` (predictor, corrector) and `multistep` carry the state that the taped evaluation corrects, instead
of the prediction. Two classical refinements of `pc` cost no evaluation: Anderson's mixing of the two
iterates, and Milne's modifier, which adds to a prediction the error that the prediction of the step
before turned out to have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from ..errors import UsageError, unknown
from .binomial import forward_placement, replay_placement
from .codec import WIDTHS
from .plans import HELD, Carry, Plan, Prediction, StepPlan
from .schemes import SCHEMES

REVERSALS = {
    "multistep": StepPlan(Prediction.EXTRAPOLATED, carry=Carry.CORRECTED),
    "pc": StepPlan(Prediction.REVERSE_EULER, modified=True, carry=Carry.MIXED),
    "euler": StepPlan(Prediction.REVERSE_EULER),
    **{scheme.name: StepPlan(Prediction.REVERSE_SCHEME) for scheme in SCHEMES.values() if scheme.step_back is not None},
}
METHODS = ("backprop", "checkpoint", *REVERSALS)


def settings_of(method: str) -> frozenset[str]:
    """Which fields of `Adjoint` a method takes."""
    if method in REVERSALS:
        return frozenset({"anchors", "corrections"})
    return frozenset({"anchors", "snapshots", "slices", "bits"}) if method == "checkpoint" else frozenset()


def required_scheme(method: str) -> str | None:
    """The forward rule a method is tied to, if any: reverse Heun retraces Heun steps only."""
    step = REVERSALS.get(method)
    return method if step is not None and step.prediction is Prediction.REVERSE_SCHEME else None


@dataclass(frozen=True)
class Adjoint:
    """The method of the backward pass.

    anchors: hold every K-th state of the forward pass; None: the method's own (all for checkpoint, else none).
    corrections: extra evaluations per reversed step.
    snapshots: for checkpoint, the number of states held at a time, optimally placed, instead of a spacing.
    slices: for checkpoint, parts of the batch that are run one after the other, where a network mixes no images.
    bits: for checkpoint, hold the states as codes of so many bits a number, with the signs of the rectifiers.
    """

    method: str = "backprop"
    anchors: int | None = None
    corrections: int = 0
    snapshots: int | None = None
    slices: int = 1
    bits: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("adjoint", self.method, METHODS)
        if self.anchors is not None and self.anchors < 1:
            raise UsageError(f"anchors every {self.anchors} steps: must be 1 or more")
        if self.anchors is not None and self.method == "backprop":
            raise UsageError("backprop holds every activation and takes no anchors")
        if self.corrections < 0:
            raise UsageError(f"{self.corrections} corrections: must be 0 or more")
        if self.corrections and self.method not in REVERSALS:
            raise UsageError(f"{self.method} is exact and takes no corrections")
        if self.snapshots is not None and self.method != "checkpoint":
            raise UsageError(f"snapshots are placed for 'checkpoint'; {self.method} takes anchors")
        if self.bits is not None and self.bits not in WIDTHS:
            raise UsageError(f"{self.bits} bits: must be {WIDTHS.start} to {WIDTHS.stop - 1}")
        if self.bits is not None and self.method != "checkpoint":
            raise UsageError(f"bits are for the states that 'checkpoint' holds; {self.method} takes none")
        if self.bits is not None and (self.anchors or self.snapshots):
            raise UsageError(
                "checkpoint with bits holds every state, as a code, and takes neither anchors nor snapshots"
            )
        if self.slices < 1:
            raise UsageError(f"{self.slices} slices: must be 1 or more")
        if self.slices > 1 and self.method != "checkpoint":
            raise UsageError(f"slices of the batch are for 'checkpoint'; {self.method} takes none")
        if self.snapshots is not None and self.snapshots < 1:
            raise UsageError(f"{self.snapshots} snapshots: must be 1 or more")
        if self.snapshots is not None and self.anchors is not None:
            raise UsageError("checkpoint takes either anchors (a spacing) or snapshots (a number), not both")

    @property
    def replays(self) -> bool:
        """Whether the backward pass evaluates branches again: all do but backprop, which keeps what they computed."""
        return self.method != "backprop"

    @property
    def outside(self) -> Adjoint:
        """What goes with it for the parts of a network that are no steps: evaluated again, unless it is backprop."""
        return Adjoint("checkpoint", slices=self.slices, bits=self.bits) if self.replays else Adjoint()

    @property
    def stem(self) -> Adjoint:
        """What goes with it for what comes before the first stage, whose input, the images, is held as it is."""
        return replace(self.outside, bits=None)

    @property
    def label(self) -> str:
        """The method and what was chosen with it, as a table shows it."""
        parts = [self.method]
        parts += [f"anchors {self.anchors}"] if self.anchors is not None else []
        parts += [f"{self.snapshots} snapshots"] if self.snapshots is not None else []
        parts += [f"{self.bits} bits"] if self.bits is not None else []
        parts += [f"{self.slices} slices"] if self.slices > 1 else []
        parts += [f"{self.corrections} correction{'s' * (self.corrections > 1)}"] if self.corrections else []
        return ", ".join(parts)

    def plan(self, depth: int, scheme: str) -> Plan | None:
        """The plan for a stage of `depth` steps under a forward rule; None for backprop."""
        needed = required_scheme(self.method)
        if needed is not None and needed != scheme:
            raise UsageError(
                f"adjoint {self.method!r} retraces the {needed} forward rule, but the stage uses {scheme!r}"
            )
        return _build(self, depth)


@lru_cache(maxsize=256)
def _build(adjoint: Adjoint, depth: int) -> Plan | None:
    if adjoint.method == "backprop":
        return None
    if adjoint.method == "checkpoint":
        if adjoint.snapshots is not None:
            plan = _binomial(depth, adjoint.snapshots)
        else:
            plan = replace(_spaced(depth, adjoint.anchors or 1), bits=adjoint.bits)
        return replace(plan, slices=adjoint.slices)
    step = replace(REVERSALS[adjoint.method], corrections=adjoint.corrections)
    anchors = tuple(range(0, depth, adjoint.anchors)) if adjoint.anchors else ()
    return Plan(adjoint.method, anchors, tuple(HELD if n in set(anchors) else step for n in range(depth)))


def _spaced(depth: int, every: int) -> Plan:
    """Anchors at equal distances; each segment is run again once, and held while it is swept."""
    steps = []
    for n in range(depth):
        anchor = n - n % every
        top = min(anchor + every, depth) - 1
        if n == anchor or n < top:
            steps.append(HELD)
        else:
            steps.append(StepPlan(Prediction.REPLAY, hold=tuple(range(anchor + 1, top))))
    return Plan("checkpoint", tuple(range(0, depth, every)), tuple(steps))


def _binomial(depth: int, snapshots: int) -> Plan:
    """Never more than `snapshots` held states, and R(depth, snapshots) steps run again (see `binomial`)."""
    if depth == 0:
        return Plan("checkpoint", (), ())
    anchors = forward_placement(depth, snapshots)
    held, steps = list(anchors), []
    for n in reversed(range(depth)):
        if held[-1] == n:
            steps.append(HELD)
            held.pop()
            continue
        hold = replay_placement(held[-1], n + 1, snapshots - len(held) + 1)
        steps.append(StepPlan(Prediction.REPLAY, hold=hold))
        held += hold
    return Plan("checkpoint", anchors, tuple(reversed(steps)))
