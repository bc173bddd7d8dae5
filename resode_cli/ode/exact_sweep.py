"""The backward sweep where every state is the forward pass's own: exact, and lean.

    a_n = (∂Ψ_n/∂x)ᵀ a_{n+1},      ∂L/∂θ += (∂Ψ_n/∂θ)ᵀ a_{n+1},      x_{n+1} = Ψ_n(x_n)

Ψ: the whole step x + h Φ_n(x), differentiated as plain backprop does. a: adjoint ∂L/∂x; n: step; N: depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from .field import Evaluator
from .lean import sparing
from .monitor import Monitor
from .plans import Plan, Prediction
from .repetition import Repetition
from .schemes import Scheme
from .states import States


class ExactSweep:
    """One backward sweep over states that are the forward pass's own, or as near to them as their codes.

    gradients: of each wanted parameter, by identity; those of the part of a batch are added to what is there.
    """

    def __init__(
        self, r: Evaluator, scheme: Scheme, plan: Plan, *, states: States, repetition: Repetition, gradients: Gradients
    ) -> None:
        self.r, self.scheme, self.plan, self.states = r, scheme, plan, states
        self.repetition, self.gradients = repetition, gradients

    def run(self, adjoint: list[Tensor], wanted: set[int], monitor: Monitor, *, to_start: bool) -> Tensor | None:
        """From a_N, which is taken out, to a_0. to_start: whether a_0 is wanted; without, it is None."""
        per_block = self.r.field.parameters_by_block(wanted)
        passing: list[Tensor | None] = [adjoint.pop()]
        # Adjoints are handed on in lists, and taken out where they are used: no frame keeps one alive.
        for n in reversed(range(self.plan.depth)):
            passing = [self._before(n, passing, per_block, passes_on=n > 0 or to_start)]
        monitor.drift = monitor.correction = monitor.contraction = None
        monitor.evaluations += self.r.evaluations
        return passing.pop()

    def _state(self, n: int) -> Tensor:
        step = self.plan.steps[n]
        if step.prediction is Prediction.HELD:
            return self.states.take(n)
        with torch.no_grad():
            return self.states.replay(n, step.hold)

    def _before(
        self, n: int, adjoints: list[Tensor | None], per_block: Sequence[Sequence[nn.Parameter]], *, passes_on: bool
    ) -> Tensor | None:
        """a_n from a_{n+1}, which is taken out, and what step n adds to the gradients."""
        state = [self._state(n).detach()]
        zeros = partial(torch.zeros, state[0].shape, dtype=state[0].dtype, device=state[0].device)
        again = self.states.again()
        self.r.used.clear()
        with torch.enable_grad():
            leaf = (
                _Point.apply(torch.zeros((), device=state[0].device, requires_grad=True), state)
                if passes_on
                else state.pop()
            )
            with sparing(leaf, again):
                out = self.scheme.advance(self.r, n, leaf)
            self.repetition.watch_step(n, leaf, out)
            # A block may have frozen a parameter for this evaluation; then it has no gradient from here.
            inputs = {id(p): p for block in self.r.used for p in per_block[block] if p.requires_grad}
            if not out.requires_grad:
                return zeros() if passes_on else None
            seed = _Seed.apply(out, adjoints)
        own: list[Any] = [get_gradient_edge(leaf)] if passes_on else []
        del out, leaf  # their memory is for what needs them
        grads = list(torch.autograd.grad(seed, [*own, *inputs.values()], allow_unused=True))
        before = None
        if passes_on:
            before = grads.pop(0)
            before = zeros() if before is None else before
        for key, grad in zip(inputs, grads, strict=True):
            if grad is not None:
                self.gradients.add(key, grad)
        return before


class _Point(torch.autograd.Function):
    """Where a step is differentiated: a state that the graph does not hold, unless something in it saves it."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, state: list[Tensor]) -> Tensor:  # noqa: ARG004
        return state.pop()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None]:  # noqa: ARG004
        return None, None


class Gradients:
    """Sums of gradients, by the identity of their parameters."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}
        self._own: set[int] = set()  # sums that were made here, and may be added to in place

    def add(self, key: int, gradient: Tensor) -> None:
        if key not in self.sums:
            self.sums[key] = gradient
        elif key in self._own:
            self.sums[key] += gradient
        else:
            self.sums[key] = self.sums[key] + gradient
            self._own.add(key)


class _Seed(torch.autograd.Function):
    """Starts a backward pass with an adjoint that nothing else holds then, so that it goes as soon as it is used."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, adjoints: list[Tensor | None]) -> Tensor:
        ctx.adjoints, ctx.dtype = adjoints, out.dtype
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.adjoints.pop().to(ctx.dtype), None
