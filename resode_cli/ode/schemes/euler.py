"""The explicit Euler rule, order 1: a residual block, where h = 1 (equation 1 of Sander, Ablin, Peyré 2022).

Φ_n(x) = r_n(x)
"""

from __future__ import annotations

from torch import Tensor

from ..field import Evaluator
from .scheme import Scheme


def _increment(r: Evaluator, n: int, x: Tensor) -> Tensor:
    return r.value(n, x, (n, 0))


def _advance(r: Evaluator, n: int, x: Tensor) -> Tensor:
    """At h = 1 the block itself, to the last bit."""
    return r.step(n, x, (n, 0))


# It has no step back of its own: reverse Euler, x̂_n = x_{n+1} − h r_n(x_{n+1}), equation 6, is the first iterate of the
# fixed-point iteration that reverses any rule.
EULER = Scheme("euler", 1, (0,), _increment, advance_by=_advance)
