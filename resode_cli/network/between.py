"""Between the blocks of a stage: a network that loops over its blocks gets there no state, but a stand-in for one.

A network may run its blocks in a loop of its own. The first block then is the stage, which runs all of them, and the
others hand its result on. That is right as long as the loop does nothing but run its blocks in their order; what it
does was read off one run, and it may decide otherwise at another input or setting. So what it gets from a block is a
stand-in, which the next block takes, and the last one gives the result for. Whoever takes it for a state is told.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, signature
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointFunction

from ..errors import ResodeError
from .block_inputs import equal, further_arguments
from .outside import Opening, Reached
from .specs import StageSpec


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
            " it gave, as it did in eval mode when they were found, or a hook looks at what is between them; that is"
            " all that a stage can stand for (set what decides about it first, and convert then)"
        )


_NOTHING = torch.empty(0)


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
        made = Tensor._make_subclass(cls, _NOTHING)  # type: ignore[attr-defined]
        made.stage, made.at, made.result, made.further = stage, at, result, further
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Its shape and the like may be asked for, and what leaves it as it is may be done, such as a `to`."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, StandIn)]
        before = [(x.result, x.result._version, x.result.grad_fn) for x in given]
        args, kwargs = tree_map(lambda leaf: leaf.result if isinstance(leaf, StandIn) else leaf, (args, kwargs or {}))
        made = func(*args, **kwargs)
        left = all(x._version == version and x.grad_fn is history for x, version, history in before)
        if left and made is given[0].result:
            return given[0]
        if not left or _name(func) not in _ABOUT:
            raise AnotherLoop(given[0].stage)
        return made


# What is the same between the blocks as after them.
_ABOUT = frozenset(
    "shape dtype device ndim layout is_cuda is_cpu is_meta is_leaf requires_grad itemsize nbytes names size dim numel"
    " stride nelement ndimension element_size is_contiguous is_floating_point is_complex __len__ get_device is_sparse"
    " is_nested is_quantized is_mps is_xla".split()
)


def _name(func: Any) -> str:
    """The name of a function, or of the attribute that a getter gets."""
    name = str(getattr(func, "__name__", ""))
    return str(getattr(func.__self__, "__name__", "")) if name == "__get__" else name


@dataclass(frozen=True)
class _Run:
    """A converted network that runs as a whole.

    recorded: whether autograd records it. opening: how it came to its first stage, if that is a part by itself.
    to_entry: whether it is to run up to its first stage alone.
    """

    recorded: bool
    opening: Opening | None
    to_entry: bool


class _Running(threading.local):
    def __init__(self) -> None:
        self.runs: list[_Run] = []


_running = _Running()


@contextmanager
def networks_forward(opening: Opening | None = None, *, to_entry: bool = False) -> Iterator[None]:
    """While a converted network runs as a whole, its loops get stand-ins."""
    _running.runs.append(_Run(torch.is_grad_enabled(), opening, to_entry))
    try:
        yield
    finally:
        _running.runs.pop()
        if opening is not None:
            opening.abandon()


def enter_stage(x: Tensor) -> Tensor:
    """The state that a stage is given, as it goes on with it."""
    run = _running.runs[-1] if _running.runs else None
    if run is not None and run.to_entry:
        raise Reached(x)
    if run is not None and run.opening is not None and run.opening.is_open:
        return run.opening.close(x)
    return x


def is_watched() -> bool:
    """Whether a converted network runs, and not inside `checkpoint(block, x)` that re-enters, which loses stand-ins."""
    if not _running.runs:
        return False
    return _running.runs[-1].recorded == torch.is_grad_enabled() or not _inside_reentry()


def _inside_reentry() -> bool:
    """Whether a function runs for torch's checkpoint that enters autograd again."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


def stand_in_for(stage: str, result: Tensor, further: Mapping[str, Any]) -> Tensor:
    """What the network gets from a stage's first block, where others follow, or from the first call of one block."""
    return StandIn.of(stage, 0, result, further) if is_watched() else result


def check_state(stage: str, given: object) -> None:
    """Raises AnotherLoop for a stand-in where a state or a result is expected."""
    if any(isinstance(leaf, StandIn) for leaf in tree_leaves(given)):
        raise AnotherLoop(stage)


