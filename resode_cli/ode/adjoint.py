"""The one engine: a stage's forward pass, and its backward sweep by a plan.

    a_n = a_{n+1} + h (∂Φ_n/∂x)ᵀ a_{n+1},      ∂L/∂θ += h (∂Φ_n/∂θ)ᵀ a_{n+1}

with both Jacobians at the state that the plan supplies (equation 7 of the paper for Euler).
x: state; a: adjoint ∂L/∂x; h: step size; n: step; N: depth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ResodeError
from .field import Evaluator, Field
from .memory import kept_bytes
from .plans import Carry, Plan, Prediction, StepPlan
from .schemes import Scheme, reverse_euler


@dataclass
class Monitor:
    """What the last passes through a stage did. Written by the engine, read by whoever asks.

    drift: ‖x̃ − x‖ / ‖x‖ of the reconstructed against the true states, at the stage's input and at
        every anchor: the largest. A 0-dim tensor on the state's device, so that writing it does not
        wait for a GPU. None: nothing was reconstructed.
    evaluations: branch evaluations of the backward sweep.
    kept: bytes that the graph holds for the backward pass, parameters aside; counted if `count_kept`.
    """

    drift: Tensor | None = None
    evaluations: int = 0
    kept: int | None = None
    count_kept: bool = False


def solve(field: Field, scheme: Scheme, plan: Plan | None, x: Tensor, *, monitor: Monitor) -> Tensor:
    """Run a stage from x_0 to x_N.

    With a plan, the result's backward pass follows it; with None, autograd records every step.
    Raises ResodeError if a block writes to its input.
    """
    if field.depth == 0:
        return x
    monitor.drift, monitor.evaluations, monitor.kept = None, 0, None
    parameters = field.parameters()
    with kept_bytes(parameters, enabled=monitor.count_kept) as count:
        records = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))
        if plan is None or not records:
            states = _trajectory(Evaluator(field), scheme, x, 0, field.depth)
            x = deque(states, maxlen=1).pop()
        else:
            assert plan.depth == field.depth
            x = _PlannedSolve.apply(x, _Call(field, scheme, plan, monitor, parameters), *parameters)
    monitor.kept = count()
    return x


def _trajectory(r: Evaluator, scheme: Scheme, x: Tensor, start: int, stop: int) -> Iterator[Tensor]:
    """The states x_{start+1} … x_stop of the forward rule."""
    for n in range(start, stop):
        version = _version(x)
        following = scheme.advance(r, n, x)
        if _version(x) != version:
            name = type(r.field.residuals[r.field.schedule[n]].module).__name__
            raise ResodeError(f"block {name} of step {n} writes to its input; make that operation out of place")
        x = following
        yield x


def _version(x: Tensor) -> int:
    """How often x was written to; not tracked in inference mode."""
    return 0 if x.is_inference() else x._version


@dataclass(frozen=True)
class _Call:
    field: Field
    scheme: Scheme
    plan: Plan
    monitor: Monitor
    parameters: tuple[nn.Parameter, ...]


class _PlannedSolve(torch.autograd.Function):
    """One Function per stage: a wrapper per block would cost hundreds of microseconds each.

    Parameters are explicit inputs, so gradients come back once per parameter and DistributedData-
    Parallel's hooks fire once, however many steps share a block.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *parameters: Tensor) -> Tensor:
        r = Evaluator(call.field, recording=True)
        anchors = set(call.plan.anchors)
        held = [x] if 0 in anchors else []
        start = x
        autocast = _Autocast.now(x.device.type)
        with autocast.enter():
            for n, x in enumerate(_trajectory(r, call.scheme, start, 0, call.field.depth), start=1):
                if n in anchors:
                    held.append(x)
        # A reconstruction starts from x_N; x_0 is the monitor's reference. An exact plan needs neither.
        ends = () if call.plan.exact else (start, x)
        ctx.call, ctx.autocast, ctx.draws, ctx.n_ends = call, autocast, r.draws, len(ends)
        ctx.modes = _Modes.now(call.field.modules())
        # Saving the parameters too makes autograd refuse a backward after they were changed in place.
        ctx.save_for_backward(*ends, *held, *parameters)
        return x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise ResodeError("double backward (create_graph=True) through a stage needs the adjoint method 'backprop'")
        call: _Call = ctx.call
        current = call.field.parameters()
        if len(current) != len(call.parameters) or any(
            a is not b for a, b in zip(current, call.parameters, strict=True)
        ):
            raise ResodeError(
                "the stage's parameters were replaced between forward and backward"
                " (functional_call needs the adjoint method 'backprop')"
            )
        saved: Sequence[Tensor] = ctx.saved_tensors
        ends, states = saved[: ctx.n_ends], saved[ctx.n_ends : len(saved) - len(current)]
        sweep = _Sweep(call, ends, dict(zip(call.plan.anchors, states, strict=True)), ctx.draws)
        wanted = {id(p) for p, needed in zip(current, ctx.needs_input_grad[2:], strict=True) if needed}
        with ctx.autocast.enter(), ctx.modes.enter(), fixed_buffers(call.field.modules()):
            adjoint, gradients = sweep.run(grad_outputs[0], wanted)
        return (
            adjoint if ctx.needs_input_grad[0] else None,
            None,
            *(gradients.get(id(p)) for p in current),
        )


