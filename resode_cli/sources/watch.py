"""Watch a network run once: which tensor went into and came out of each module, and what else read it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..network.block_inputs import equal, further_arguments

Stack = tuple[nn.Module, ...]  # the modules being called, the outermost first


@dataclass
class Run:
    """What went into a module at one of its calls, and what came out.

    into: the first argument; further: other arguments, by name, that are not left at their defaults.
    """

    into: Tensor | None = None
    out: Tensor | None = None
    further: dict[str, Any] = field(default_factory=dict)

    @property
    def keeps_shape(self) -> bool:
        """Whether it made one tensor of another of the same shape."""
        if self.into is None or self.out is None:
            return False
        return self.into.shape == self.out.shape and self.into.dtype == self.out.dtype


@dataclass
class Call:
    """All calls of a module. They count as one where each is of what the one before it gave, as in a loop.

    into: what the first was given then, else the last; out: what the last gave.
    """

    runs: list[Run] = field(default_factory=list)

    @property
    def into(self) -> Tensor | None:
        return self.runs[0 if self.in_a_row else -1].into if self.runs else None

    @property
    def out(self) -> Tensor | None:
        return self.runs[-1].out if self.runs else None

    @property
    def further(self) -> dict[str, Any]:
        return self.runs[-1].further if self.runs else {}

    @property
    def in_a_row(self) -> bool:
        """Whether each call but the first was of what the one before it gave."""
        return all(b.into is not None and b.into is a.out for a, b in itertools.pairwise(self.runs))

    @property
    def alike(self) -> bool:
        """Whether every call was with the same arguments beside the first."""
        return all(equal(a.further, b.further) for a, b in itertools.pairwise(self.runs))

    @property
    def keeps_shape(self) -> bool:
        """Whether it was called, and each time made one tensor of another of the same shape."""
        return bool(self.runs) and all(run.keeps_shape for run in self.runs)


@dataclass
class Watch:
    """One forward pass in eval mode."""

    # In the order in which they began. What came out is held, so that no other tensor gets its id.
    calls: dict[nn.Module, Call] = field(default_factory=dict)
    # By id of a tensor that came out of a module.
    readers: dict[int, list[Stack]] = field(default_factory=dict)

    def of(self, module: nn.Module) -> Call:
        return self.calls.get(module, Call())

    def read_elsewhere(self, first: nn.Module, second: nn.Module) -> nn.Module | None:
        """A module, neither of two linked ones, that reads the tensor between them: it is no hidden state then.

        Between a module and itself are the results of all its calls but the last.
        """
        runs = self.of(first).runs
        for run in runs[:-1] if first is second else runs[-1:]:
            for stack in self.readers.get(id(run.out), ()):
                if first not in stack and second not in stack:
                    return stack[-1]
        return None


def watch(net: nn.Module, example: Tensor, *, recorded: bool = False) -> Watch:
    """Run the network on `example`, recorded by autograd or not. Its mode is put back."""
    seen = Watch()
    stack: list[nn.Module] = []
    begun: list[Run] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack.append(module)
        into = args[0] if args and isinstance(args[0], Tensor) else None
        run = Run(into, further=further_arguments(module, args, kwargs))
        seen.calls.setdefault(module, Call()).runs.append(run)
        begun.append(run)

    def after(module: nn.Module, _: tuple[Any, ...], out: object) -> None:
        stack.pop()
        begun.pop().out = out if isinstance(out, Tensor) else None
        if isinstance(out, Tensor):
            seen.readers.setdefault(id(out), [])

    handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in net.modules()]
    handles += [m.register_forward_hook(after) for m in net.modules()]
    training = {m: m.training for m in net.modules()}
    net.eval()
    try:
        # The record alone is asked for, not what a backward pass would need. Unrecorded, a block may have one inside.
        unsaved = saved_tensors_hooks(_nothing, _nothing) if recorded else nullcontext()
        with torch.set_grad_enabled(recorded), unsaved, _Readers(seen.readers, stack):
            net(example)
    finally:
        for module, mode in training.items():
            module.training = mode
        for handle in handles:
            handle.remove()
    return seen


def _nothing(_: object) -> Tensor:
    return torch.empty(0)


class _Readers(TorchFunctionMode):
    """Notes, for every operation that makes tensors, the tensors it reads and the modules it runs in."""

    def __init__(self, readers: dict[int, list[Stack]], stack: Iterable[nn.Module]) -> None:
        super().__init__()
        self.readers, self.stack = readers, stack

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(True for _ in _tensors(result)):
            stack = tuple(self.stack)
            for tensor in {id(t) for t in _tensors((args, kwargs))} & self.readers.keys():
                self.readers[tensor].append(stack)
        return result


def _tensors(values: object) -> Iterator[Tensor]:
    yield from (value for value in tree_leaves(values) if isinstance(value, Tensor))
