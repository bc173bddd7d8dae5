"""A step of a deep network, from two steps with fewer of its residual steps: simulating takes time by the operation.

Of N equal steps, what is kept and how long it takes is affine in N. What is alive while they are swept back is most
at the sweep's start or at its end, where the gradients are there and the states are gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..network.model import OdeResNet
from ..ode import Adjoint
from .step import PieceUse, Simulation

SHORT, LONG = 6, 12  # steps of a stage, past what the first ones hold for those after them
WORTH = 20  # with so many at most, a network is simulated as it is


def pieces_of(
    simulation: Simulation, adjoints: Adjoint | Mapping[str, Adjoint], images: tuple[int, ...], **settings: Any
) -> dict[str, PieceUse]:
    """What each piece takes in a step by these adjoints, of which none says how many states it holds."""
    model = simulation.model
    depths = {name: stage.spec.depth for name, stage in model.stages.items()}
    if max(depths.values(), default=0) <= WORTH:
        return simulation.step(adjoints, images, **settings).pieces
    gradients = _gradients(model)
    with _cut(model, SHORT):
        short = simulation.step(adjoints, images, **settings).pieces
    with _cut(model, LONG):
        long, fewer = simulation.step(adjoints, images, **settings).pieces, _gradients(model)
    return {
        name: _at_depth(depths[name], short[name], use, gradients[name], fewer[name])
        if depths.get(name, 0) > LONG
        else use
        for name, use in long.items()
    }


def _at_depth(depth: int, short: PieceUse, long: PieceUse, gradients: int, of_long: int) -> PieceUse:
    def affine(a: float, b: float) -> float:
        return b + (b - a) * (depth - LONG) / (LONG - SHORT)

    kept = round(affine(short.kept, long.kept))
    left = long.left + long.kept - of_long + gradients - kept
    return PieceUse(
        kept=kept,
        left=left,
        forward=round(affine(short.forward, long.forward)),
        backward=long.backward - max(long.left, 0) + max(left, 0),
        seconds=affine(short.seconds, long.seconds),
        once=affine(short.once, long.once),
        state=long.state,
        evaluations=affine(SHORT * short.evaluations, LONG * long.evaluations) / depth,
    )


def _gradients(model: OdeResNet) -> dict[str, int]:
    """Bytes of the gradients of each stage's steps."""
    fields = {name: stage.field() for name, stage in model.stages.items()}
    return {name: sum(p.nbytes for p in own.parameters() if p.requires_grad) for name, own in fields.items()}


@contextmanager
def _cut(model: OdeResNet, most: int) -> Iterator[None]:
    """Stages of so many steps at most: their first."""
    specs = {name: stage.spec for name, stage in model.stages.items()}
    try:
        for name, spec in specs.items():
            few = replace(spec, schedule=spec.schedule[:most], blends=spec.blends[:most])
            model.stages[name].spec = few
        yield
    finally:
        for name, spec in specs.items():
            model.stages[name].spec = spec
