"""The rule of the paper's HeunNet (equations 8 and 9 of Sander, Ablin, Peyré 2022).

    Φ_n(x) = ½ (r_n(x) + r_{n+1}(x + h r_n(x))),   r_N := r_{N-1}

It takes the weights of step n for those at time nh. Of order 2 where they are sampled there and change smoothly with
depth; of order 1 on what `deepen` makes, where a step's weights are those in its middle, or of a run of steps: `heun`
is for these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..field import Evaluator
from .heun import trapezoid
from .scheme import Scheme


def _increment(r: Evaluator, n: int, x: Tensor) -> Tensor:
    return trapezoid(r, n, min(n + 1, r.field.depth - 1), x)


def _step_back(r: Evaluator, n: int, x_next: Tensor) -> Tensor:
    """The rule with time reversed, equation 9. Local error O(h³) if r is smooth in depth."""
    h = r.field.step_size
    first = r.value(min(n + 1, r.field.depth - 1), x_next, (n, 1))
    second = r.value(n, torch.sub(x_next, first, alpha=h), (n, 0))
    return torch.sub(x_next, first + second, alpha=h / 2)


HEUNNET = Scheme("heunnet", 2, (0, 1), _increment, _step_back)
