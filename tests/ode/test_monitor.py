"""The monitor's figures against a loop written here, and what they say of a reversal that fails.

x: state; h: step size; n: step; N: depth; G(x) = x_{n+1} − h Φ_n(x).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from resode_cli.ode import EULER, Adjoint, Field, Monitor, solve
from resode_cli.ode.sweep import anderson

FEW = 4  # images that the local figures are taken from


class Linear(nn.Module):
    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T


@pytest.fixture
def batch() -> Tensor:
    """Eight images of five numbers, the last four large."""
    x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    x[FEW:] *= 100
    return x


@pytest.fixture
def monitored(field_gradients):
    def run(field: Field, adjoint: Adjoint, x: Tensor) -> Monitor:
        monitor = Monitor()
        field_gradients(field, adjoint, x, monitor=monitor)
        return monitor

    return run


def by_hand(field: Field, x: Tensor, *, corrected: bool, corrections: int, images: slice) -> tuple[float, float]:
    """Largest correction and contraction of reverse Euler, carrying the prediction or the corrected state."""
    r, h = [field.residuals[b].module for b in field.schedule], field.step_size
    with torch.no_grad():
        for f in r:
            x = x + h * f(x)
        changes, ratios = [], []
        for f in reversed(r):
            iterates = [x]
            for _ in range(1 + corrections):
                iterates.append(x - h * f(iterates[-1]))
            last, at = iterates[-2][images], iterates[-1][images]
            following = x - h * f(iterates[-1])
            changes.append((following[images] - at).norm() / at.norm())
            ratios.append(h * (f(last) - f(at)).norm() / (last - at).norm())
            x = following if corrected else iterates[-1]
    return max(changes).item(), max(ratios).item()


@pytest.mark.parametrize("corrections", [0, 2])
@pytest.mark.parametrize(("method", "corrected"), [("euler", False), ("multistep", True)])
def test_local_figures_are_those_of_the_first_images(method, corrected, corrections, make_field, monitored, batch):
    field = make_field("rough", 6, horizon=2.0)  # where multistep steps back by reverse Euler
    monitor = monitored(field, Adjoint(method, corrections=corrections), batch)
    few, every = (
        by_hand(field, batch, corrected=corrected, corrections=corrections, images=images)
        for images in (slice(FEW), slice(None))
    )
    assert (monitor.correction.item(), monitor.contraction.item()) == pytest.approx(few, rel=1e-6)
    assert few != pytest.approx(every, rel=1e-3), "all images would give another figure"


def test_local_figures_of_pc(make_field, monitored, state):
    field = make_field("tied", 2, horizon=1.0)
    f, h = field.residuals[0].module, 0.5
    with torch.no_grad():
        x = state + h * f(state)
        x = x + h * f(x)
        # The top step is reverse Euler's, mixed; its defect modifies the prediction of the step below.
        predicted = x - h * f(x)
        following = x - h * f(predicted)
        below = anderson(x, predicted, predicted, following)
        modified = below - h * f(below) + (below - predicted)
        at, last, nexts = (predicted, modified), (x, below), (following, below - h * f(modified))
        changes = [((g - a).norm() / a.norm()).item() for g, a in zip(nexts, at, strict=True)]
        ratios = [(h * (f(z) - f(a)).norm() / (z - a).norm()).item() for z, a in zip(last, at, strict=True)]
    monitor = monitored(field, Adjoint("pc"), state)
    assert monitor.correction.item() == pytest.approx(max(changes), rel=1e-9)
    assert monitor.contraction.item() == pytest.approx(max(ratios), rel=1e-9)


def test_local_figures_do_not_see_the_other_images(make_field, monitored, batch):
    field = make_field("tied", 6, horizon=2.0)
    for adjoint in (Adjoint("pc"), Adjoint("multistep", corrections=1), Adjoint("euler", 2)):
        whole, few = monitored(field, adjoint, batch), monitored(field, adjoint, batch[:FEW])
        assert whole.correction.item() == pytest.approx(few.correction.item(), rel=1e-9)
        assert whole.contraction.item() == pytest.approx(few.contraction.item(), rel=1e-9)
        assert whole.drift.item() != pytest.approx(few.drift.item(), rel=1e-3)  # which is of all


@pytest.mark.parametrize(
    "adjoint",
    [Adjoint("euler"), Adjoint("pc"), Adjoint("pc", corrections=2), Adjoint("euler", 3), Adjoint("multistep")],
    ids=lambda adjoint: adjoint.label,
)
def test_contraction_of_a_linear_field_is_within_its_norms(adjoint, as_field, monitored, batch):
    matrix = torch.randn(5, 5, dtype=torch.float64) / 3
    monitor = monitored(as_field([Linear(matrix)], (0,) * 8, 0.3), adjoint, batch)
    sigma = torch.linalg.svdvals(matrix)
    assert 0.3 * sigma.min() <= monitor.contraction.item() <= 0.3 * sigma.max()


@pytest.mark.parametrize("product", [0.8, -0.8, 1.25, -1.25])
def test_from_a_contraction_of_one_on_corrections_make_it_worse(product, as_field, monitored, batch):
    # Φ(x) = λ x: the iteration x ← x_{n+1} − h λ x has the factor −h λ.
    matrix = product / 0.5 * torch.eye(5, dtype=torch.float64)
    field = as_field([Linear(matrix)], (0,), 0.5)
    found = [monitored(field, Adjoint("euler", corrections=k), batch) for k in range(4)]
    assert [m.contraction.item() for m in found] == pytest.approx([abs(product)] * 4)
    drifts = [m.drift.item() for m in found]
    assert (drifts == sorted(drifts)) == (abs(product) > 1)
    assert (drifts == sorted(drifts, reverse=True)) == (abs(product) < 1)


def test_the_correction_estimates_the_local_error(make_field, monitored, state):
    # At the top step the carried state is exact, and what another iterate changes is the error but for O(h).
    field = make_field("rough", 1, horizon=0.01)
    monitor = monitored(field, Adjoint("euler"), state)
    assert monitor.correction.item() == pytest.approx(monitor.drift.item(), rel=0.02)


@pytest.mark.parametrize(
    "adjoint",
    [
        Adjoint("backprop"),
        Adjoint("checkpoint"),
        Adjoint("checkpoint", 3),
        Adjoint("checkpoint", snapshots=2),
        Adjoint("multistep", 1),
    ],
    ids=lambda adjoint: adjoint.label,
)
def test_exact_plans_have_nothing_to_tell(adjoint, make_field, field_gradients, state):
    old = torch.tensor(1.0)
    monitor = Monitor(drift=old, correction=old, contraction=old)  # as if left by an earlier pass
    field_gradients(make_field("rough", 7), adjoint, state, monitor=monitor)
    assert (monitor.drift, monitor.correction, monitor.contraction) == (None, None, None)


def test_a_forward_pass_forgets_the_last_backward(make_field, monitored, state):
    field = make_field("tied", 5)
    monitor = monitored(field, Adjoint("pc"), state)
    assert monitor.evaluations and monitor.drift is not None
    solve(field, EULER, Adjoint("pc").plan(5, "euler"), state.clone().requires_grad_(), monitor=monitor)
    assert (monitor.drift, monitor.correction, monitor.contraction, monitor.evaluations) == (None, None, None, 0)


# --- failures must show ------------------------------------------------------------------------------------

REVERSING = [Adjoint("euler"), Adjoint("pc"), Adjoint("multistep"), Adjoint("pc", 3), Adjoint("multistep", None, 1)]


class Trap(nn.Module):
    """tanh, until it is set to return a number instead for the images from `first` on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5, dtype=torch.float64)
        self.first, self.poison = 0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        value = torch.tanh(self.linear(x))
        if self.poison:
            value = value.clone()
            value[self.first :] = self.poison
        return value


