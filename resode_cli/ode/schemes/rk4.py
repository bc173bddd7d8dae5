"""The classical Runge-Kutta rule, order 4 (Kutta 1901).

    k_1 = r_n(x)    k_2 = r_n(x + h/2 k_1)    k_3 = r_n(x + h/2 k_2)    k_4 = r_n(x + h k_3)
    Φ_n(x) = (k_1 + 2 k_2 + 2 k_3 + k_4) / 6

All evaluations use the weights of step n: a step's weights hold for the whole of its time, from nh to (n+1)h. The order
is 4 inside a run of equal steps, as `deepen` makes them, and 2 across weights that change smoothly with depth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..field import Evaluator
from .scheme import Scheme


def _increment(r: Evaluator, n: int, x: Tensor) -> Tensor:
    return _stages(r, n, x, r.field.step_size)


def _stages(r: Evaluator, n: int, x: Tensor, h: float) -> Tensor:
    k_1 = r.value(n, x, (n, 0))
    k_2 = r.value(n, torch.add(x, k_1, alpha=h / 2), (n, 1))
    k_3 = r.value(n, torch.add(x, k_2, alpha=h / 2), (n, 2))
    k_4 = r.value(n, torch.add(x, k_3, alpha=h), (n, 3))
    return (k_1 + 2 * k_2 + 2 * k_3 + k_4) / 6


def _step_back(r: Evaluator, n: int, x_next: Tensor) -> Tensor:
    """The rule with time reversed, its increment taken with −h. Local error O(h⁵)."""
    h = r.field.step_size
    return torch.sub(x_next, _stages(r, n, x_next, -h), alpha=h)


RK4 = Scheme("rk4", 4, (0, 0, 0, 0), _increment, _step_back)
