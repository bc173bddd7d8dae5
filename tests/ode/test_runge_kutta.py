"""The rules midpoint and rk4: orders forward and backward, equations; and a rule that carries more than a state."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from resode_cli.ode import SCHEMES, Adjoint, Evaluator, Field, Monitor, Plan, Prediction, Scheme, StepPlan, solve

DEPTHS = (4, 8, 16, 32)


def order(errors: list[float]) -> float:
    return -statistics.linear_regression([math.log(n) for n in DEPTHS], [math.log(e) for e in errors]).slope


def relative(found: list[Tensor], truth: list[Tensor]) -> float:
    difference = sum(float((a - b).square().sum()) for a, b in zip(found, truth, strict=True))
    return math.sqrt(difference / sum(float(b.square().sum()) for b in truth))


class Linear(nn.Module):
    def __init__(self, matrix: Tensor, scale: float) -> None:
        super().__init__()
        self.matrix, self.scale = matrix, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.matrix.T)


@pytest.mark.parametrize(("scheme", "constant", "changing"), [("midpoint", 2, 2), ("rk4", 4, 2)])
def test_forward_order_against_the_matrix_exponential(scheme, constant, changing, as_field, state):
    """x' = A x, and x' = cos(t) A x with the weights of each step sampled in its middle."""
    matrix = torch.randn(state.shape[1], state.shape[1], dtype=torch.float64) / 2
    for expected, scale, flow in ((constant, lambda t: 1.0, 1.0), (changing, math.cos, math.sin(1.0))):
        truth = state @ torch.linalg.matrix_exp(matrix * flow).T
        errors = []
        for depth in DEPTHS:
            blocks = [Linear(matrix, scale((n + 0.5) / depth)) for n in range(depth)]
            out = solve(as_field(blocks, range(depth), 1 / depth), SCHEMES[scheme], None, state, monitor=Monitor())
            errors.append(relative([out], [truth]))
        assert order(errors) == pytest.approx(expected, abs=0.25)


@pytest.mark.parametrize(("scheme", "expected"), [("midpoint", 2), ("rk4", 4)])
@pytest.mark.parametrize("kind", ["tied", "alternating"])
def test_the_gradient_by_a_rules_own_reversal_has_the_rules_order(
    kind, scheme, expected, make_field, field_gradients, state
):
    """Whatever the weights of the steps: each step is reversed with its own."""
    errors = []
    for depth in DEPTHS:
        torch.manual_seed(1)
        field = make_field(kind, depth)
        truth = field_gradients(field, Adjoint("backprop"), state, scheme=scheme)
        errors.append(relative(field_gradients(field, Adjoint(scheme), state, scheme=scheme), truth))
    assert order(errors) >= expected - 0.3


def functions(field: Field) -> list[Callable[[Tensor], Tensor]]:
    return [field.residuals[b].module for b in field.schedule]


def classical(r: Callable[[Tensor], Tensor], x: Tensor, h: float) -> Tensor:
    k_1 = r(x)
    k_2 = r(x + h / 2 * k_1)
    k_3 = r(x + h / 2 * k_2)
    return x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + r(x + h * k_3))


RULES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, float], Tensor]] = {
    "midpoint": lambda r, x, h: x + h * r(x + h / 2 * r(x)),
    "rk4": classical,
}


@pytest.mark.parametrize("kind", ["tied", "rough"])
@pytest.mark.parametrize("scheme", RULES)
def test_a_sweep_is_that_of_a_loop_written_here(scheme, kind, make_field, field_gradients, swept, state):
    field = make_field(kind, 7, horizon=2.0)
    r, h, step = functions(field), 2.0 / 7, RULES[scheme]

    def step_back(n: int, x_next: Tensor) -> tuple[Tensor, Tensor]:
        x = step(r[n], x_next, -h)
        return x, x

    expected, x_0 = swept(field, state, lambda n, x: step(r[n], x, h), step_back)
    monitor = Monitor()
    found = field_gradients(field, Adjoint(scheme), state, scheme=scheme, monitor=monitor)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert monitor.drift.item() == pytest.approx(((x_0 - state).norm() / state.norm()).item(), rel=1e-8)


@pytest.mark.parametrize("adjoint", [Adjoint("checkpoint"), Adjoint("checkpoint", snapshots=2)], ids=lambda a: a.label)
@pytest.mark.parametrize("scheme", RULES)
def test_random_layers_draw_again_what_they_drew(scheme, adjoint, make_stage, make_block, stage_gradients, images):
    stage = make_stage((0, 1, 1), blocks=[make_block("DropoutModule"), make_block("DropoutFunction")], scheme=scheme)
    expected = stage_gradients(stage, Adjoint("backprop"), images)
    torch.testing.assert_close(stage_gradients(stage, adjoint, images), expected, rtol=1e-11, atol=1e-12)


def test_every_rule_with_a_step_back_is_a_method_of_its_own():
    for scheme in SCHEMES.values():
        if scheme.step_back is not None:
            assert Adjoint(scheme.name).plan(4, scheme.name) is not None
    assert {"heun", "heunnet", "midpoint", "rk4"} <= {s.name for s in SCHEMES.values() if s.step_back is not None}


# --- a rule that carries a second state: the reversible Heun method (Kidger et al. 2021, algorithm 1) -------
#
#     v_{n+1} = 2 z_n − v_n + h r_n(v_n),   z_{n+1} = z_n + h/2 (r_n(v_n) + r_{n+1}(v_{n+1})),   v_0 = z_0


def _next(n: int, r: Evaluator) -> int:
    return min(n + 1, r.field.depth - 1)


def _increment(r: Evaluator, n: int, x: Tensor) -> Tensor:
    z, v = x
    h = r.field.step_size
    here = r.value(n, v, (n, 0))
    after = 2 * z - v + h * here
    there = r.value(_next(n, r), after, (n, 1))
    return torch.stack([(here + there) / 2, (after - v) / h])


def _step_back(r: Evaluator, n: int, x_next: Tensor) -> Tensor:
    z, v = x_next
    h = r.field.step_size
    there = r.value(_next(n, r), v, (n, 1))
    before = 2 * z - v - h * there
    here = r.value(n, before, (n, 0))
    return torch.stack([z - h / 2 * (here + there), before])


REVERSIBLE_HEUN = Scheme(
    "reversible heun",
    2,
    (0, 1),
    _increment,
    _step_back,
    enter=lambda x: torch.stack([x, x]),
    leave=lambda x: x[0],
)


def reversible_gradients(field: Field, x: Tensor, plan: Plan | None) -> tuple[list[Tensor], Tensor, Monitor]:
    leaf, monitor = x.clone().requires_grad_(), Monitor()
    out = solve(field, REVERSIBLE_HEUN, plan, leaf, monitor=monitor)
    return list(torch.autograd.grad(out.square().sum() / 2, [leaf, *field.parameters()])), out.detach(), monitor


@pytest.mark.parametrize("kind", ["tied", "rough", "smooth"])
def test_a_rule_may_carry_more_than_the_state_and_be_reversed_exactly(kind, make_field, state):
    field = make_field(kind, 16)
    plan = Plan("reversible heun", (), (StepPlan(Prediction.REVERSE_SCHEME),) * 16)
    expected, out, _ = reversible_gradients(field, state, None)
    found, again, monitor = reversible_gradients(field, state, plan)
    torch.testing.assert_close(again, out, rtol=1e-14, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)  # without a state held but the ends
    assert monitor.drift.item() < 1e-12 and out.shape == state.shape


def test_the_carried_rule_is_of_order_2(make_field, state):
    errors = []
    for depth in DEPTHS:
        torch.manual_seed(1)
        _, out, _ = reversible_gradients(make_field("tied", depth), state, None)
        torch.manual_seed(1)
        truth = solve(make_field("tied", 64), SCHEMES["rk4"], None, state, monitor=Monitor())
        errors.append(relative([out], [truth.detach()]))
    assert order(errors) == pytest.approx(2, abs=0.3)
