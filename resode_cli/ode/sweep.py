"""The backward sweep over one stage, by a plan.

    a_n = a_{n+1} + h (∂Φ_n/∂x)ᵀ a_{n+1},      ∂L/∂θ += h (∂Φ_n/∂θ)ᵀ a_{n+1}

with both Jacobians at the state that the plan supplies (equation 7 of the paper for Euler).
x: state; a: adjoint ∂L/∂x; h: step size; n: step; N: depth; G(x) = x_{n+1} − h Φ_n(x).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .exact_sweep import Gradients
from .field import Evaluator
from .generators import is_simulated
from .monitor import Monitor
from .plans import Carry, Plan, Prediction, StepPlan
from .repetition import Repetition
from .schemes import Scheme
from .states import States

# Across different weights an extrapolation is used where it recovers more than three quarters of the step,
# and is twice as good as taking the value of the step above. The first limits the error; the second, being
# relative to what smooth weights change by in one step, lets roughness count for more the smaller h is.
RECOVERS = 0.25
IMPROVES = 0.5
ESTIMATED_ON = 4  # images on which the forward pass and the monitor measure what is only an estimate anyway


class Smoothness:
    """How well Φ_n is extrapolated from Φ_{n+1} and Φ_{n+2}, step by step, seen from the forward pass.

        ‖Φ_n − 2Φ_{n+1} + Φ_{n+2}‖  against  ‖Φ_n‖ and ‖Φ_n − Φ_{n+1}‖,   h Φ_n = x_{n+1} − x_n

    Inside a run of equal weights nothing needs to be measured: there the field is as smooth as it gets.
    Where random numbers are drawn nothing may be: the masks of one step say nothing of another's.
    """

    def __init__(self, r: Evaluator, scheme: Scheme, x: Tensor) -> None:
        self.r, self.scheme = r, scheme
        self.last = [x]
        self.measured: dict[int, Tensor] = {}
        self.values: Tensor | None = None

    def watch(self, n: int, x: Tensor) -> None:
        """Take x_n into account; n = 1 … N."""
        self.last = [*self.last[-3:], x]
        if len(self.last) < 4 or self.same(n - 3, n - 2) or any(self._draws(k) for k in (n - 3, n - 2, n - 1)):
            return
        x_0, x_1, x_2, x_3 = (state[:ESTIMATED_ON] for state in self.last)
        step = x_1 - x_0
        change = (x_2 - x_1).sub_(step)
        second = (x_3 - x_2).sub_(step).sub_(change, alpha=2)
        limit = torch.minimum(RECOVERS * _norm(step), IMPROVES * _norm(change))
        self.measured[n - 3] = _norm(second) / limit.clamp_min(torch.finfo(limit.dtype).tiny)

    def finish(self) -> None:
        """Let go of the states, and send the figures to the host without waiting for them."""
        self.last.clear()
        if self.measured and not is_simulated(next(iter(self.measured.values()))):
            values = torch.stack(list(self.measured.values())).float()
            self.values = torch.empty(values.shape, pin_memory=values.is_cuda).copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event() if values.is_cuda else None  # type: ignore[no-untyped-call]
            if self.arrived is not None:
                self.arrived.record()

    def same(self, n: int, m: int) -> bool:
        """Whether Φ_n and Φ_m are one function: of the same blocks, and without random numbers of their own."""
        schedule = self.r.field.schedule
        same_blocks = self.scheme.blocks(schedule, n) == self.scheme.blocks(schedule, m)
        return same_blocks and not self._draws(n) and not self._draws(m)

    def _draws(self, n: int) -> bool:
        return any((n, slot) in self.r.draws for slot in range(self.scheme.evaluations))

    def read(self) -> set[int]:
        """The measured steps that may be extrapolated. Waits for the forward pass, not for the backward."""
        if self.values is None:
            return set()
        if self.arrived is not None:
            self.arrived.synchronize()
        return {n for n, value in zip(self.measured, self.values.tolist(), strict=True) if value <= 1}


class Sweep:
    """One backward sweep: gets the states, accumulates gradients, tells the monitor.

    ends: x_0 and x_N, or nothing for an exact plan. held: the anchors by step.
    smooth: what the forward pass found out about extrapolation, if the plan extrapolates.
    repetition: compares the taped evaluations with the forward pass, where the states are its own.
    """

    def __init__(
        self,
        r: Evaluator,
        scheme: Scheme,
        plan: Plan,
        *,
        ends: Sequence[Tensor],
        states: States,
        smoothness: Smoothness | None,
        repetition: Repetition,
        gradients: Gradients,
    ) -> None:
        self.gradients = gradients
        self.repetition = repetition
        self.r, self.scheme, self.plan, self.states = r, scheme, plan, states
        self.h = r.field.step_size
        self.start: Tensor | None = ends[0] if ends else None
        self.carried: Tensor | None = ends[1] if ends else None  # the estimate of x_{n+1} at step n
        self.smoothness = smoothness
        self.smooth = smoothness.read() if smoothness is not None else set()
        # Φ_n evaluated off the tape at step n: the point and the value, latest last.
        self.iterates: list[tuple[Tensor, Tensor]] = []
        self.taped: list[Tensor] = []  # Φ_{n+1}, Φ_{n+2} at step n, where the plan extrapolates
        self.reverse_value: Tensor | None = None  # Φ_{n+1} at the estimate of x_{n+2}, if it was evaluated
        self.predicted: Tensor | None = None  # reverse Euler's x̂_n, unmodified
        self.defect: Tensor | None = None  # of the last modified prediction
        self.corrections: list[Tensor] = []
        self.contractions: list[Tensor] = []

    def run(self, adjoint: Tensor, wanted: set[int], monitor: Monitor) -> Tensor:
        """From a_N to a_0."""
        per_block = self.r.field.parameters_by_block(wanted)
        drifts: list[Tensor] = []
        reconstructed = False  # whether the carried state is an estimate
        for n in reversed(range(self.plan.depth)):
            step = self.plan.steps[n]
            state = self._state(n)
            leaf = state.detach().requires_grad_()
            self.r.used.clear()
            with torch.enable_grad():
                taped = self.scheme.increment(self.r, n, leaf)
            # A block may have frozen a parameter for this evaluation; then it has no gradient from here.
            inputs = {id(p): p for block in self.r.used for p in per_block[block] if p.requires_grad}
            grad_state, *grads = torch.autograd.grad(
                taped, [leaf, *inputs.values()], (adjoint * self.h).to(taped.dtype), allow_unused=True
            )
            if grad_state is not None:
                adjoint = adjoint + grad_state
            for key, grad in zip(inputs, grads, strict=True):
                if grad is not None:
                    self.gradients.add(key, grad)

            increment = taped.detach()
            if step.exact:
                self.repetition.watch(n, state, increment, self.h)
            if self.carried is not None:
                if step.exact and reconstructed:
                    truth = torch.add(state, increment, alpha=self.h)
                    drifts.append(_relative_norm(self.carried - truth, truth))
                self._observe(step, state, increment)
                self.carried = self._carry(step, state, increment)
            if self.plan.extrapolates:
                self.taped = [increment, *self.taped[:1]]
            reconstructed = not step.exact
            del state, leaf, taped  # or the next step's prediction would find this one's state alive
        if reconstructed and self.carried is not None and self.start is not None:
            drifts.append(_relative_norm(self.carried - self.start, self.start))
        monitor.drift = _largest(drifts)
        monitor.correction, monitor.contraction = _largest(self.corrections), _largest(self.contractions)
        monitor.evaluations += self.r.evaluations
        return adjoint

    def _state(self, n: int) -> Tensor:
        """x̂_n, by the step's plan."""
        step = self.plan.steps[n]
        self.iterates.clear()
        if step.prediction is Prediction.HELD:
            self.reverse_value = None
            return self.states.take(n)
        with torch.no_grad():
            if step.prediction is Prediction.REPLAY:
                return self.states.replay(n, step.hold)
            state = self._predict(n, step)
            for _ in range(step.corrections):
                state = self._iterate(n, state)
        return state

    def _predict(self, n: int, step: StepPlan) -> Tensor:
        assert self.carried is not None
        if step.prediction is Prediction.REVERSE_SCHEME:
            assert self.scheme.step_back is not None
            return self.scheme.step_back(self.r, n, self.carried)
        if step.prediction is Prediction.EXTRAPOLATED:
            history, self.reverse_value = self._history(n), None
            if history is not None:
                first, second = history
                return torch.add(self.carried, first, alpha=-2 * self.h).add_(second, alpha=self.h)
        state = self.predicted = self._iterate(n, self.carried)
        if step.prediction is Prediction.EXTRAPOLATED:
            self.reverse_value = self.iterates[-1][1]
        return state + self.defect if step.modified and self.defect is not None else state

    def _history(self, n: int) -> tuple[Tensor, Tensor] | None:
        """Two values that Φ_n is extrapolated from, the nearer first; None where they say nothing of it."""
        assert self.smoothness is not None
        same = self.smoothness.same
        if n + 1 < self.plan.depth and same(n, n + 1) and self.reverse_value is not None:
            # The step above was reversed with an evaluation of this same Φ one state further up.
            return self.taped[0], self.reverse_value
        if n + 2 < self.plan.depth and (same(n, n + 2) and same(n, n + 1) or n in self.smooth):
            return self.taped[0], self.taped[1]
        return None

    def _iterate(self, n: int, state: Tensor) -> Tensor:
        """G(x) of the state, kept as an iterate."""
        assert self.carried is not None
        value = self.scheme.increment(self.r, n, state)
        self.iterates.append((state, value))
        return torch.sub(self.carried, value, alpha=self.h)

    def _carry(self, step: StepPlan, state: Tensor, increment: Tensor) -> Tensor:
        """The estimate of x_n that goes on to step n-1."""
        assert self.carried is not None
        if step.exact or step.carry is Carry.PREDICTED:
            return state
        carried = torch.sub(self.carried, increment, alpha=self.h)
        if step.carry is Carry.MIXED and self.iterates:
            z, value = self.iterates[-1]
            carried = anderson(z, torch.sub(self.carried, value, alpha=self.h), state, carried)
        if step.modified:
            assert self.predicted is not None
            self.defect = carried - self.predicted
        return carried

    def _observe(self, step: StepPlan, state: Tensor, increment: Tensor) -> None:
        """The monitor's local figures, on a few images."""
        if step.exact:
            return
        assert self.carried is not None
        few = slice(ESTIMATED_ON)
        change = torch.sub(self.carried[few], increment[few], alpha=self.h).sub_(state[few])
        self.corrections.append(_relative_norm(change, state[few]))
        if self.iterates:
            z, value = self.iterates[-1]
            self.contractions.append(self.h * _relative_norm(value[few] - increment[few], z[few] - state[few]))


