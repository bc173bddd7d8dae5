"""Between the blocks of a stage: a network that loops over its blocks gets there no state, but a stand-in for one.

A network may run its blocks in a loop of its own. The first block then is the stage, which runs all of them, and the
others hand its result on. That is right as long as the loop does nothing but run its blocks in their order; what it
does was read off one run, and it may decide otherwise at another input or setting. So what it gets from a block is a
stand-in, which the next block takes, and the last one gives the result for. Whoever takes it for a state is told.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ResodeError
from .block_inputs import equal, further_arguments


class OnePiece(ResodeError, TypeError):
    """What a stage cannot do. A TypeError too, so that `list(stage)`, which asks for a length, goes on without."""

    def __init__(self, stage: str, what: str) -> None:
        reason = "its steps run as one, and states between them are no features (`OdeStage.tap` sees them)"
        super().__init__(f"stage {stage} {what}: {reason}")


class AnotherLoop(ResodeError):
    """A network that does not run a stage's blocks one after the other, or not always."""

    def __init__(self, stage: str) -> None:
        super().__init__(
            f"stage {stage}: here the network does not run its blocks one after the other, each on what the one before"
            " it gave, as it did in eval mode when they were found, and a stage can stand for no more than that;"
            " set what decides about it first, and convert then"
        )


class StandIn(Tensor):
    """Stands for the state after some of a stage's blocks, which the network may hand on and do no more with.

    stage: whose; at: after how many blocks; result: what the stage gave; further: what its first block was given
        beside the state.
    """

    stage: str
    at: int
    result: Tensor
    further: Mapping[str, Any]

    @classmethod
    def of(cls, stage: str, at: int, result: Tensor, further: Mapping[str, Any]) -> StandIn:
        made = Tensor._make_subclass(cls, torch.empty(0))  # type: ignore[attr-defined]
        made.stage, made.at, made.result, made.further = stage, at, result, further
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What makes no tensor of it, such as its shape, is allowed, and what leaves it as it is, such as a `to`."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, StandIn)]
        before = [(x.result, x.result._version, x.result.grad_fn) for x in given]
        args, kwargs = tree_map(lambda leaf: leaf.result if isinstance(leaf, StandIn) else leaf, (args, kwargs or {}))
        made = func(*args, **kwargs)
        left = all(x._version == version and x.grad_fn is history for x, version, history in before)
        if left and made is given[0].result:
            return given[0]
        if not left or any(isinstance(leaf, Tensor) for leaf in tree_leaves(made)):
            raise AnotherLoop(given[0].stage)
        return made


class _Running(threading.local):
    """Converted networks that run as a whole: for each, whether it is recorded by autograd."""

    def __init__(self) -> None:
        self.recorded: list[bool] = []


_running = _Running()


@contextmanager
def networks_forward() -> Iterator[None]:
    """While a converted network runs as a whole, its loops get stand-ins."""
    _running.recorded.append(torch.is_grad_enabled())
    try:
        yield
    finally:
        _running.recorded.pop()


def _is_watched() -> bool:
    """Whether a converted network runs, and this is its own code: `checkpoint(block, x)` that re-enters is not."""
    return bool(_running.recorded) and _running.recorded[-1] == torch.is_grad_enabled()


def stand_in_for(stage: str, result: Tensor, further: Mapping[str, Any]) -> Tensor:
    """What the network gets from a stage's first block, where others follow."""
    return StandIn.of(stage, 0, result, further) if _is_watched() else result


def check_state(stage: str, given: object) -> None:
    """Raises AnotherLoop for a stand-in where a state or a result is expected."""
    if any(isinstance(leaf, StandIn) for leaf in tree_leaves(given)):
        raise AnotherLoop(stage)


class Emptied(nn.Module):
    """In the place of a block that its stage runs: hands on what stands for the state.

    at: how many blocks of the stage come before it; last: whether it is the last.
    """

    def __init__(self, stage: str, at: int, block: nn.Module, *, last: bool) -> None:
        super().__init__()
        self.stage, self.at, self.last = stage, at, last
        taken = signature(block.forward)
        # Without annotations, which not every process knows.
        parameters = [parameter.replace(annotation=Parameter.empty) for parameter in taken.parameters.values()]
        self.signature = taken.replace(parameters=parameters, return_annotation=Parameter.empty)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(input, StandIn):
            if _is_watched() and type(input) is Tensor:
                raise AnotherLoop(self.stage)
            return input
        further = further_arguments(self.signature, (input, *args), kwargs)
        if (
            not _is_watched()
            or input.stage != self.stage
            or input.at != self.at - 1
            or not equal(dict(input.further), further)
        ):
            raise AnotherLoop(self.stage)
        return input.result if self.last else StandIn.of(self.stage, self.at, input.result, input.further)

    def extra_repr(self) -> str:
        return f"block {self.at} of stage {self.stage}, which runs it"
