"""The right-hand side of a stage's ODE, as the engine sees it.

    x_{n+1} = x_n + h r_n(x_n),   r_n = residuals[schedule[n]],   n = 0 … N-1

x: state (B, C, H, W) or any other shape; h: step size; n: step; N: depth.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Which evaluation inside which step: (n, 0) is r_n at the state, (n, 1) Heun's second evaluation.
EvaluationKey = tuple[int, int]


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

    @property
    def depth(self) -> int:
        return len(self.schedule)

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Every parameter of the residual functions in use, once, by identity."""
        used = dict.fromkeys(self.schedule)
        found = {id(p): p for b in used for p in self.residuals[b].module.parameters()}
        return tuple(found.values())

    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(self.residuals[b].module for b in dict.fromkeys(self.schedule))


@dataclass(frozen=True)
class RandomState:
    """State of the generators that random layers on `device` draw from."""

    cpu: Tensor
    cuda: Tensor | None
    device: torch.device

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda, device)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    def equals(self, other: RandomState) -> bool:
        same_cuda = self.cuda is None or other.cuda is None or torch.equal(self.cuda, other.cuda)
        return same_cuda and torch.equal(self.cpu, other.cpu)


@dataclass
class Evaluator:
    """Evaluates r_n for a scheme, counts, and replays the random numbers of the forward pass.

    While `recording`, the generator state before each evaluation is kept if, and only if, the
    evaluation drew from it: that finds dropout, drop-path and a user's own `F.dropout` alike.
    """

    field: Field
    recording: bool = False
    draws: dict[EvaluationKey, RandomState] = dataclasses.field(default_factory=dict)
    evaluations: int = 0
    used: dict[int, None] = dataclasses.field(default_factory=dict)  # distinct blocks evaluated since last cleared

    def value(self, n: int, x: Tensor, key: EvaluationKey) -> Tensor:
        """r_n(x)."""
        return self._evaluate(n, x, key, lambda residual: residual(x))

    def step(self, n: int, x: Tensor, key: EvaluationKey) -> Tensor:
        """x + h r_n(x)."""
        h = self.field.step_size
        return self._evaluate(n, x, key, lambda residual: residual.step(x, h))

    def _evaluate(self, n: int, x: Tensor, key: EvaluationKey, run: Callable[[Residual], Tensor]) -> Tensor:
        block = self.field.schedule[n]
        residual = self.field.residuals[block]
        self.evaluations += 1
        self.used[block] = None
        if self.recording:
            before = RandomState.now(x.device)
            result = run(residual)
            if not before.equals(RandomState.now(x.device)):
                self.draws[key] = before
            return result
        if key not in self.draws:
            return run(residual)
        current = RandomState.now(x.device)
        self.draws[key].restore()
        try:
            return run(residual)
        finally:
            current.restore()