@pytest.mark.parametrize("adjoint", REVERSING, ids=lambda adjoint: adjoint.label)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_figures_of_a_reversal_that_leaves_the_numbers_are_not_finite(poison, adjoint, as_field, batch):
    for first, seen in ((0, True), (FEW, False)):
        trap, monitor = Trap(), Monitor()
        field = as_field([trap], (0,) * 7, 0.1)
        out = solve(field, EULER, adjoint.plan(7, "euler"), batch.clone().requires_grad_(), monitor=monitor)
        trap.first, trap.poison = first, poison
        out.sum().backward()
        assert not math.isfinite(monitor.drift.item()), "drift is of every image"
        assert math.isfinite(monitor.correction.item()) != seen
        assert math.isfinite(monitor.contraction.item()) != seen


@pytest.mark.parametrize("adjoint", [Adjoint("euler"), Adjoint("euler", corrections=1), Adjoint("multistep")])
def test_a_reversal_that_overflows_shows(adjoint, as_field, batch):
    # x_{n+1} = -2 x_n, but reverse Euler multiplies by 4: float32 ends at 3e38, after the 2^60 of the forward pass.
    field, monitor = as_field([Linear(-3 * torch.eye(5))], (0,) * 60, 1.0), Monitor()
    x = batch.float().requires_grad_()
    out = solve(field, EULER, adjoint.plan(60, "euler"), x, monitor=monitor)
    assert out.isfinite().all()
    out.sum().backward()
    assert not math.isfinite(monitor.drift.item())
    assert not monitor.correction.item() < 1
    assert not monitor.contraction.item() < 1


# --- no waiting for the device -----------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts what would make the host wait: a tensor's value read as a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["tied", "rough"])
@pytest.mark.parametrize(
    "adjoint",
    [Adjoint("checkpoint", snapshots=2), Adjoint("euler"), Adjoint("pc", 3), Adjoint("multistep")],
    ids=lambda adjoint: adjoint.label,
)
def test_no_value_is_read_on_the_way(adjoint, kind, make_field, batch):
    monitor, x = Monitor(), batch.clone().requires_grad_()
    field = make_field(kind, 6)
    with Reads() as reads:
        solve(field, EULER, adjoint.plan(6, "euler"), x, monitor=monitor).sum().backward()
        assert reads.count == 0
        x.sum().item()
    assert reads.count == 1, "the test itself sees reads"
    figures = [monitor.drift, monitor.correction, monitor.contraction]
    assert all(figure is None or (isinstance(figure, Tensor) and figure.ndim == 0) for figure in figures)
    assert (None in figures) == (adjoint.method == "checkpoint")
