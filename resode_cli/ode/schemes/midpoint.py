"""The explicit midpoint rule, order 2 (Runge 1895).

    Φ_n(x) = r_n(x + h/2 r_n(x))

Both evaluations use the weights of step n: a step's weights hold for the whole of its time, from nh to (n+1)h. Inside a
run of equal steps, as `deepen` makes them, and for weights that are sampled in the middle of each step, the order is 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..field import Evaluator
from .scheme import Scheme


def _increment(r: Evaluator, n: int, x: Tensor) -> Tensor:
    first = r.value(n, x, (n, 0))
    return r.value(n, torch.add(x, first, alpha=r.field.step_size / 2), (n, 1))


def _step_back(r: Evaluator, n: int, x_next: Tensor) -> Tensor:
    """The rule with time reversed: x_{n+1} − h r_n(x_{n+1} − h/2 r_n(x_{n+1})). Local error O(h³)."""
    h = r.field.step_size
    first = r.value(n, x_next, (n, 0))
    second = r.value(n, torch.sub(x_next, first, alpha=h / 2), (n, 1))
    return torch.sub(x_next, second, alpha=h)


MIDPOINT = Scheme("midpoint", 2, (0, 0), _increment, _step_back)
