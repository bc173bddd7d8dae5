"""Forward rules of a stage and their own approximate reversals.

x: state; h: step size; n: step; N: depth; r_n: residual function of step n; r_N := r_{N-1}.
Equation numbers are those of Sander, Ablin, Peyré (NeurIPS 2022).

Every rule is written as x_{n+1} = x_n + h Φ_n(x_n), with Φ the increment function, which is
what the backward sweep differentiates and what a fixed-point correction evaluates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .field import Evaluator


@dataclass(frozen=True)
class Scheme:
    """One forward rule. `evaluations` is the number of branch evaluations in one increment."""

    name: str
    order: int
    evaluations: int
    advance: Callable[[Evaluator, int, Tensor], Tensor]
    increment: Callable[[Evaluator, int, Tensor], Tensor]
    step_back: Callable[[Evaluator, int, Tensor], Tensor]

    def blocks(self, schedule: Sequence[int], n: int) -> tuple[int, ...]:
        """The distinct blocks that Φ_n is made of: r_n, and for a second evaluation r_{n+1}."""
        return tuple(schedule[min(n + k, len(schedule) - 1)] for k in range(self.evaluations))


def _euler_advance(r: Evaluator, n: int, x: Tensor) -> Tensor:
    return r.step(n, x, (n, 0))


def _euler_increment(r: Evaluator, n: int, x: Tensor) -> Tensor:
    return r.value(n, x, (n, 0))


def reverse_euler(
    increment: Callable[[Evaluator, int, Tensor], Tensor], r: Evaluator, n: int, x_next: Tensor
) -> Tensor:
    """x̂_n = x_{n+1} − h Φ_n(x_{n+1}), equation 6 for Φ = r. Local error O(h²)."""
    return torch.sub(x_next, increment(r, n, x_next), alpha=r.field.step_size)


def _euler_step_back(r: Evaluator, n: int, x_next: Tensor) -> Tensor:
    return reverse_euler(_euler_increment, r, n, x_next)


def _heun_increment(r: Evaluator, n: int, x: Tensor) -> Tensor:
    """Φ_n(x) = ½ (r_n(x) + r_{n+1}(x + h r_n(x))), equation 8."""
    first = r.value(n, x, (n, 0))
    y = torch.add(x, first, alpha=r.field.step_size)
    second = r.value(min(n + 1, r.field.depth - 1), y, (n, 1))
    return (first + second) / 2


def _heun_advance(r: Evaluator, n: int, x: Tensor) -> Tensor:
    return torch.add(x, _heun_increment(r, n, x), alpha=r.field.step_size)


def _heun_step_back(r: Evaluator, n: int, x_next: Tensor) -> Tensor:
    """Heun's rule with time reversed, equation 9. Local error O(h³) if r is smooth in depth."""
    h = r.field.step_size
    first = r.value(min(n + 1, r.field.depth - 1), x_next, (n, 1))
    y = torch.sub(x_next, first, alpha=h)
    second = r.value(n, y, (n, 0))
    return torch.sub(x_next, first + second, alpha=h / 2)


EULER = Scheme("euler", 1, 1, _euler_advance, _euler_increment, _euler_step_back)
HEUN = Scheme("heun", 2, 2, _heun_advance, _heun_increment, _heun_step_back)

SCHEMES = {scheme.name: scheme for scheme in (EULER, HEUN)}
