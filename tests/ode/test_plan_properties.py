"""Every plan takes the gradient of every step once, from the last to the first, whatever its settings.

Hypothesis makes up the values.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resode_cli.ode import METHODS, SCHEMES, Adjoint, Field, Monitor, Residual, required_scheme, solve

SLOW = settings(deadline=None, derandomize=True, max_examples=60)


class Recorded(Residual):
    """tanh(w x), which notes when it is evaluated and when a gradient comes back through it."""

    def __init__(self, n: int, evaluated: list[int], differentiated: list[int]) -> None:
        self.module, self.n = nn.Linear(2, 2).double(), n
        self.evaluated, self.differentiated = evaluated, differentiated

    def __call__(self, x: Tensor) -> Tensor:
        self.evaluated.append(self.n)
        result = torch.tanh(self.module(x))
        if result.requires_grad:
            result.register_hook(lambda _: self.differentiated.append(self.n))
        return result


def backward_pass(adjoint: Adjoint, depth: int) -> tuple[list[int], list[int]]:
    """The steps that a backward pass evaluates, and those that it takes the gradient of, in their order."""
    evaluated: list[int] = []
    differentiated: list[int] = []
    residuals = tuple(Recorded(n, evaluated, differentiated) for n in range(depth))
    field, monitor = Field(residuals, tuple(range(depth)), 1 / depth), Monitor()
    x = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    out = solve(field, SCHEMES["euler"], adjoint.plan(depth, "euler"), x, monitor=monitor)
    evaluated.clear()
    out.sum().backward()
    assert monitor.evaluations == len(evaluated)
    return evaluated, differentiated


@SLOW
@given(
    st.sampled_from([method for method in METHODS if method != "backprop" and required_scheme(method) is None]),
    st.integers(1, 25),
    st.none() | st.integers(1, 30),
    st.integers(0, 2),
    st.none() | st.integers(1, 30),
)
def test_a_backward_pass_takes_every_step_once_from_the_last_to_the_first(
    method, depth, anchors, corrections, snapshots
):
    adjoint = Adjoint(
        method,
        None if method == "checkpoint" and snapshots is not None else anchors,
        0 if method == "checkpoint" else corrections,
        snapshots if method == "checkpoint" else None,
    )
    evaluated, differentiated = backward_pass(adjoint, depth)
    assert differentiated == list(reversed(range(depth)))
    if method == "checkpoint":
        assert len(evaluated) >= depth  # exactly how many, test_binomial.py says
    else:
        held = len(range(0, depth, anchors)) if anchors is not None else 0
        assert len(evaluated) <= held + (2 + corrections) * (depth - held)
