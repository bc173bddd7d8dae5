"""The states of the forward pass: what is kept of them for the backward sweep, and how that gets them back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

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


class KeepCodes(Keeper):
    """Keeps each state as the code of its increment over the estimate of the one before, which starts from zero.

        d_n = Q(x_n − x̂_{n−1}),   x̂_n = x̂_{n−1} + d_n,   x̂_{−1} = 0

    The loop is closed: what one code misses the next one sees, so that errors do not add up (design: differential
    pulse-code modulation of order 0). x_N is not kept.
    """

    def __init__(self, bits: int, depth: int) -> None:
        self.bits, self.depth = bits, depth
        self.codes: list[Code] = []
        self.layout: Layout | None = None
        self.dtypes: list[torch.dtype] = []
        self.estimate: Tensor | None = None  # x̂_n, flat, in float32

    def see(self, n: int, x: Tensor) -> None:
        if n == self.depth:
            self.estimate = None
            return
        self.layout = self.layout or Layout.of(x)
        self.dtypes.append(x.dtype)
        numbers = self.layout.flat(x.detach())
        bits = self.bits if n else min(self.bits + FIRST_BITS, 8)
        if self.estimate is None:
            self.estimate = torch.zeros_like(numbers)
        self.codes.append(Code.of_difference(numbers, self.estimate, bits))

    def saved(self) -> list[Tensor]:
        tensors = [tensor for code in self.codes for tensor in (code.packed, code.ranges)]
        self.codes = [replace(code, packed=_NOTHING, ranges=_NOTHING) for code in self.codes]
        return tensors

    def states(self, saved: Iterator[Tensor], r: Evaluator, scheme: Scheme) -> CodedStates:  # noqa: ARG002
        assert self.layout is not None
        codes = [replace(code, packed=next(saved), ranges=next(saved)) for code in self.codes]
        return CodedStates(codes, self.layout, self.dtypes)


class CodedStates(States):
    """Estimates of the states, each that of the next less the increment between them, which takes no evaluation.

    A single state, such as the input of a transition, is read off its code when it is needed, and not held between.
    """

    def __init__(self, codes: list[Code], layout: Layout, dtypes: Sequence[torch.dtype]) -> None:
        self.codes, self.layout, self.dtypes = codes, layout, dtypes
        self.running = self._sum() if len(codes) > 1 else None

    def _sum(self) -> Tensor:
        estimate = torch.zeros(self.codes[0].numbers, device=self.codes[0].packed.device)
        for code in self.codes:
            code.add_to(estimate)
        return estimate

    def take(self, n: int) -> Tensor:
        while len(self.codes) > n + 1:
            code = self.codes.pop()
            if self.running is not None:
                code.add_to(self.running, -1)
        return self._last()

    def _last(self) -> Tensor:
        estimate = self._sum() if self.running is None else self.running
        return self.layout.shaped(estimate.to(self.dtypes[len(self.codes) - 1]))

    def again(self) -> Callable[[], Tensor] | None:
        """What gives the state taken last once more, so that it need not be held; None where it is held in any case."""
        return self._last if self.running is None else None

    def replay(self, n: int, hold: tuple[int, ...]) -> Tensor:
        raise NotImplementedError("every state is coded")


# The first state is coded as it is, which is larger than an increment, and what it misses the whole stage sees.
FIRST_BITS = 1
_NOTHING = torch.empty(0)
