"""Orders by the slope of log error on log N, and the equations against loops written here.

x: state; a: adjoint; h: step size; n: step; N: depth; r_n: residual function of step n.
Equation numbers are those of Sander, Ablin, Peyré (NeurIPS 2022).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from resode_cli.ode import SCHEMES, Adjoint, Field, Monitor, Plan, Prediction, StepPlan, solve
from resode_cli.ode.sweep import anderson

DEPTHS = (8, 16, 32, 64, 128)


def order(errors: list[float]) -> float:
    """p in error ~ N^-p over DEPTHS."""
    return -statistics.linear_regression([math.log(n) for n in DEPTHS], [math.log(e) for e in errors]).slope


def relative_error(found: list[Tensor], truth: list[Tensor]) -> float:
    difference = sum((a - b).square().sum() for a, b in zip(found, truth, strict=True))
    return math.sqrt(difference / sum(b.square().sum() for b in truth))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# --- forward rules -----------------------------------------------------------------------------------------


class Linear(nn.Module):
    """A x, scaled by a number that may depend on the time of the step."""

    def __init__(self, matrix: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.matrix, self.scale = matrix, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.matrix.T)


def forward_errors(scheme: str, as_field: Callable[..., Field], x: Tensor, scale: Callable[[float], float], exact):
    matrix = torch.randn(x.shape[1], x.shape[1], dtype=torch.float64) / 2
    truth = x @ torch.linalg.matrix_exp(matrix * exact).T
    errors = []
    for depth in DEPTHS:
        blocks = [Linear(matrix, scale(n / depth)) for n in range(depth)]
        field = as_field(blocks, range(depth), 1 / depth)
        out = solve(field, SCHEMES[scheme], None, x, monitor=Monitor())
        errors.append(relative_error([out], [truth]))
    return errors


@pytest.mark.parametrize(("scheme", "expected"), [("euler", 1), ("heun", 2)])
def test_forward_order_against_the_matrix_exponential(scheme, expected, as_field, state):
    errors = forward_errors(scheme, as_field, state, lambda t: 1.0, 1.0)
    assert order(errors) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize(("scheme", "expected"), [("euler", 1), ("heun", 2)])
def test_forward_order_against_a_time_dependent_flow(scheme, expected, as_field, state):
    # x' = cos(t) A x has the flow exp(sin(t) A). Here r_{n+1} matters, and r_N := r_{N-1} must not cost the order.
    errors = forward_errors(scheme, as_field, state, math.cos, math.sin(1.0))
    assert order(errors) == pytest.approx(expected, abs=0.25)


# --- gradients ---------------------------------------------------------------------------------------------


@pytest.fixture
def gradient_order(make_field, field_gradients, state):
    def error(method: str, kind: str, scheme: str, depth: int, seed: int) -> float:
        torch.manual_seed(seed)
        field = make_field(kind, depth)
        truth = field_gradients(field, Adjoint("backprop"), state, scheme=scheme)
        return relative_error(field_gradients(field, Adjoint(method), state, scheme=scheme), truth)

    def measure(method: str, kind: str, scheme: str) -> float:
        # Rough weights are new weights at every depth, so one draw of them says little about the slope.
        seeds = range(5) if kind == "rough" else [1]
        return order(
            [statistics.geometric_mean([error(method, kind, scheme, n, seed) for seed in seeds]) for n in DEPTHS]
        )

    return measure


@pytest.mark.parametrize("scheme", ["euler", "heun"])
@pytest.mark.parametrize("kind", ["tied", "smooth", "alternating"])
def test_euler_gradient_is_of_order_1(gradient_order, kind, scheme):
    assert 0.8 <= gradient_order("euler", kind, scheme) <= 1.3


@pytest.mark.parametrize("scheme", ["euler", "heun"])
@pytest.mark.parametrize("kind", ["tied", "smooth", "alternating", "rough"])
def test_pc_gradient_is_of_order_2_without_smoothness(gradient_order, kind, scheme):
    assert gradient_order("pc", kind, scheme) >= 1.8


def test_pc_gains_an_order_from_its_modifier_where_the_field_is_smooth_in_depth(gradient_order):
    assert gradient_order("pc", "tied", "euler") >= 2.8


@pytest.mark.parametrize("kind", ["tied", "smooth"])
def test_heun_gradient_is_of_order_2_on_weights_smooth_in_depth(gradient_order, kind):
    assert gradient_order("heun", kind, "heun") >= 1.8


def test_heun_gradient_is_of_order_1_without_that_smoothness(gradient_order):
    assert 0.8 <= gradient_order("heun", "alternating", "heun") <= 1.3


def test_each_correction_adds_an_order(make_field, field_gradients, state):
    field = {depth: make_field("tied", depth) for depth in DEPTHS}

    def measured(corrections: int) -> float:
        errors = []
        for depth, f in field.items():
            step = StepPlan(Prediction.REVERSE_EULER, corrections=corrections)
            leaf = state.clone().requires_grad_()
            out = solve(f, SCHEMES["euler"], Plan("test", (), (step,) * depth), leaf, monitor=Monitor())
            found = torch.autograd.grad(out.square().sum() / 2, [leaf, *f.parameters()])
            errors.append(relative_error(list(found), field_gradients(f, Adjoint("backprop"), state)))
        return order(errors)

    assert 1.8 <= measured(1) <= 2.6
    assert 2.8 <= measured(2) <= 3.6


# --- the equations, in loops that share no code with the package -------------------------------------------


def functions(field: Field) -> list[Callable[[Tensor], Tensor]]:
    """r_0 … r_{N-1}, and r_N := r_{N-1}."""
    found = [field.residuals[b].module for b in field.schedule]
    return [*found, found[-1]]


def swept(field: Field, x: Tensor, advance, step_back) -> tuple[list[Tensor], Tensor]:
    """Gradients of ½‖x_N‖² with the state of each step from `step_back`, and the final x̃_0.

    advance(n, x_n) -> x_{n+1}; step_back(n, x_{n+1}) -> (state for the Jacobian, state to carry).
    """
    parameters = list(field.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    with torch.no_grad():
        for n in range(field.depth):
            x = advance(n, x)
    a = x
    for n in reversed(range(field.depth)):
        with torch.no_grad():
            at, x = step_back(n, x)
        leaf = at.clone().requires_grad_()
        a, *grads = torch.autograd.grad(advance(n, leaf), [leaf, *parameters], a, materialize_grads=True)
        total = [t + g for t, g in zip(total, grads, strict=True)]
    return [a, *total], x


@pytest.mark.parametrize("kind", ["tied", "rough"])
def test_euler_is_equations_6_and_7(kind, make_field, field_gradients, state):
    field = make_field(kind, 7, horizon=2.0)
    r, h = functions(field), 2.0 / 7

    def step_back(n, x_next):
        x = x_next - h * r[n](x_next)
        return x, x

    expected, x_0 = swept(field, state, lambda n, x: x + h * r[n](x), step_back)
    monitor = Monitor()
    assert_same(field_gradients(field, Adjoint("euler"), state, monitor=monitor), expected)
    assert monitor.drift.item() == pytest.approx(((x_0 - state).norm() / state.norm()).item(), rel=1e-10)


@pytest.mark.parametrize("kind", ["tied", "rough"])
def test_heun_is_equations_8_and_9(kind, make_field, field_gradients, state):
    field = make_field(kind, 7, horizon=2.0)
    r, h = functions(field), 2.0 / 7

    def advance(n, x):
        y = x + h * r[n](x)
        return x + h / 2 * (r[n](x) + r[n + 1](y))

    def step_back(n, x_next):
        y = x_next - h * r[n + 1](x_next)
        x = x_next - h / 2 * (r[n + 1](x_next) + r[n](y))
        return x, x

    expected, x_0 = swept(field, state, advance, step_back)
    monitor = Monitor()
    assert_same(field_gradients(field, Adjoint("heun"), state, scheme="heun", monitor=monitor), expected)
    assert monitor.drift.item() == pytest.approx(((x_0 - state).norm() / state.norm()).item(), rel=1e-10)


def mixed_by_least_squares(z: Tensor, g_z: Tensor, y: Tensor, g_y: Tensor) -> Tensor:
    """Anderson's depth-1 mixing with β from a general least-squares solver, image by image."""
    images = []
    for a, g_a, b, g_b in zip(z, g_z, y, g_y, strict=True):
        f_a, f_b = (g_a - a).flatten(), (g_b - b).flatten()
        beta = torch.linalg.lstsq((f_a - f_b)[:, None], -f_b[:, None]).solution.item()
        images.append((1 - beta) * g_b + beta * g_a)
    return torch.stack(images)


