"""One step in place of several Euler steps of the same residual function: what stands for a deep stage in a fit.

k Euler steps of h/k with one r give

    (I + (h/k) r)^k (x) = x + h r(x) + h² (k-1)/(2k) r'(x) r(x) + O(h³),

of which two evaluations have all that is written out:

    Φ_n(x) = (1 - w) r_n(x) + w r_n(x + h r_n(x)),   w = (k-1)/(2k).

k = 1 is Euler's rule, k → ∞ Heun's. So a network of few such steps does what one of many Euler steps does, much more
nearly than one of few Euler steps, and costs as little.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..field import Evaluator
from .scheme import Scheme


def composed_euler(counts: Mapping[int, float], finer: float) -> Scheme:
    """The rule of a stage that stands for one of `finer` times as many Euler steps over the same time.

    counts: for each distinct block, how many of those a step of it stands for, k; no integer where runs of steps are
    not equally long. A step takes the time of k of them, whatever the others take.
    """

    def increment(r: Evaluator, n: int, x: Tensor) -> Tensor:
        k = counts[r.field.schedule[n]]
        first = r.value(n, x, (n, 0))
        if k <= 1:
            return first * (k / finer)
        second = r.value(n, torch.add(x, first, alpha=r.field.step_size * k / finer), (n, 1))
        return torch.lerp(first, second, (k - 1) / (2 * k)) * (k / finer)

    return Scheme("composed-euler", 2, (0, 0), increment)