def hand_on(stage: str, at: int, given: StandIn, further: Mapping[str, Any], *, last: bool) -> Tensor:
    """What the network gets from the block that comes after `at` others, which the stage has run.

    Raises AnotherLoop if that block is not the next one.
    """
    if not is_watched() or given.stage != stage or given.at != at - 1 or not equal(dict(given.further), dict(further)):
        raise AnotherLoop(stage)
    return given.result if last else StandIn.of(stage, at, given.result, given.further)


def call_again(stage: str, calls: int, given: StandIn, further: Mapping[str, Any]) -> Tensor:
    """What a loop over one block gets from its second call on. calls: how many there are."""
    at = given.at + 1
    return hand_on(stage, at, given, further, last=at == calls - 1)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # else dynamo goes on without, where it raises
def refuse_to_trace(stage: str) -> NoReturn:
    """Raises ResodeError for a loop over one block where the network's code is not run as it stands."""
    raise ResodeError(
        f"stage {stage} stands for a loop over one block, so that the network can be neither compiled nor traced as a"
        " whole; `model.compile_branches()` compiles its steps, `resode export` exports it"
    )


def mark_as_own(stage: Any, result: Tensor) -> None:
    """Note whose result it is, for a stage that stands for a loop over one block."""
    result._result_of = weakref.ref(stage)  # type: ignore[attr-defined]


def check_not_its_own(stage: Any, x: Tensor) -> None:
    """Raises ResodeError for a stage's own result, outside the model's forward, where a loop is not told from a call.

    Else a loop over one block would run all the steps each time.
    """
    maker = getattr(x, "_result_of", None)
    if maker is not None and maker() is stage:
        raise ResodeError(
            f"stage {stage.spec.name} stands for all calls of its block in the network's loop, which only the"
            " model's own forward can tell apart: call the model in place of `model.net`, and checkpoint with"
            " use_reentrant=False"
        )


class Emptied(nn.Module):
    """In the place of a block that its stage runs: hands on what stands for the state.

    at: how many blocks of the stage come before it; last: whether it is the last.
    block: the block, in a list since it is none of its children; empty where the stage has it no more. A loop that
        asks for an attribute gets the block's.
    """

    def __init__(self, stage: str, at: int, block: nn.Module, *, last: bool) -> None:
        super().__init__()
        self.stage, self.at, self.last, self.block = stage, at, last, [block]
        taken = signature(block.forward)
        # Without annotations, which not every process knows.
        parameters = [parameter.replace(annotation=Parameter.empty) for parameter in taken.parameters.values()]
        self.signature = taken.replace(parameters=parameters, return_annotation=Parameter.empty)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(input, StandIn):
            if is_watched() and type(input) is Tensor:
                raise AnotherLoop(self.stage)
            return input
        further = further_arguments(self.signature, (input, *args), kwargs)
        return hand_on(self.stage, self.at, input, further, last=self.last)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not is_watched():
                raise
            for block in self.__dict__["block"]:
                return getattr(block, name)
            raise AnotherLoop(self.stage) from None

    def extra_repr(self) -> str:
        return f"block {self.at} of stage {self.stage}, which runs it"


class Entrance(nn.Module):
    """A stage, as the first of the modules that a loop over it gets."""

    def __init__(self, stage: Any) -> None:
        super().__init__()
        self._stage = [stage]  # not a child: it has its place already

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            (stage,) = self._stage
            return getattr((*stage.transition, *stage.blocks)[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        (stage,) = self._stage
        result: Tensor = stage(*args, **kwargs)
        return stand_in_for(stage.spec.name, result, stage.take(*args, **kwargs)) if stage.emptied else result


class InOnePiece:
    """What a network may do with a stage in the place of a sequence: run it in a loop, but not look into it."""

    spec: StageSpec
    emptied: tuple[Emptied, ...]

    def __iter__(self) -> Iterator[nn.Module]:
        """The stage, and what stands in the places of its further blocks: for sources that run them in a loop."""
        yield Entrance(self)
        yield from self.emptied

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        raise OnePiece(self.spec.name, "has no length")

    def __getitem__(self, index: object) -> nn.Module:
        raise OnePiece(self.spec.name, "cannot be indexed")

    @property
    def grad_checkpointing(self) -> bool:
        """For sources that checkpoint a stage themselves: here the adjoint does that."""
        return False

    @grad_checkpointing.setter
    def grad_checkpointing(self, enable: bool) -> None:
        if enable:
            raise ResodeError(f"stage {self.spec.name} checkpoints by its adjoint: use_adjoint(Adjoint('checkpoint'))")
