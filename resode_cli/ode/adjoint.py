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
from .exact_sweep import ExactSweep, Gradients
from .field import Evaluator, Field
from .generators import RandomState
from .memory import kept_bytes
from .monitor import Monitor
from .plans import Plan
from .reentry import Autocast, Modes, buffer_versions, fixed_buffers, version, without_tensor_hooks
from .repetition import Repetition, sample
from .schemes import Scheme
from .signs import EvaluationKey, Signs
from .states import Keeper, keeper_of
from .steps import trajectory
from .sweep import Smoothness, Sweep


@dataclass(frozen=True)
class Begun:
    """What a forward pass of one step has done already.

    result: in a list, from which it is taken out. draws: what its generators were, if it drew from any.
    versions: of its buffers before it.
    """

    result: list[Tensor]
    draws: RandomState | None
    versions: dict[Tensor, int]


def solve(
    field: Field,
    scheme: Scheme,
    plan: Plan | None,
    x: Tensor | list[Tensor],
    *,
    monitor: Monitor,
    begun: Begun | None = None,
) -> Tensor:
    """Run a stage from x_0 to x_N.

    With a plan, the result's backward pass follows it; with None, autograd records every step.
    x: the state, or a list with it, from which it is taken out: a caller who keeps it no more need not hold it.
    begun: the forward pass, where it has been.
    Raises ResodeError if a block writes to its input, or if the backward pass before did not repeat its forward
    pass: on a CPU that pass has said so itself, elsewhere it does not wait for the device to tell.
    """
    given = x if isinstance(x, list) else [x]
    del x
    if field.depth == 0:
        return given.pop()
    monitor.check()
    monitor.clear()
    given[0] = scheme.enter(given[0])
    monitor.state_bytes = 0 if torch.compiler.is_exporting() else given[0].nbytes  # a symbolic size is no number
    parameters = field.parameters()
    with kept_bytes(parameters, enabled=monitor.count_kept) as count:
        records = torch.is_grad_enabled() and any(t.requires_grad for t in (given[0], *parameters))
        if plan is None or not records:
            states = trajectory(Evaluator(field), scheme, given.pop(), 0, field.depth)
            out = deque(states, maxlen=1).pop()
        else:
            assert plan.depth == field.depth
            out = _planned(_Call(field, scheme, plan, monitor, parameters, begun), given)
    monitor.kept = count()
    return scheme.leave(out)


def _planned(call: _Call, given: list[Tensor]) -> Tensor:
    """The solution as three nodes of the graph, of which the one in the middle does the work.

    autograd keeps what a node is given until the node has run. So the states come and go through nodes of their own,
    and those between are given numberless tensors: x_0 and its adjoint live no longer than they are needed.
    """
    handed = _Handed()
    link = _Start.apply(given[0], handed)
    with torch.no_grad():
        handed.state, handed.result = given.pop().detach(), None
    token = _PlannedSolve.apply(link, call, handed, *call.parameters)
    result: Tensor = _End.apply(token, handed)
    handed.result = None
    return result


@dataclass
class _Handed:
    """What the nodes of one solution hand on to each other."""

    state: Tensor | None = None
    result: Tensor | None = None
    adjoint: Tensor | None = None  # of x_N, then of x_0


class _Start(torch.autograd.Function):
    """Gives x_0 the adjoint that the solution has found."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, handed: _Handed) -> Tensor:
        ctx.handed = handed
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, None]:
        adjoint, ctx.handed.adjoint = ctx.handed.adjoint, None
        return adjoint, None


class _End(torch.autograd.Function):
    """Gives the solution the adjoint of x_N."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, handed: _Handed) -> Tensor:
        assert handed.result is not None
        ctx.handed, ctx.token = handed, token.new_zeros(0)
        return handed.result.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (ctx.handed.adjoint,) = grad_outputs
        return ctx.token, None


