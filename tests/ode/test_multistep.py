"""Multistep against a loop written here, what it costs, and what it must not extrapolate.

x: state; h: step size; n: step; N: depth; Φ_n: increment of the forward rule; r_n: residual function of step n.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from resode_cli.ode import METHODS, SCHEMES, Adjoint, Field, Monitor, required_scheme

RUNS = (0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def make_runs(make_field) -> Field:
    """Three distinct blocks, in runs of 4, 3 and 4 steps."""

    def make() -> Field:
        return Field(make_field("rough", 3).residuals, RUNS, 2.0 / len(RUNS))

    return make


def increments(field: Field, scheme: str):
    """Φ_0 … Φ_{N-1} as functions, and which blocks each is made of."""
    h = field.step_size
    follows = [*field.schedule[1:], field.schedule[-1]]  # r_N := r_{N-1}
    r = [residual.module for residual in field.residuals]

    def heun(a: int, b: int):
        return lambda x: (r[a](x) + r[b](x + h * r[a](x))) / 2

    if scheme == "euler":
        return [r[b] for b in field.schedule], [(b,) for b in field.schedule]
    pairs = list(zip(field.schedule, follows if scheme == "heunnet" else field.schedule, strict=True))
    return [heun(a, b) for a, b in pairs], pairs


def by_hand(field: Field, x: Tensor, *, scheme: str, every: int | None, corrections: int):
    """Gradients of ½‖x_N‖², drift, and evaluations of Φ of the sweep."""
    phi, made_of = increments(field, scheme)
    h, depth = field.step_size, field.depth
    x_ = [x]
    with torch.no_grad():
        for n in range(depth):
            x_.append(x_[n] + h * phi[n](x_[n]))
    v = [(x_[n + 1] - x_[n]) / h for n in range(depth)]

    def smooth(n: int) -> bool:
        second = (v[n] - 2 * v[n + 1] + v[n + 2]).norm()
        return bool(second <= v[n].norm() / 4 and second <= (v[n + 1] - v[n]).norm() / 2)

    anchors = set(range(0, depth, every)) if every else set()
    parameters = list(field.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    a, estimate, count, drifts = x_[depth], x_[depth], 0, []
    taped: dict[int, Tensor] = {}
    at_estimate: dict[int, Tensor] = {}
    for n in reversed(range(depth)):
        run_goes_on = n + 1 < depth and made_of[n] == made_of[n + 1]
        with torch.no_grad():
            if n in anchors:
                drifts.append((estimate - x_[n + 1]).norm() / x_[n + 1].norm())
                at = x_[n]
            else:
                if run_goes_on and n + 1 in at_estimate:
                    at = estimate - h * (2 * taped[n + 1] - at_estimate[n + 1])
                elif n + 2 < depth and (run_goes_on and made_of[n] == made_of[n + 2]):
                    at = estimate - h * (2 * taped[n + 1] - taped[n + 2])
                elif n + 2 < depth and not run_goes_on and smooth(n):
                    at = estimate - h * (2 * taped[n + 1] - taped[n + 2])
                else:
                    at_estimate[n] = phi[n](estimate)
                    count += 1
                    at = estimate - h * at_estimate[n]
                for _ in range(corrections):
                    at = estimate - h * phi[n](at)
                    count += 1
        leaf = at.clone().requires_grad_()
        value = phi[n](leaf)
        count += 1
        back, *grads = torch.autograd.grad(leaf + h * value, [leaf, *parameters], a, materialize_grads=True)
        a, total = back, [t + g for t, g in zip(total, grads, strict=True)]
        taped[n] = value.detach()
        estimate = at if n in anchors else estimate - h * taped[n]
    if 0 not in anchors:
        drifts.append((estimate - x).norm() / x.norm())
    return [a, *total], max(d.item() for d in drifts), count


@pytest.mark.parametrize("corrections", [0, 1])
@pytest.mark.parametrize("every", [None, 3, 4])
@pytest.mark.parametrize("kind", ["tied", "runs", "smooth", "alternating", "rough", "half"])
@pytest.mark.parametrize("scheme", ["euler", "heun", "heunnet"])
def test_multistep_is_the_loop(scheme, kind, every, corrections, make_field, make_runs, field_gradients, state):
    field = make_runs() if kind == "runs" else make_field(kind, 16, horizon=2.0)
    expected, drift, count = by_hand(field, state, scheme=scheme, every=every, corrections=corrections)
    monitor = Monitor()
    adjoint = Adjoint("multistep", every, corrections)
    assert_same(field_gradients(field, adjoint, state, scheme=scheme, monitor=monitor), expected)
    assert monitor.drift.item() == pytest.approx(drift, rel=1e-6, abs=1e-15)
    assert monitor.evaluations == count * SCHEMES[scheme].evaluations


def test_on_rough_weights_it_is_reverse_euler_with_the_corrected_state_carried(
    make_field, field_gradients, swept, state
):
    field = make_field("rough", 9, horizon=2.0)
    r, h = [residual.module for residual in field.residuals], 2.0 / 9

    def step_back(n, x_next):
        x = x_next - h * r[n](x_next)
        return x, x_next - h * r[n](x)

    expected, _ = swept(field, state, lambda n, x: x + h * r[n](x), step_back)
    assert_same(field_gradients(field, Adjoint("multistep"), state), expected)


# --- cost --------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluations(field_gradients, state):
    def count(field: Field, adjoint: Adjoint, scheme: str = "euler", x: Tensor = state) -> int:
        monitor = Monitor()
        field_gradients(field, adjoint, x, scheme=scheme, monitor=monitor)
        assert monitor.evaluations == sum(residual.module.calls for residual in field.residuals)
        return monitor.evaluations

    return count


@pytest.mark.parametrize("corrections", [0, 1, 2])
@pytest.mark.parametrize("depth", [1, 2, 3, 10])
def test_tied_steps_cost_one_evaluation_each_and_one_more(depth, corrections, make_field, evaluations):
    field = make_field("tied", depth)
    assert evaluations(field, Adjoint("multistep", corrections=corrections)) == depth + 1 + corrections * depth
    assert evaluations(field, Adjoint("multistep"), "heun") == 2 * (depth + 1)


def test_each_run_costs_one_evaluation_more(make_runs, evaluations):
    assert evaluations(make_runs(), Adjoint("multistep")) == len(RUNS) + 3


def test_rough_weights_cost_two_evaluations_per_step(make_field, evaluations):
    field = make_field("rough", 20)
    assert evaluations(field, Adjoint("multistep")) == 2 * 20
    assert evaluations(field, Adjoint("multistep", corrections=1)) == 3 * 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("depth", [32, 100])
def test_weights_smooth_in_depth_cost_one_evaluation_per_step(depth, dtype, make_field, evaluations, state):
    field = make_field("smooth", depth)
    for module in field.modules():
        module.to(dtype)
    assert evaluations(field, Adjoint("multistep"), x=state.to(dtype)) == depth + 2


def test_what_is_smooth_is_found_step_by_step(make_field, evaluations):
    # Below the middle the weights are independent; above, one evaluation per step and two more at the top.
    assert evaluations(make_field("half", 64), Adjoint("multistep")) == 2 * 32 + 32 + 2


class Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.calls = nn.Parameter(torch.tensor(value, dtype=torch.float64)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.value.expand_as(x)


@pytest.mark.parametrize(
    ("change", "second", "extrapolated"),
    [(0.5, 0.2, True), (0.5, -0.2, True), (0.7, 0.3, False), (0.7, -0.3, False), (0.2, 0.08, True), (0.2, 0.12, False)],
)
def test_an_extrapolation_must_recover_most_of_a_step_and_be_better_than_the_last_value(
    change, second, extrapolated, as_field, evaluations
):
    # The two steps above have no others to be extrapolated from.
    values = (1.0, 1.0 + change, 1.0 + 2 * change + second)
    field = as_field([Constant(value) for value in values], range(3), 0.1)
    assert evaluations(field, Adjoint("multistep")) == 2 * 2 + (1 if extrapolated else 2)


def test_corrections_cost_one_evaluation_each(make_field, evaluations):
    field = make_field("rough", 6)
    for method in ("euler", "pc"):
        for k in (0, 1, 2):
            assert evaluations(field, Adjoint(method, corrections=k)) == (2 + k) * 6
    assert evaluations(field, Adjoint("heun", corrections=2), "heun") == 2 * (2 + 2) * 6
    assert evaluations(field, Adjoint("pc", 2, corrections=2)) == 3 * 1 + 3 * 4


# --- random layers -----------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Drops units of its branch, and notes the masks it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5, dtype=torch.float64)
        self.masks: list[Tensor] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        mask = torch.bernoulli(torch.full_like(x, 0.5))
        self.masks.append(mask)
        return torch.tanh(self.linear(x)) * mask * 2


@pytest.mark.parametrize("method", METHODS[1:])
def test_every_evaluation_of_a_step_sees_the_forward_pass_masks(method, as_field, field_gradients, state):
    block, depth = Masked(), 6
    field = as_field([block], (0,) * depth, 1 / depth)
    adjoint = Adjoint(method, anchors=3 if method == "checkpoint" else None)
    scheme = required_scheme(method) or "euler"
    field_gradients(field, adjoint, state, scheme=scheme)
    slots = SCHEMES[scheme].evaluations
    forward, backward = block.masks[: depth * slots], block.masks[depth * slots :]
    assert len(backward) == {"checkpoint": 4 + depth}.get(method, 2 * depth * slots)
    assert not any(torch.equal(a, b) for a, b in zip(forward, forward[1:], strict=False))
    if method == "checkpoint":
        order = [3, 4, 5, 4, 3, 0, 1, 2, 1, 0]
    elif method in ("heun", "heunnet"):
        order = [k for n in reversed(range(depth)) for k in (2 * n + 1, 2 * n, 2 * n, 2 * n + 1)]
    elif required_scheme(method):  # a step back evaluates in the order of a step
        order = [slots * n + k for n in reversed(range(depth)) for _ in range(2) for k in range(slots)]
    else:  # never extrapolated from another step's mask: each step is evaluated at the estimate, then on the tape
        order = [n for n in reversed(range(depth)) for _ in range(2)]
    assert all(torch.equal(mask, forward[n]) for mask, n in zip(backward, order, strict=True))


def test_masks_do_not_stop_extrapolation_in_the_steps_without(as_field, make_field, field_gradients, state):
    calm = make_field("tied", 1).residuals[0].module
    field = as_field([calm, Masked()], (0,) * 6 + (1,) * 4, 1 / 10)
    field_gradients(field, Adjoint("multistep"), state)
    assert [residual.module.calls for residual in field.residuals] == [6 + 1, 2 * 4]


class LuckyMasked(Masked):
    """Drops whole images of its branch, but never one of the first four."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        keep = torch.bernoulli(torch.full((len(x), 1), 0.5, dtype=x.dtype)) * 2
        keep[:4] = 1
        return torch.tanh(self.linear(x)) * keep


