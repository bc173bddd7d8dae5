"""A deep network's step, found from two shallow ones, is that of a simulation in full."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from resode_cli.gradients.planner import Option, peak_of
from resode_cli.network.model import OdeResNet, freeze_batch_norm
from resode_cli.ode import Adjoint
from resode_cli.simulation.shallow import WORTH, pieces_of
from resode_cli.simulation.step import PieceUse, Simulation
from resode_cli.surgery.rewrite import deepen, tie, untie

IMAGES = (8, 3, 16, 16)
STEPS = 30
KINDS: dict[str, Callable] = {
    "runs": lambda stage: deepen(stage, STEPS),
    "untied": lambda stage: untie(deepen(stage, STEPS)),
    "tied": lambda stage: tie(deepen(stage, STEPS)),
}
PLANS = [
    ("runs", Adjoint("multistep")),
    ("runs", Adjoint("checkpoint", bits=4)),
    ("untied", Adjoint("checkpoint")),
    ("untied", Adjoint()),
    ("tied", Adjoint("pc")),
]


def peak(pieces: dict[str, PieceUse]) -> int:
    return peak_of(Option(Adjoint(), use, True) for use in pieces.values())


@pytest.mark.parametrize(("kind", "adjoint"), PLANS, ids=lambda given: getattr(given, "label", given))
def test_two_shallow_steps_tell_a_deep_one(kind: str, adjoint: Adjoint, build_tiny) -> None:
    model: OdeResNet = build_tiny()
    for name, stage in model.stages.items():
        model.replace_stage(name, KINDS[kind](stage))
    model.train()
    freeze_batch_norm(model)
    assert STEPS > WORTH
    simulation = Simulation(model, "cpu")
    simulation.step(adjoint, IMAGES)  # the first step finds out what can be evaluated again
    full, found = simulation.step(adjoint, IMAGES).pieces, pieces_of(simulation, adjoint, IMAGES)
    # Here what a sweep keeps to the end to compare itself with is not small against the states.
    assert peak(found) == pytest.approx(peak(full), rel=0.1)
    for name, use in full.items():
        assert found[name].kept == pytest.approx(use.kept, rel=0.02, abs=4096)
        assert found[name].seconds == pytest.approx(use.seconds, rel=0.06)
        assert found[name].state == use.state
    assert all(stage.spec.depth == STEPS for stage in simulation.model.stages.values())