@dataclass(frozen=True)
class _Call:
    field: Field
    scheme: Scheme
    plan: Plan
    monitor: Monitor
    parameters: tuple[nn.Parameter, ...]
    begun: Begun | None

    def states(self, r: Evaluator, given: list[Tensor], images: slice) -> Iterator[Tensor]:
        """x_1 … x_N of some images, each when it is asked for; x_0 is taken out."""
        if self.begun is None:
            yield from trajectory(r, self.scheme, given.pop(), 0, self.field.depth)
            return
        given.clear()
        if self.begun.draws is not None:
            r.draws[0, 0] = self.begun.draws
        (result,) = self.begun.result
        yield result if images == slice(None) else result[images]


@dataclass
class _Part:
    """What the forward pass of some images of the batch left for their backward pass, but for the tensors it saved.

    n_saved: how many those are; ends: how many of them are x_0 and x_N.
    """

    keeper: Keeper
    draws: dict[EvaluationKey, RandomState]
    signs: Signs | None
    smoothness: Smoothness | None
    passed: list[Tensor]
    ends: int = 0
    n_saved: int = 0


class _PlannedSolve(torch.autograd.Function):
    """One Function per stage: a wrapper per block would cost hundreds of microseconds each.

    Parameters are explicit inputs, so gradients come back once per parameter and DistributedData-
    Parallel's hooks fire once, however many steps share a block.
    """

    @staticmethod
    def forward(ctx: Any, link: Tensor, call: _Call, handed: _Handed, *parameters: Tensor) -> Tensor:
        assert handed.state is not None
        given = [handed.state]
        handed.state = None
        images, device = given[0].shape[:1], given[0].device
        autocast = Autocast.now(device.type)
        versions = buffer_versions(call.field.modules()) if call.begun is None else call.begun.versions
        parts: list[_Part] = []
        saved: list[Tensor] = []
        result: Tensor | None = None
        slices = _slices(images, call.plan.slices)
        whole = len(slices) == 1
        for part_of in slices:
            with autocast.enter():
                part, tensors, out = _run(call, given if whole else [given[0][part_of]], part_of)
            parts.append(part)
            saved += tensors
            if whole:
                result = out
            else:
                result = out.new_empty((*images, *out.shape[1:])) if result is None else result
                result[part_of] = out
        handed.result = result
        if call.begun is not None:
            call.begun.result.clear()
        ctx.call, ctx.autocast, ctx.parts, ctx.slices = call, autocast, parts, slices
        ctx.handed, ctx.link = handed, link.new_zeros(0)
        ctx.modes = Modes.now(call.field.modules())
        ctx.written = {buffer for buffer, before in versions.items() if version(buffer) != before}
        # Saving the parameters too makes autograd refuse a backward after they were changed in place.
        ctx.save_for_backward(*saved, *parameters)
        return link.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
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
        saved = list(ctx.saved_tensors)
        # Unless the graph is retained, let go of each anchor after its step, not of all at the end.
        ctx.maybe_clear_saved_tensors()
        wanted = {id(p) for p, needed in zip(current, ctx.needs_input_grad[3:], strict=True) if needed}
        to_start = ctx.needs_input_grad[0]
        repetition = Repetition(call.field, [], CODED_SLACK if call.plan.bits else 0.0)
        gradients = Gradients()
        handed: _Handed = ctx.handed
        assert handed.adjoint is not None
        incoming, handed.adjoint = [handed.adjoint], None
        adjoint: Tensor | None = None
        call.monitor.evaluations = 0
        whole = len(ctx.slices) == 1
        with ctx.autocast.enter(), ctx.modes.enter(), _further_conditions(ctx):
            for part, images in zip(ctx.parts, ctx.slices, strict=True):
                tensors, saved = saved[: part.n_saved], saved[part.n_saved :]
                given = incoming if whole else [incoming[0][images]]
                found = _sweep_back(call, part, tensors, given, wanted, gradients, repetition, to_start=to_start)
                if whole or found is None:
                    adjoint = found
                    continue
                if adjoint is None:
                    adjoint = found.new_empty((len(incoming[0]), *found.shape[1:]))
                adjoint[images] = found
        call.monitor.repetition = repetition
        repetition.finish()
        handed.adjoint = adjoint if to_start else None
        return (ctx.link if to_start else None, None, None, *(gradients.sums.get(id(p)) for p in current))


