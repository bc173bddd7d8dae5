"""The one engine: a stage's forward pass, and its backward pass by a plan."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ResodeError
from .field import Evaluator, Field
from .memory import kept_bytes
from .monitor import Monitor
from .plans import Plan
from .reentry import Autocast, Modes, buffer_versions, fixed_buffers, version, without_tensor_hooks
from .repetition import Repetition, sample
from .schemes import Scheme
from .sweep import Smoothness, Sweep, trajectory


def solve(field: Field, scheme: Scheme, plan: Plan | None, x: Tensor, *, monitor: Monitor) -> Tensor:
    """Run a stage from x_0 to x_N.

    With a plan, the result's backward pass follows it; with None, autograd records every step.
    Raises ResodeError if a block writes to its input, or if the backward pass before did not repeat its forward
    pass: on a CPU that pass has said so itself, elsewhere it does not wait for the device to tell.
    """
    if field.depth == 0:
        return x
    monitor.check()
    monitor.clear()
    x = scheme.enter(x)
    monitor.state_bytes = 0 if torch.compiler.is_exporting() else x.nbytes  # a symbolic size is no number
    parameters = field.parameters()
    with kept_bytes(parameters, enabled=monitor.count_kept) as count:
        records = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))
        if plan is None or not records:
            states = trajectory(Evaluator(field), scheme, x, 0, field.depth)
            x = deque(states, maxlen=1).pop()
        else:
            assert plan.depth == field.depth
            x = _PlannedSolve.apply(x, _Call(field, scheme, plan, monitor, parameters), *parameters)
    monitor.kept = count()
    return scheme.leave(x)


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
        smoothness = Smoothness(r, call.scheme, x) if call.plan.extrapolates else None
        autocast = Autocast.now(x.device.type)
        passed: list[Tensor] = []
        versions = buffer_versions(call.field.modules())
        with autocast.enter():
            for n, x in enumerate(trajectory(r, call.scheme, start, 0, call.field.depth), start=1):
                if n in anchors:
                    held.append(x)
                passed.append(sample(x))
                if smoothness is not None:
                    smoothness.watch(n, x)
        if smoothness is not None:
            smoothness.finish()
        # A reconstruction starts from x_N; x_0 is the monitor's reference. An exact plan needs neither.
        ends = () if call.plan.exact else (start, x)
        ctx.call, ctx.autocast, ctx.smoothness, ctx.passed = call, autocast, smoothness, passed
        ctx.draws, ctx.n_ends = r.draws, len(ends)
        ctx.modes = Modes.now(call.field.modules())
        ctx.written = {buffer for buffer, before in versions.items() if version(buffer) != before}
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
        ends, held = _unpack(ctx.saved_tensors, ctx.n_ends, call.plan.anchors)
        # Unless the graph is retained, let go of each anchor after its step, not of all at the end.
        ctx.maybe_clear_saved_tensors()
        wanted = {id(p) for p, needed in zip(current, ctx.needs_input_grad[2:], strict=True) if needed}
        r = Evaluator(call.field, draws=ctx.draws)
        repetition = Repetition(call.field, ctx.passed)
        sweep = Sweep(r, call.scheme, call.plan, ends=ends, held=held, smoothness=ctx.smoothness, repetition=repetition)
        del ends, held  # each is the sweep's to let go of
        with ctx.autocast.enter(), ctx.modes.enter(), _further_conditions(ctx):
            adjoint, gradients = sweep.run(grad_outputs[0], wanted, call.monitor)
        return (
            adjoint if ctx.needs_input_grad[0] else None,
            None,
            *(gradients.get(id(p)) for p in current),
        )


@contextmanager
def _further_conditions(ctx: Any) -> Iterator[None]:
    """Re-evaluations leave no trace: not in buffers, and not by hooks that gradients of parameters run into."""
    field = ctx.call.field
    with fixed_buffers(field.modules(), written=ctx.written), without_tensor_hooks(ctx.call.parameters):
        yield


def _unpack(
    saved: Sequence[Tensor], n_ends: int, anchors: Sequence[int]
) -> tuple[tuple[Tensor, ...], dict[int, Tensor]]:
    """The ends, and the anchors by step, without a further reference to any of them."""
    states = saved[n_ends : n_ends + len(anchors)]
    return tuple(saved[:n_ends]), dict(zip(anchors, states, strict=True))
