"""Heun's rule, order 2 where r is smooth in x and in depth (equations 8 and 9 of Sander, Ablin, Peyré 2022).

Φ_n(x) = ½ (r_n(x) + r_{n+1}(x + h r_n(x)))
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..field import Evaluator
from .scheme import Scheme


def _increment(r: Evaluator, n: int, x: Tensor) -> Tensor:
    first = r.value(n, x, (n, 0))
    y = torch.add(x, first, alpha=r.field.step_size)
    second = r.value(min(n + 1, r.field.depth - 1), y, (n, 1))
    return (first + second) / 2


def _step_back(r: Evaluator, n: int, x_next: Tensor) -> Tensor:
    """Heun's rule with time reversed, equation 9. Local error O(h³) if r is smooth in depth."""
    h = r.field.step_size
    first = r.value(min(n + 1, r.field.depth - 1), x_next, (n, 1))
    y = torch.sub(x_next, first, alpha=h)
    second = r.value(n, y, (n, 0))
    return torch.sub(x_next, first + second, alpha=h / 2)


HEUN = Scheme("heun", 2, (0, 1), _increment, _step_back)
