"""One step that stands for several Euler steps of the same residual function."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from resode_cli.ode import SCHEMES, Adjoint, Monitor, composed_euler, solve

FINE = 4


class Scaled(nn.Module):
    """a x"""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


@pytest.mark.parametrize("k", [1, 2, 3, 7.5])
def test_of_a_linear_function_it_is_the_binomial_series_to_second_order(as_field, state, k: float):
    """(1 + a h / k)^k = 1 + a h + (k-1)/(2k) (a h)² + …, whose further terms one step does not have."""
    a, h = -0.7, 0.4
    field = as_field([Scaled(a)], [0], h)
    found = solve(field, composed_euler({0: k}, k), None, state, monitor=Monitor())
    weight = Fraction(k - 1) / Fraction(2 * k)
    assert torch.allclose(found, state * (1 + a * h + float(weight) * (a * h) ** 2), rtol=1e-14)


def euler(field, state: Tensor) -> Tensor:
    return solve(field, SCHEMES["euler"], None, state, monitor=Monitor())


def test_it_is_nearer_to_many_euler_steps_by_two_orders_than_one_euler_step(make_field, as_field, state):
    """Over a time T one step of the rule is off by O(T³), one Euler step by O(T²), and Heun's by O(T²) too."""
    block = make_field("tied", 1).residuals[0].module
    times = [0.4, 0.2, 0.1, 0.05]
    errors: dict[str, list[float]] = {"composed": [], "euler": [], "heun": []}
    for time in times:
        truth = euler(as_field([block], [0] * FINE, time / FINE), state)
        one = as_field([block], [0], time)
        rules = {"composed": composed_euler({0: FINE}, FINE), "euler": SCHEMES["euler"], "heun": SCHEMES["heun"]}
        for name, rule in rules.items():
            found = solve(one, rule, None, state, monitor=Monitor())
            errors[name].append(float((found - truth).detach().norm()))
    slopes = {
        name: statistics.linear_regression([math.log(t) for t in times], [math.log(e) for e in found]).slope
        for name, found in errors.items()
    }
    assert slopes == pytest.approx({"composed": 3, "euler": 2, "heun": 2}, abs=0.15)


def test_runs_of_unequal_length_take_the_time_that_they_have(as_field, state):
    """Three blocks in five steps of one time: runs of 2, 2 and 1, each with its own share of the time."""
    factors, runs, time = (0.05, -0.03, 0.08), (2, 2, 1), 1.0
    blocks = [Scaled(a) for a in factors]
    schedule = [b for b, count in enumerate(runs) for _ in range(count)]
    truth = euler(as_field(blocks, schedule, time / 5), state)
    counts = dict(enumerate(runs))
    found = solve(as_field(blocks, range(3), time / 3), composed_euler(counts, 5 / 3), None, state, monitor=Monitor())
    # Of a linear function's two Euler steps nothing is left out.
    assert torch.allclose(found, truth, rtol=1e-14)


@pytest.mark.parametrize("method", ["backprop", "checkpoint"])
def test_its_gradient_is_that_of_what_it_computes(as_field, state, method: str):
    a, h, k = 0.3, 0.5, 4.0
    block = Scaled(a)
    field = as_field([block], [0, 0], h)
    rule = composed_euler({0: k}, k)
    x = state.clone().requires_grad_()
    out = solve(field, rule, Adjoint(method).plan(2, "euler"), [x], monitor=Monitor())
    factor = 1 + a * h + (k - 1) / (2 * k) * (a * h) ** 2
    gradient, of_a = torch.autograd.grad(out.sum(), [x, block.factor])
    assert torch.allclose(gradient, torch.full_like(x, factor**2))
    change = 2 * factor * (h + (k - 1) / k * a * h**2)
    assert float(of_a) == pytest.approx(change * float(state.sum()), rel=1e-12)
