"""What a forward rule is.

    x_{n+1} = x_n + h Φ_n(x_n)

x: state; h: step size; n: step; N: depth; r_n: residual function of step n; r_N := r_{N-1}. Φ, the increment, is what
the backward sweep differentiates and what a fixed-point correction evaluates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..field import Evaluator

Increment = Callable[[Evaluator, int, Tensor], Tensor]


def _identity(x: Tensor) -> Tensor:
    return x


def _add_increment(r: Evaluator, n: int, x: Tensor, increment: Increment) -> Tensor:
    return torch.add(x, increment(r, n, x), alpha=r.field.step_size)


@dataclass(frozen=True)
class Scheme:
    """A forward rule: a file of this folder that makes one of these, and an entry of SCHEMES.

    order: p in an error of O(h^p) over a fixed time; a rule's file says for which fields.
    nodes: which r each evaluation of Φ_n uses, as an offset to n: (0, 1) for r_n and then r_{n+1}.
    increment: Φ_n(x), by `r.value(n + node, x, (n, k))` for its evaluation k.
    step_back: the rule's own approximate step from x_{n+1} to x_n; None if it has none. A rule that has one brings an
        adjoint method of its name.
    advance: x_{n+1}, where there is a better way than to add the increment.
    enter, leave: from the stage's state to what the rule carries from step to step, and back; a rule that carries more
        than the state, as the reversible Heun method does, stacks it along a new first dimension.
    """

    name: str
    order: int
    nodes: tuple[int, ...]
    increment: Increment
    step_back: Increment | None = None
    advance_by: Increment | None = None
    enter: Callable[[Tensor], Tensor] = _identity
    leave: Callable[[Tensor], Tensor] = _identity

    @property
    def evaluations(self) -> int:
        """Branch evaluations in one increment."""
        return len(self.nodes)

    @property
    def stays_in_step(self) -> bool:
        """Whether Φ_n is made of r_n alone, and of the state alone, so that steps may be run in parts."""
        return not any(self.nodes) and self.enter is _identity

    def advance(self, r: Evaluator, n: int, x: Tensor) -> Tensor:
        """x_{n+1}."""
        return _add_increment(r, n, x, self.increment) if self.advance_by is None else self.advance_by(r, n, x)

    def blocks(self, schedule: Sequence[int], n: int) -> tuple[int, ...]:
        """The distinct blocks that Φ_n is made of, in the order of its evaluations."""
        return tuple(schedule[min(n + node, len(schedule) - 1)] for node in self.nodes)
