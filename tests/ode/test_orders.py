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

from resode_cli.ode import SCHEMES, Adjoint, Field, Monitor, solve
from resode_cli.ode.sweep import anderson

DEPTHS = (8, 16, 32, 64, 128)


def order(errors: list[float]) -> float:
    """p in error ~ N^-p over DEPTHS, or the first of them."""
    depths = DEPTHS[: len(errors)]
    return -statistics.linear_regression([math.log(n) for n in depths], [math.log(e) for e in errors]).slope


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


def forward_errors(
    scheme: str, as_field: Callable[..., Field], x: Tensor, scale: Callable[[float], float], exact, place: float = 0.0
):
    matrix = torch.randn(x.shape[1], x.shape[1], dtype=torch.float64) / 2
    truth = x @ torch.linalg.matrix_exp(matrix * exact).T
    errors = []
    for depth in DEPTHS:
        blocks = [Linear(matrix, scale((n + place) / depth)) for n in range(depth)]
        field = as_field(blocks, range(depth), 1 / depth)
        out = solve(field, SCHEMES[scheme], None, x, monitor=Monitor())
        errors.append(relative_error([out], [truth]))
    return errors


@pytest.mark.parametrize(("scheme", "expected"), [("euler", 1), ("heun", 2), ("heunnet", 2)])
def test_forward_order_against_the_matrix_exponential(scheme, expected, as_field, state):
    errors = forward_errors(scheme, as_field, state, lambda t: 1.0, 1.0)
    assert order(errors) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize(
    ("scheme", "place", "expected"),
    [("euler", 0.0, 1), ("heunnet", 0.0, 2), ("heunnet", 0.5, 1), ("heun", 0.5, 2), ("heun", 0.0, 1), ("rk4", 0.5, 2)],
)
def test_forward_order_against_a_time_dependent_flow(scheme, place, expected, as_field, state):
    """x' = cos(t) A x has the flow exp(sin(t) A). place: where in a step its weights are sampled.

    At its beginning r_{n+1} matters, and r_N := r_{N-1} must not cost the order; in its middle, r_n must do.
    """
    errors = forward_errors(scheme, as_field, state, math.cos, math.sin(1.0), place=place)
    assert order(errors) == pytest.approx(expected, abs=0.25)


# --- gradients ---------------------------------------------------------------------------------------------


@pytest.fixture
def gradient_orders(make_field, field_gradients, state):
    """The order of a method with 0, 1, … corrections."""

    def errors(method: str, kind: str, scheme: str, corrections: int, depth: int, seed: int) -> list[float]:
        torch.manual_seed(seed)
        field = make_field(kind, depth)
        truth = field_gradients(field, Adjoint("backprop"), state, scheme=scheme)
        adjoints = [Adjoint(method, corrections=k) for k in range(corrections + 1)]
        return [relative_error(field_gradients(field, a, state, scheme=scheme), truth) for a in adjoints]

    def measure(method: str, kind: str, scheme: str = "euler", *, corrections: int = 0) -> list[float]:
        # Rough weights are new weights at every depth, so one draw of them says little about the slope.
        seeds, depths = (range(5), DEPTHS[:4]) if kind == "rough" else ([1], DEPTHS)
        by_depth = []
        for depth in depths:
            drawn = [errors(method, kind, scheme, corrections, depth, seed) for seed in seeds]
            by_depth.append([statistics.geometric_mean(column) for column in zip(*drawn, strict=True)])
        return [order(list(column)) for column in zip(*by_depth, strict=True)]

    return measure


@pytest.mark.parametrize("scheme", ["euler", "heun"])
@pytest.mark.parametrize("kind", ["tied", "smooth", "alternating"])
def test_euler_gradient_is_of_order_1(gradient_orders, kind, scheme):
    assert 0.8 <= gradient_orders("euler", kind, scheme)[0] <= 1.4