@pytest.mark.parametrize("kind", ["tied", "rough"])
def test_pc_modifies_its_prediction_and_carries_the_mixed_state(kind, make_field, field_gradients, state):
    field = make_field(kind, 7, horizon=2.0)
    r, h = functions(field), 2.0 / 7
    defect = torch.zeros_like(state)

    def step_back(n, x_next):
        nonlocal defect
        reverse_euler = x_next - h * r[n](x_next)
        predicted = reverse_euler + defect
        carried = mixed_by_least_squares(x_next, reverse_euler, predicted, x_next - h * r[n](predicted))
        defect = carried - reverse_euler
        return predicted, carried

    expected, x_0 = swept(field, state, lambda n, x: x + h * r[n](x), step_back)
    monitor = Monitor()
    assert_same(field_gradients(field, Adjoint("pc"), state, monitor=monitor), expected)
    assert monitor.drift.item() == pytest.approx(((x_0 - state).norm() / state.norm()).item(), rel=1e-8)


def test_anderson_minimises_the_mixed_residual_per_image():
    points = torch.randn(4, 4, 2, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(anderson(*points), mixed_by_least_squares(*points), rtol=1e-12, atol=1e-12)


def test_anderson_keeps_a_fixed_point():
    z = torch.randn(2, 3, dtype=torch.float64)
    assert torch.equal(anderson(z, z, z, z), z)
