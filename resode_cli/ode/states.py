"""The states of the forward pass: what is kept of them for the backward sweep, and how that gets them back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .codec import Code, Layout
from .field import Evaluator
from .plans import Plan
from .schemes import Scheme
from .steps import trajectory


class States(ABC):
    """Where a backward sweep gets x_n from. It asks for them from the last to the first."""

    @abstractmethod
    def take(self, n: int) -> Tensor:
        """x_n, which is not needed again."""

    @abstractmethod
    def replay(self, n: int, hold: tuple[int, ...]) -> Tensor:
        """x_n, run forward from the nearest held state below; the states of the steps `hold` are held on the way."""

    def again(self) -> Callable[[], Tensor] | None:
        """What gives the state taken last once more, so that it need not be held; None where there is no such thing."""
        return None


class Keeper(ABC):
    """What a forward pass keeps of its states."""

    @abstractmethod
    def see(self, n: int, x: Tensor) -> None:
        """Take x_n into account; n = 0 … N."""

    @abstractmethod
    def saved(self) -> list[Tensor]:
        """The tensors to save for the backward pass."""

    @abstractmethod
    def states(self, saved: Iterator[Tensor], r: Evaluator, scheme: Scheme) -> States:
        """The states again, from the saved tensors."""


def keeper_of(plan: Plan) -> Keeper:
    """What keeps the states that a plan wants."""
    return HoldAnchors(plan.anchors) if plan.bits is None else KeepCodes(plan.bits, plan.depth)


class HoldAnchors(Keeper):
    """Keeps the states of some steps as they are."""

    def __init__(self, anchors: Sequence[int]) -> None:
        self.anchors = tuple(anchors)
        self.held: list[Tensor] = []

    def see(self, n: int, x: Tensor) -> None:
        if n in self.anchors:
            self.held.append(x)

    def saved(self) -> list[Tensor]:
        held, self.held = self.held, []
        return held

    def states(self, saved: Iterator[Tensor], r: Evaluator, scheme: Scheme) -> HeldStates:
        return HeldStates(r, scheme, {n: next(saved) for n in self.anchors})


class HeldStates(States):
    """Some states of the forward pass, held as they are; those between are run again from the nearest below."""

    def __init__(self, r: Evaluator, scheme: Scheme, states: dict[int, Tensor]) -> None:
        self.r, self.scheme, self.held = r, scheme, states

    def take(self, n: int) -> Tensor:
        return self.held.pop(n)

    def replay(self, n: int, hold: tuple[int, ...]) -> Tensor:
        below = max(k for k in self.held if k <= n)
        state = start = self.held[below]
        self.r.replaying = True
        for k, state in enumerate(trajectory(self.r, self.scheme, start, below, n), start=below + 1):
            if k in hold:
                self.held[k] = state
        self.r.replaying = False
        return state


@dataclass(frozen=True)
class CodedState:
    """The code of a state. starts: whether it is that of the state itself, and not of a difference."""

    code: Code
    layout: Layout
    dtype: torch.dtype
    starts: bool


class KeepCodes(Keeper):
    """Keeps each state as the code of its increment over the estimate of the one before, which starts from zero.

        d_n = Q(x_n − x̂_{n−1}),   x̂_n = x̂_{n−1} + d_n,   x̂_{−1} = 0

    The loop is closed: what one code misses the next one sees, so that errors do not add up (design: differential
    pulse-code modulation of order 0). x_N is not kept. Between the blocks of a transition states may have another
    shape, where it starts from zero again.
    """

    def __init__(self, bits: int, depth: int) -> None:
        self.bits, self.depth = bits, depth
        self.coded: list[CodedState] = []
        self.estimate: Tensor | None = None  # x̂_n, flat, in float32

    def see(self, n: int, x: Tensor) -> None:
        if n == self.depth:
            self.estimate = None
            return
        layout = Layout.of(x)
        numbers = layout.flat(x.detach())
        starts = not self.coded or layout != self.coded[-1].layout
        if starts or self.estimate is None:
            self.estimate = torch.zeros_like(numbers)
        bits = min(self.bits + FIRST_BITS, 8) if starts else self.bits
        code = Code.of_difference(numbers, self.estimate, bits)
        self.coded.append(CodedState(code, layout, x.dtype, starts))

    def saved(self) -> list[Tensor]:
        tensors = [tensor for state in self.coded for tensor in (state.code.packed, state.code.ranges)]
        self.coded = [_with(state, _NOTHING, _NOTHING) for state in self.coded]
        return tensors

    def states(self, saved: Iterator[Tensor], r: Evaluator, scheme: Scheme) -> CodedStates:  # noqa: ARG002
        return CodedStates([_with(state, next(saved), next(saved)) for state in self.coded])


def _with(state: CodedState, packed: Tensor, ranges: Tensor) -> CodedState:
    return replace(state, code=replace(state.code, packed=packed, ranges=ranges))


class CodedStates(States):
    """Estimates of the states, each that of the next less the increment between them, which takes no evaluation.

    A state that is coded as it is, and not followed by differences, such as the input of a transition, is read off its
    code when it is needed, and not held between.
    """

    def __init__(self, coded: list[CodedState]) -> None:
        self.coded = coded
        self.running: Tensor | None = None  # the estimate of the last state

    def take(self, n: int) -> Tensor:
        while len(self.coded) > n + 1:
            state = self.coded.pop()
            if state.starts:
                self.running = None
            elif self.running is not None:
                state.code.add_to(self.running, -1)
        return self._last()

    def _last(self) -> Tensor:
        state = self.coded[-1]
        estimate = self.running
        if estimate is None:
            first = max(i for i, coded in enumerate(self.coded) if coded.starts)
            estimate = torch.zeros(state.code.numbers, device=state.code.packed.device)
            for coded in self.coded[first:]:
                coded.code.add_to(estimate)
            self.running = None if state.starts else estimate
        return state.layout.shaped(estimate.to(state.dtype))

    def again(self) -> Callable[[], Tensor] | None:
        """What gives the state taken last once more, so that it need not be held; None where it is held in any case."""
        return self._last if self.running is None else None

    def replay(self, n: int, hold: tuple[int, ...]) -> Tensor:
        raise NotImplementedError("every state is coded")


# The first state is coded as it is, which is larger than an increment, and what it misses the whole stage sees.
FIRST_BITS = 1
_NOTHING = torch.empty(0)
