"""The plans that `auto` chooses from, and the order in which it prefers them.

A training step of a stage costs about 3 + e branch evaluations per step of the stage: 1 forward, 2 for
the products with the Jacobians, e re-evaluations. Memory counts in states held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..network.stage import OdeStage
from ..ode import REVERSALS, SCHEMES, Adjoint, Plan, Prediction, required_scheme

# Re-evaluations per step that are given away for memory: 5 % of a step's time at e = 1.
SLACK = 0.2
SEGMENTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 33, 50, 100)
MOST_CORRECTIONS = 2


@dataclass(frozen=True)
class Candidate:
    """An adjoint for a stage; evaluations: of Φ per step; states: held at a time at most."""

    adjoint: Adjoint
    evaluations: float
    states: int
    exact: bool


def candidates(
    stage: OdeStage, methods: Sequence[str] | None, *, measured: Callable[[Adjoint], float]
) -> list[Candidate]:
    """Every adjoint worth considering for a stage.

    methods: the methods to choose from; None: all that suit the stage's forward rule, but backprop.
    measured: evaluations per step of an adjoint by running it, where they depend on the weights.
    """
    spec = stage.spec
    names = methods if methods is not None else ("checkpoint", *REVERSALS)
    found: list[Candidate] = []
    for name in names:
        if required_scheme(name) not in (None, spec.scheme):
            continue
        if name not in REVERSALS:  # it holds states
            counts = sorted({max(spec.depth // k, 1) for k in SEGMENTS} | set(range(1, min(spec.depth, 16))))
            found += [_candidate(Adjoint(name), spec.depth, spec.scheme)]
            found += [_candidate(Adjoint(name, snapshots=s), spec.depth, spec.scheme) for s in counts if s < spec.depth]
            continue
        # Corrections go on with the fixed-point iteration that a modified prediction begins.
        most = MOST_CORRECTIONS if methods is None and REVERSALS[name].modified else 0
        for corrections in range(most + 1):
            free = Adjoint(name, corrections=corrections)
            plan = free.plan(spec.depth, spec.scheme)
            evaluations = measured(free) if plan is not None and plan.extrapolates else None
            for every in spacings(spec.depth):
                if every == 1 and not set(names) <= REVERSALS.keys():
                    continue  # the same thing
                adjoint = Adjoint(name, every, corrections)
                found.append(_candidate(adjoint, spec.depth, spec.scheme, evaluations))
    return found


def spacings(depth: int) -> list[int | None]:
    """Distances between anchors, from none at all to every step."""
    distances = sorted({-(-depth // k) for k in SEGMENTS if 1 < k <= depth} | {1}, reverse=True)
    return [None, *distances]


def _candidate(adjoint: Adjoint, depth: int, scheme: str, evaluations: float | None = None) -> Candidate:
    plan = adjoint.plan(depth, scheme)
    assert plan is not None
    if evaluations is None:
        evaluations = planned_evaluations(plan)
    return Candidate(adjoint, evaluations, plan.most_states_held, plan.exact)


def planned_evaluations(plan: Plan) -> float:
    """Evaluations of Φ per step that a plan says it takes; where it extrapolates, at least."""
    held, extra = set(plan.anchors), 0
    for n in reversed(range(plan.depth)):
        step = plan.steps[n]
        if step.hold or (step.exact and n not in held):
            extra += n - max(k for k in held if k <= n)
            held.update(step.hold)
        elif not step.exact:
            extra += step.corrections + (step.prediction is not Prediction.EXTRAPOLATED)
        held.discard(n)
    return 1 + extra / plan.depth if plan.depth else 0.0


def by_preference(found: Iterable[Candidate]) -> list[Candidate]:
    """Fewest evaluations first; where they differ by less than SLACK, fewest states first."""
    pending = sorted(found, key=lambda c: (c.evaluations, c.states))
    ordered: list[Candidate] = []
    while pending:
        limit = pending[0].evaluations + SLACK
        near = [c for c in pending if c.evaluations <= limit]
        ordered += sorted(near, key=lambda c: (c.states, not c.exact, c.evaluations))
        pending = [c for c in pending if c.evaluations > limit]
    return ordered


def rule_factor(stage: OdeStage) -> int:
    """Branch evaluations in one evaluation of the stage's Φ."""
    return SCHEMES[stage.spec.scheme].evaluations