# What the taped evaluation at the estimate of a state may be off by from the forward pass's, of its size.
CODED_SLACK = 0.25


def _slices(images: Sequence[int], count: int) -> list[slice]:
    """Slices of the batch, as many as asked for, or as there are images; images: their number, if there are such."""
    if not images or count == 1:
        return [slice(None)]
    count = max(min(count, images[0]), 1)
    ends = [images[0] * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def _run(call: _Call, given: list[Tensor], images: slice) -> tuple[_Part, list[Tensor], Tensor]:
    """The forward pass of some images, whose x_0 is taken out: what it left, the tensors that it saves, and x_N."""
    x = given.pop()
    plan = call.plan
    signs = Signs() if plan.bits is not None else None
    r = Evaluator(call.field, recording=True, signs=signs)
    keeper = keeper_of(plan)
    part = _Part(keeper, r.draws, signs, Smoothness(r, call.scheme, x) if plan.extrapolates else None, [])
    keeper.see(0, x)
    ends = [] if plan.reverses_nothing else [x]
    given.append(x)
    del x
    for n, x in enumerate(call.states(r, given, images), start=1):
        keeper.see(n, x)
        part.passed.append(sample(x))
        if part.smoothness is not None:
            part.smoothness.watch(n, x)
    if part.smoothness is not None:
        part.smoothness.finish()
    if plan.slices > 1 and r.draws:
        n, _ = min(r.draws)
        raise ResodeError(
            f"{call.field.describe(n)} draws random numbers, and would draw others for slices of the batch; leave out"
            " the slices"
        )
    # A reconstruction starts from x_N; x_0 is the monitor's reference. Other plans need neither.
    ends += [] if plan.reverses_nothing else [x]
    saved = [*ends, *keeper.saved(), *(signs.saved() if signs is not None else ())]
    part.ends, part.n_saved = len(ends), len(saved)
    return part, saved, x


def _sweep_back(
    call: _Call,
    part: _Part,
    tensors: list[Tensor],
    adjoint: list[Tensor],
    wanted: set[int],
    gradients: Gradients,
    repetition: Repetition,
    *,
    to_start: bool,
) -> Tensor | None:
    """The backward pass of some images. Their saved tensors, and the adjoint of x_N, are taken out of the lists."""
    r = Evaluator(call.field, draws=part.draws)
    waiting = iter(tensors)
    ends = [next(waiting) for _ in range(part.ends)]
    states = part.keeper.states(waiting, r, call.scheme)
    if part.signs is not None:
        r.signs = part.signs.again(waiting)
    tensors.clear()
    repetition.passed = part.passed
    if call.plan.reverses_nothing:
        exact = ExactSweep(r, call.scheme, call.plan, states=states, repetition=repetition, gradients=gradients)
        return exact.run(adjoint, wanted, call.monitor, to_start=to_start)
    sweep = Sweep(
        r,
        call.scheme,
        call.plan,
        ends=ends,
        states=states,
        smoothness=part.smoothness,
        repetition=repetition,
        gradients=gradients,
    )
    ends.clear()
    return sweep.run(adjoint.pop(), wanted, call.monitor)


@contextmanager
def _further_conditions(ctx: Any) -> Iterator[None]:
    """Re-evaluations leave no trace: not in buffers, and not by hooks that gradients of parameters run into."""
    field = ctx.call.field
    with fixed_buffers(field.modules(), written=ctx.written), without_tensor_hooks(ctx.call.parameters):
        yield
