"""The spacings and numbers of states that `auto` considers, and what a plan evaluates.

A training step of a stage costs about 3 + e branch evaluations per step of the stage: 1 forward, 2 for
the products with the Jacobians, e re-evaluations. Memory counts in states held at a time.
"""

from __future__ import annotations

from ..ode import Plan, Prediction

SEGMENTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 33, 50, 100)


def snapshot_counts(depth: int) -> list[int]:
    """Numbers of held states worth considering, fewer than all."""
    counts = {max(depth // k, 1) for k in SEGMENTS} | set(range(1, min(depth, 16)))
    return sorted(count for count in counts if count < depth)


def spacings(depth: int) -> list[int | None]:
    """Distances between anchors, from none at all to every step."""
    distances = sorted({-(-depth // k) for k in SEGMENTS if 1 < k <= depth} | {1}, reverse=True)
    return [None, *distances]


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
