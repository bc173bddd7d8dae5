"""The order of every forward rule on what `deepen` makes, against the flow of the ODE that it discretises.

The flow is integrated here, piece by piece between the places where the weights have a jump or a kink, by a loop that
shares no code with the package.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from resode_cli.network.assembling import assemble
from resode_cli.network.model import ModelInfo
from resode_cli.network.parts import StageParts
from resode_cli.network.stage import OdeStage
from resode_cli.surgery.convert import stage_specs
from resode_cli.surgery.rewrite import deepen

BLOCKS = 3
DEPTHS = (12, 24, 48, 96)
FINE = 200  # steps of a piece


class Step(nn.Module):
    """x + W₂ tanh(W₁ x), with images of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def residual(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x)


@pytest.fixture
def steps() -> list[Step]:
    torch.manual_seed(3)
    return [Step().double() for _ in range(BLOCKS)]


def stage_of(info: ModelInfo, steps: list[Step], scheme: str) -> OdeStage:
    net = nn.Sequential(nn.Sequential(*map(copy.deepcopy, steps)))
    parts = [StageParts("0", (), tuple(map(str, range(BLOCKS))))]
    return assemble(net, stage_specs(parts, scheme=scheme, form="exact"), info).eval().stages["0"]


def flow(field: Callable[[float, Tensor], Tensor], pieces: list[float], x: Tensor) -> Tensor:
    """x' = field(t, x) by the classical Runge-Kutta rule, restarted at each of the places."""
    for begin, end in zip(pieces, pieces[1:], strict=False):
        h = (end - begin) / FINE
        for k in range(FINE):
            t = begin + k * h
            last = min(t + h, end - 1e-9)
            a = field(t, x)
            b = field(t + h / 2, x + h / 2 * a)
            c = field(t + h / 2, x + h / 2 * b)
            x = x + h / 6 * (a + 2 * b + 2 * c + field(last, x + h * c))
    return x


def in_runs(steps: list[Step], t: float, x: Tensor) -> Tensor:
    """Each block for a third of the time; T is the number of blocks."""
    return BLOCKS * steps[min(int(t * BLOCKS + 1e-12), BLOCKS - 1)].residual(x)


def linear(steps: list[Step], t: float, x: Tensor) -> Tensor:
    """Weights on the straight lines between those of the blocks at (k + ½)/K, constant before and after."""
    place = min(max(t * BLOCKS - 0.5, 0.0), BLOCKS - 1.0)
    low = min(int(place), BLOCKS - 2)
    w = place - low
    mixed = copy.deepcopy(steps[low])
    with torch.no_grad():
        for p, a, b in zip(mixed.parameters(), steps[low].parameters(), steps[low + 1].parameters(), strict=True):
            p.copy_((1 - w) * a + w * b)
    return BLOCKS * mixed.residual(x)


KINKS = {
    "replicate": (in_runs, [k / BLOCKS for k in range(BLOCKS + 1)]),
    "linear": (linear, [0.0, *((k + 0.5) / BLOCKS for k in range(BLOCKS)), 1.0]),
}


@pytest.mark.parametrize("weights", KINKS)
def test_orders_on_what_deepen_makes(weights: str, steps: list[Step], info: ModelInfo) -> None:
    field, pieces = KINKS[weights]
    expected = {"euler": 1, "heun": 2, "midpoint": 2, "rk4": 4 if weights == "replicate" else 2, "heunnet": 1}
    x = torch.randn(2, 4, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        truth = flow(lambda t, state: field(steps, t, state), pieces, x)
        found, errors = {}, {}
        for scheme in expected:
            stage = stage_of(info, steps, scheme)
            errors[scheme] = [
                float((deepen(stage, n, depth_weights=weights)(x) - truth).norm() / truth.norm()) for n in DEPTHS
            ]
            logs = [math.log(n) for n in DEPTHS], [math.log(e) for e in errors[scheme]]
            found[scheme] = -statistics.linear_regression(*logs).slope
    assert found == pytest.approx(expected, abs=0.2)
    assert all(a < b for a, b in zip(errors["heun"], errors["euler"], strict=True))