@pytest.mark.parametrize(
    ("method", "kind"), [("pc", "alternating"), ("multistep", "alternating"), ("multistep", "rough")]
)
def test_a_carried_correction_gives_order_2_without_smoothness(gradient_orders, kind, method):
    assert gradient_orders(method, kind, "heun")[0] >= 1.8  # and for the Euler rule below


@pytest.mark.parametrize("method", ["pc", "multistep"])
@pytest.mark.parametrize("kind", ["tied", "smooth", "runs"])
def test_modifier_and_extrapolation_give_order_3_where_the_field_is_smooth_in_depth(gradient_orders, kind, method):
    assert gradient_orders(method, kind, "heun")[0] >= 2.75  # and for the Euler rule below


@pytest.mark.parametrize("scheme", ["heun", "heunnet"])
@pytest.mark.parametrize("kind", ["tied", "smooth"])
def test_heun_gradient_is_of_order_2_on_weights_smooth_in_depth(gradient_orders, kind, scheme):
    assert gradient_orders(scheme, kind, scheme)[0] >= 1.8


@pytest.mark.parametrize(("scheme", "least", "most"), [("heunnet", 0.8, 1.3), ("heun", 1.8, 3.3)])
def test_without_that_smoothness_only_the_rule_within_a_step_keeps_it(gradient_orders, scheme, least, most):
    assert least <= gradient_orders(scheme, "alternating", scheme)[0] <= most


@pytest.mark.parametrize(
    ("method", "kind", "scheme", "least"),
    [
        ("euler", "tied", "euler", 1),
        ("pc", "tied", "euler", 3),
        ("multistep", "tied", "euler", 3),
        ("euler", "alternating", "euler", 1),
        ("pc", "alternating", "euler", 2),
        ("multistep", "alternating", "euler", 2),
        ("pc", "rough", "euler", 2),
        ("pc", "smooth", "euler", 3),
        ("multistep", "smooth", "euler", 3),
        ("multistep", "runs", "euler", 3),
        ("heunnet", "alternating", "heunnet", 1),
        ("heun", "alternating", "heun", 2),
    ],
)
def test_each_correction_adds_an_order(gradient_orders, method, kind, scheme, least):
    orders = gradient_orders(method, kind, scheme, corrections=2)
    assert all(found >= least + k - 0.2 for k, found in enumerate(orders))
    assert [b - a for a, b in zip(orders, orders[1:], strict=False)] == pytest.approx([1, 1], abs=0.2)


# --- the equations, in loops that share no code with the package -------------------------------------------


def functions(field: Field) -> list[Callable[[Tensor], Tensor]]:
    """r_0 … r_{N-1}, and r_N := r_{N-1}."""
    found = [field.residuals[b].module for b in field.schedule]
    return [*found, found[-1]]


@pytest.mark.parametrize("kind", ["tied", "rough"])
def test_euler_is_equations_6_and_7(kind, make_field, field_gradients, swept, state):
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
@pytest.mark.parametrize(("scheme", "further"), [("heunnet", 1), ("heun", 0)])
def test_heunnet_is_equations_8_and_9_and_heun_the_same_within_a_step(
    scheme, further, kind, make_field, field_gradients, swept, state
):
    field = make_field(kind, 7, horizon=2.0)
    r, h = functions(field), 2.0 / 7

    def advance(n, x):
        y = x + h * r[n](x)
        return x + h / 2 * (r[n](x) + r[n + further](y))

    def step_back(n, x_next):
        y = x_next - h * r[n + further](x_next)
        x = x_next - h / 2 * (r[n + further](x_next) + r[n](y))
        return x, x

    expected, x_0 = swept(field, state, advance, step_back)
    monitor = Monitor()
    assert_same(field_gradients(field, Adjoint(scheme), state, scheme=scheme, monitor=monitor), expected)
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
def test_pc_modifies_its_prediction_and_carries_the_mixed_state(kind, make_field, field_gradients, swept, state):
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