def anderson(z: Tensor, g_z: Tensor, y: Tensor, g_y: Tensor) -> Tensor:
    """Anderson's mixing of depth 1 for x ← G(x), from two points z, y and their images, per image of the batch.

        (1 − β) G(y) + β G(z),   β minimises ‖(1 − β) (G(y) − y) + β (G(z) − z)‖

    (Walker and Ni 2011, SIAM J. Numer. Anal. 49, algorithm AA with m = 1). With h → 0, β = O(h), so the
    order of the iteration stays; where the field is stiff, it damps the direction that diverges.
    """
    per_image = tuple(range(1, z.ndim)) if z.ndim > 1 else (0,)
    f_y = g_y - y
    change = (g_z - z) - f_y
    norm = change.square().sum(per_image, keepdim=True)
    # Where the residual did not change at all there is nothing to learn from: β = 0.
    beta = -(f_y * change).sum(per_image, keepdim=True) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return torch.lerp(g_y, g_z, beta)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x)


def _relative_norm(difference: Tensor, reference: Tensor) -> Tensor:
    return _norm(difference) / _norm(reference).clamp_min(torch.finfo(reference.dtype).tiny)


def _largest(values: Sequence[Tensor]) -> Tensor | None:
    return torch.stack(list(values)).max() if values else None