def test_masks_that_agree_on_the_probed_images_are_still_masks(as_field, field_gradients):
    field, x = as_field([LuckyMasked()], (0,) * 8, 1 / 8), torch.randn(12, 5, dtype=torch.float64)
    monitor = Monitor()
    field_gradients(field, Adjoint("multistep"), x, monitor=monitor)
    assert monitor.evaluations == 2 * 8


def test_slight_roughness_does_not_cost_the_order(as_field, make_field, field_gradients, state):
    # A, A + δ, A, A + δ, …: with h → 0 the roughness outgrows what the weights change by in one step.
    errors = []
    for depth in (16, 256):
        torch.manual_seed(0)
        a = make_field("tied", 1).residuals[0].module
        b = copy.deepcopy(a)
        with torch.no_grad():
            b.weight += 0.02 * torch.randn_like(b.weight)
        field = as_field([a, b], [n % 2 for n in range(depth)], 1 / depth)
        truth = field_gradients(field, Adjoint("backprop"), state)
        found = field_gradients(field, Adjoint("multistep"), state)
        error = sum((f - t).square().sum() for f, t in zip(found, truth, strict=True))
        errors.append((error / sum(t.square().sum() for t in truth)).sqrt().item())
    assert errors[0] / errors[1] >= 16**1.7
