"""No rule of an ODE: x_{n+1} = r_n(x_n), for the parts of a network that are no residual steps.

A transition, or what comes before the first stage, is evaluated again like a step; its output may have another shape.
"""

from __future__ import annotations

from torch import Tensor

from ..field import Evaluator
from .scheme import Scheme


def _value(r: Evaluator, n: int, x: Tensor) -> Tensor:
    return r.value(n, x, (n, 0))


MAPPING = Scheme("mapping", 0, (0,), _value, advance_by=_value)
