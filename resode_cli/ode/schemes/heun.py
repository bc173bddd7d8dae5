"""Heun's rule, order 2 (Heun 1900).

    Φ_n(x) = ½ (r_n(x) + r_n(x + h r_n(x)))

Both evaluations use the weights of step n: a step's weights hold for the whole of its time, from nh to (n+1)h. Inside a
run of equal steps, as `deepen` makes them, and for weights that are sampled in the middle of each step, the order is 2.
For the rule of the paper, whose second evaluation uses r_{n+1}, see `heunnet`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..field import Evaluator
from .scheme import Scheme


def _increment(r: Evaluator, n: int, x: Tensor) -> Tensor:
    return trapezoid(r, n, n, x)


def trapezoid(r: Evaluator, n: int, following: int, x: Tensor) -> Tensor:
    """½ (r_n(x) + r_m(x + h r_n(x))), m: following."""
    first = r.value(n, x, (n, 0))
    second = r.value(following, torch.add(x, first, alpha=r.field.step_size), (n, 1))
    return (first + second) / 2


def _step_back(r: Evaluator, n: int, x_next: Tensor) -> Tensor:
    """The rule with time reversed. Local error O(h³), however the weights change with depth."""
    h = r.field.step_size
    first = r.value(n, x_next, (n, 1))
    second = r.value(n, torch.sub(x_next, first, alpha=h), (n, 0))
    return torch.sub(x_next, first + second, alpha=h / 2)


HEUN = Scheme("heun", 2, (0, 0), _increment, _step_back)