class _Sweep:
    """The backward sweep over one stage."""

    def __init__(self, call: _Call, ends: Sequence[Tensor], held: dict[int, Tensor], draws: dict[Any, Any]) -> None:
        self.plan, self.scheme, self.monitor = call.plan, call.scheme, call.monitor
        self.r = Evaluator(call.field, draws=draws)
        self.h = call.field.step_size
        self.held = held
        self.start: Tensor | None = ends[0] if ends else None
        self.carried: Tensor | None = ends[1] if ends else None  # the estimate of x_{n+1} at step n
        self.iterates: tuple[Tensor, Tensor]  # z and G(z) before x̂_n
        self.predicted: Tensor  # reverse Euler's x̂_n, unmodified
        self.defect: Tensor | None = None  # of the last modified prediction

    def run(self, adjoint: Tensor, wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """From a_N to a_0, and the gradient of each wanted parameter, both by identity."""
        per_block = [
            [p for p in residual.module.parameters() if id(p) in wanted] for residual in self.r.field.residuals
        ]
        gradients: dict[int, Tensor] = {}
        drifts: list[Tensor] = []
        reconstructed = False  # whether the carried state is an estimate
        for n in reversed(range(self.plan.depth)):
            step = self.plan.steps[n]
            state = self._state(n)
            leaf = state.detach().requires_grad_()
            self.r.used.clear()
            with torch.enable_grad():
                taped = self.scheme.increment(self.r, n, leaf)
            inputs = {id(p): p for block in self.r.used for p in per_block[block]}
            grad_state, *grads = torch.autograd.grad(
                taped, [leaf, *inputs.values()], (adjoint * self.h).to(taped.dtype), allow_unused=True
            )
            if grad_state is not None:
                adjoint = adjoint + grad_state
            for key, grad in zip(inputs, grads, strict=True):
                if grad is not None:
                    gradients[key] = gradients[key] + grad if key in gradients else grad

            increment = taped.detach()
            if self.carried is not None:
                if step.exact and reconstructed:
                    drifts.append(_relative(self.carried, torch.add(state, increment, alpha=self.h)))
                self.carried = self._carry(step, state, increment)
            reconstructed = not step.exact
        if reconstructed and self.carried is not None and self.start is not None:
            drifts.append(_relative(self.carried, self.start))
        self.monitor.drift = torch.stack(drifts).max() if drifts else None
        self.monitor.evaluations = self.r.evaluations
        return adjoint, gradients

    def _state(self, n: int) -> Tensor:
        """x̂_n, by the step's plan."""
        step = self.plan.steps[n]
        if step.prediction is Prediction.HELD:
            return self.held.pop(n)
        with torch.no_grad():
            if step.prediction is Prediction.REPLAY:
                return self._replay(n, step.hold)
            assert self.carried is not None
            if step.prediction is Prediction.REVERSE_SCHEME:
                state = self.scheme.step_back(self.r, n, self.carried)
            else:
                state = self.predicted = reverse_euler(self.scheme.increment, self.r, n, self.carried)
                self.iterates = self.carried, state
                if step.modified and self.defect is not None:
                    state = state + self.defect
            for _ in range(step.corrections):
                z, state = state, torch.sub(self.carried, self.scheme.increment(self.r, n, state), alpha=self.h)
                self.iterates = z, state
        return state

    def _carry(self, step: StepPlan, state: Tensor, increment: Tensor) -> Tensor:
        """The estimate of x_n that goes on to step n-1."""
        assert self.carried is not None
        if step.exact or step.carry is Carry.PREDICTED:
            return state
        carried = torch.sub(self.carried, increment, alpha=self.h)
        if step.carry is Carry.MIXED:
            carried = anderson(*self.iterates, state, carried)
        if step.modified:
            self.defect = carried - self.predicted
        return carried

    def _replay(self, n: int, hold: tuple[int, ...]) -> Tensor:
        below = max(k for k in self.held if k <= n)
        state = start = self.held[below]
        states = _trajectory(self.r, self.scheme, start, below, n)
        for k, state in enumerate(states, start=below + 1):
            if k in hold:
                self.held[k] = state
        return state


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


def _relative(estimate: Tensor, truth: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(truth).clamp_min(torch.finfo(truth.dtype).tiny)
    return torch.linalg.vector_norm(estimate - truth) / norm


@dataclass(frozen=True)
class _Autocast:
    """The autocast state of the forward pass, to be entered again in the backward pass.

    Without its weight cache: a weight cast under no_grad and then reused on the tape has lost its
    gradient, silently.
    """

    device_type: str
    enabled: bool
    dtype: torch.dtype | None

    @classmethod
    def now(cls, device_type: str) -> _Autocast:
        if not torch.amp.is_autocast_available(device_type):
            return cls(device_type, False, None)
        return cls(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))

    def enter(self) -> AbstractContextManager[Any]:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


@dataclass(frozen=True)
class _Modes:
    """Train or eval mode of every module in the forward pass, and the versions of the buffers read in eval mode."""

    training: tuple[tuple[nn.Module, bool], ...]
    versions: tuple[tuple[Tensor, int], ...]

    @classmethod
    def now(cls, blocks: Sequence[nn.Module]) -> _Modes:
        modules = [m for block in blocks for m in block.modules()]
        read = [b for m in modules if not m.training for b in m._buffers.values() if b is not None]
        return cls(tuple((m, m.training) for m in modules), tuple((b, _version(b)) for b in read))

    @contextmanager
    def enter(self) -> Iterator[None]:
        """The modes of the forward pass. Raises ResodeError if a buffer that it read was written to since."""
        if any(_version(buffer) != version for buffer, version in self.versions):
            raise ResodeError(
                "statistics that the forward pass normalised by were changed before the backward pass;"
                " run backward first"
            )
        changed = [(m, m.training) for m, training in self.training if m.training != training]
        try:
            for module, training in self.training:
                module.training = training
            yield
        finally:
            for module, training in changed:
                module.training = training


@contextmanager
def fixed_buffers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let modules in train mode update copies of their buffers, so that re-evaluations leave no trace.

    BatchNorm's running statistics and counters then move once, in the forward pass, whatever the
    number of evaluations; the same holds for any other module that keeps state in buffers.
    """
    originals: list[tuple[nn.Module, str, Tensor]] = []
    seen: set[int] = set()
    for module in (m for block in modules for m in block.modules()):
        if module.training and id(module) not in seen:
            seen.add(id(module))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    originals.append((module, name, buffer))
    try:
        for module, name, buffer in originals:
            module._buffers[name] = buffer.clone()
        yield
    finally:
        for module, name, buffer in originals:
            module._buffers[name] = buffer
