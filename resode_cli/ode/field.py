"""The right-hand side of a stage's ODE, as the engine sees it.

    x_{n+1} = x_n + h r_n(x_n),   r_n = residuals[schedule[n]],   n = 0 … N-1

x: state (B, C, H, W) or any other shape; h: step size; n: step; N: depth.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .generators import HostState, HostWatch, RandomState, generators_in
from .lost_gradients import recorded_bare
from .signs import EvaluationKey, Signs


class Residual(ABC):
    """One distinct block's residual function r_b(x), a map of a state to a tensor of the same shape."""

    module: nn.Module

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """r_b(x)."""

    def step(self, x: Tensor, h: float) -> Tensor:
        """The explicit Euler step x + h r_b(x)."""
        return torch.add(x, self(x), alpha=h)


@dataclass(frozen=True)
class Field:
    """r_n(x) for n = 0 … N-1: distinct residual functions and the schedule that says which one a step uses."""

    residuals: tuple[Residual, ...]
    schedule: tuple[int, ...]
    step_size: float
    names: tuple[str, ...] = ()  # of the residual functions, for messages

    def describe(self, n: int) -> str:
        """The block of step n, as a message names it."""
        block = self.schedule[n]
        kind = type(self.residuals[block].module).__name__
        return f"block {self.names[block]} ({kind})" if self.names else f"block {kind}"

    @property
    def depth(self) -> int:
        return len(self.schedule)

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Every parameter of the residual functions in use, once, by identity."""
        used = dict.fromkeys(self.schedule)
        found = {id(p): p for b in used for p in self.residuals[b].module.parameters()}
        return tuple(found.values())

    def parameters_by_block(self, wanted: set[int]) -> list[list[nn.Parameter]]:
        """Of each distinct block, the parameters that want a gradient; wanted: their ids."""
        return [[p for p in residual.module.parameters() if id(p) in wanted] for residual in self.residuals]

    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(self.residuals[b].module for b in dict.fromkeys(self.schedule))


@dataclass
class Evaluator:
    """Evaluates r_n for a scheme, counts, and replays the random numbers of the forward pass.

    While `recording`, the generators' states before each evaluation are kept if, and only if, the
    evaluation drew from one: that finds dropout, drop-path, a user's own `F.dropout`, numpy and `random` alike.
    Then too it is looked at for gradients that would be lost; see `lost_gradients`.
    """

    field: Field
    recording: bool = False
    replaying: bool = False  # states of the forward pass are wanted: a block may ask whether gradients are recorded
    draws: dict[EvaluationKey, RandomState] = dataclasses.field(default_factory=dict)
    evaluations: int = 0
    used: dict[int, None] = dataclasses.field(default_factory=dict)  # distinct blocks evaluated since last cleared
    signs: Signs | None = None  # of the rectifiers, where states are coded
    held: dict[int, list[Any]] = dataclasses.field(default_factory=dict)  # generators that a block's modules hold
    host: HostWatch | None = None

    def value(self, n: int, x: Tensor, key: EvaluationKey) -> Tensor:
        """r_n(x)."""
        return self._evaluate(n, x, key, lambda residual, state: residual(state))

    def step(self, n: int, x: Tensor, key: EvaluationKey) -> Tensor:
        """x + h r_n(x)."""
        h = self.field.step_size
        return self._evaluate(n, x, key, lambda residual, state: residual.step(state, h))

    def _evaluate(self, n: int, x: Tensor, key: EvaluationKey, run: Callable[[Residual, Tensor], Tensor]) -> Tensor:
        block = self.field.schedule[n]
        residual = self.field.residuals[block]
        self.evaluations += 1
        self.used[block] = None
        if (signs := self.signs) is not None:
            unsigned = run

            def run(residual: Residual, x: Tensor) -> Tensor:
                return signs.around(key, lambda: unsigned(residual, x))

        if self.recording:
            return self._record(n, x, key, lambda state: run(residual, state))
        if self.replaying:
            plain = run

            def run(residual: Residual, x: Tensor) -> Tensor:
                return recorded_bare(lambda state: plain(residual, state), x, None, name=self.field.describe(n))

        if key not in self.draws:
            return run(residual, x)
        recorded = self.draws[key]
        current = RandomState.now(x.device, [generator for generator, _ in recorded.held])
        if recorded.host is not None:
            current = dataclasses.replace(current, host=HostState.now())
        recorded.restore()
        try:
            return run(residual, x)
        finally:
            current.restore()

    def _record(self, n: int, x: Tensor, key: EvaluationKey, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Evaluate, and keep the states that the generators had before if it drew from any."""
        if self.host is None:
            self.host = HostWatch()
        block = self.field.schedule[n]
        own = None  # a block is looked at once
        if block not in self.held:
            own = {id(p) for p in self.field.residuals[block].module.parameters()}
            self.held[block] = generators_in(self.field.residuals[block].module.modules())
        before = RandomState.now(x.device, self.held[block])
        # An exported program holds tensors alone; what compiles a whole model has graphs of its own.
        watched = not torch.compiler.is_compiling()
        result = recorded_bare(run, x, own, name=f"{self.field.describe(n)} of step {n}") if watched else run(x)
        host = self.host.drawn()
        if host is not None or not before.equals(RandomState.now(x.device, self.held[block])):
            self.draws[key] = dataclasses.replace(before, host=host)
        return result
