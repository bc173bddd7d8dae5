"""Trace a module's own forward symbolically (torch.fx), its children left whole, and tell where a trace is no answer.

A trace is what forward did once, with a symbol in the state's place. It is none where forward draws numbers from a
generator, does another thing the second time, changes what it looks at, or lets its operations run in another mode
of autograd or autocast than its caller's, which traced code would leave out.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from .premises import premises_of
from .repeat import as_before, generator_states, generators_kept, kept_in
from .seen_values import Restless


class NotTraceable(Exception):
    """What a forward does cannot be told from a trace."""


@dataclass(frozen=True)
class Trace:
    """The graph of a forward of one tensor.

    mode_matters: whether forward looked at its mode.
    live: names of the module's own numbers of which the graph holds no value: where it needs one, it reads it.
    """

    graph: fx.Graph
    mode_matters: bool
    live: tuple[str, ...]


def trace(module: nn.Module, training: bool) -> Trace:
    """The trace of a module's forward in train or eval mode. Raises NotTraceable.

    Where the forward only calculates with the module's own numbers, the graph reads them; where it does more with
    them, such as to decide, it holds what came of their present values.
    """
    with _untouched(module):
        if own := [name for name, value in module.__dict__.items() if type(value) is float]:
            try:
                return _steady(module, training, own)
            except NotTraceable:
                pass
        return _steady(module, training, [])


def _steady(module: nn.Module, training: bool, own: list[str]) -> Trace:
    """A trace that comes out the same a second time, in other modes of everything around it."""
    first = _once(module, training, own, ambient=False)
    inner = [part for part in module.modules() if part is not module]
    modes = [part.training for part in inner]
    try:
        for part in inner:
            part.training = not part.training
        second = _once(module, training, own, ambient=True)
    finally:
        for part, mode in zip(inner, modes, strict=True):
            part.training = mode
    if _code(first.graph) != _code(second.graph):
        raise NotTraceable("it does not do the same each time")
    return first


def _code(graph: fx.Graph) -> str:
    return graph.python_code("self").src


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Raises NotTraceable where what is done inside draws random numbers, or changes what the forward looks at."""
    try:
        premises = premises_of(module, called=[name for name, _ in module.named_children()])
        with as_before(module), generators_kept():
            before, kept = generator_states(), kept_in(module)
            yield
            if generator_states() != before:
                raise NotTraceable("it draws random numbers")
            if kept_in(module) != kept:  # such as a counter of a child, by a method of the child's
                raise NotTraceable("it changes what its modules keep")
        if not premises.hold(module):
            raise NotTraceable("it changes what it looks at")
    except Restless as error:
        raise NotTraceable(str(error)) from error


class _ValuesRead(TorchFunctionMode):
    """Notes whether the value of a real tensor is read as a number: it may be another at the next call."""

    noted = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.noted = self.noted or getattr(func, "__name__", "") in _TO_PYTHON
        return func(*args, **(kwargs or {}))


_TO_PYTHON = frozenset({"__float__", "__int__", "__bool__", "__index__", "__complex__", "item", "tolist", "numpy"})


class _Symbol(fx.Proxy):
    """Stands for the state and what is made of it. It cannot be looked up, spelled out, or asked for its class.

    What asks gets an answer that is not that of a tensor, and may well hide it, as `size in {7, 14}` does; so the
    tracer is told, and the trace counts for nothing.
    """

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _Attribute(self, name)

    def __iadd__(self, other: Any) -> fx.Proxy:
        """Python would fall back on an addition out of place."""
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __hash__(self) -> int:
        _tell(self, "it looks up what a symbol of its input stands for")
        return super().__hash__()

    def __repr__(self) -> str:
        if not _asked_by_torch():
            _tell(self, "it spells out what a symbol of its input stands for")
        return super().__repr__()

    @property
    def __class__(self) -> Any:
        if not _asked_by_torch():
            _tell(self, "it asks for the class of its input")
        return type(self)

    @__class__.setter
    def __class__(self, kind: Any) -> None:
        raise TypeError("a symbol stays one")


class _Attribute(_Symbol, fx.proxy.Attribute):
    """The same of an attribute of a symbol, such as its shape."""


def _tell(symbol: fx.Proxy, question: str) -> None:
    assert isinstance(symbol.tracer, _BlockTracer)
    symbol.tracer.questions.append(question)


def _asked_by_torch() -> bool:
    """Whether torch itself asked, two frames up: it knows its symbols."""
    return str(sys._getframe(2).f_globals.get("__name__", "")).partition(".")[0] == "torch"


class _Number(_Symbol):
    """Stands for a number of the module's own, and says so to what asks isinstance(x, float)."""

    __class__ = property(lambda _: float)  # type: ignore[assignment]


class _BlockTracer(fx.Tracer):
    proxy_buffer_attributes = True  # what is done to the block's own buffers is part of the code, and not done now

    def __init__(self) -> None:
        super().__init__()
        self.ambient: tuple[bool, ...] = ()
        self.numbers: dict[str, fx.Proxy] = {}
        self.questions: list[str] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)

    def is_leaf_module(self, _: nn.Module, __: str) -> bool:
        return True

    def number(self, name: str, _: nn.Module) -> fx.Proxy:
        """The module's own number of that name, read where the graph reads it."""
        if name not in self.numbers:
            node = self.create_node("get_attr", name, (), {})
            self.numbers[name] = _Number(node, self)
        return self.numbers[name]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _ambient() != self.ambient:
            raise NotTraceable("it changes the mode of autograd or autocast")
        return super().create_node(*args, **kwargs)


def _ambient() -> tuple[bool, ...]:
    return (torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")))


@contextmanager
def _as_ambient(ambient: bool) -> Iterator[None]:
    """Autograd off and autocast on, or the other way around: what forward sets to the one differs from the other."""
    before = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    try:
        for device in ("cpu", "cuda"):
            torch.set_autocast_enabled(device, ambient)
        with torch.set_grad_enabled(not ambient):
            yield
    finally:
        for device, enabled in zip(("cpu", "cuda"), before, strict=True):
            torch.set_autocast_enabled(device, enabled)


def _once(module: nn.Module, training: bool, own: list[str], *, ambient: bool) -> Trace:
    forward = type(module).forward
    if "forward" in module.__dict__ or not isinstance(forward, FunctionType):
        raise NotTraceable("its forward is not that of its class")
    arguments = inspect.signature(module.forward).parameters.values()
    others = list(arguments)[1:]
    if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in others):
        raise NotTraceable("its forward takes more than the state")
    asked: list[bool] = []

    def mode(_: nn.Module) -> bool:
        asked.append(True)
        return training

    def assign(probe: nn.Module, name: str, value: object) -> None:
        if not name.startswith("_tensor_constant"):
            raise NotTraceable(f"it sets its attribute {name}")  # which the traced code would leave out
        probe.__dict__[name] = value

    # A shallow copy takes the constants that tracing finds; its class answers for the mode and the numbers.
    tracer = _BlockTracer()
    probe = type(module).__new__(type(module))
    probe.__dict__.update(module.__dict__)
    answers = {name: property(partial(tracer.number, name)) for name in own}
    probe.__class__ = type(
        type(module).__name__, (type(module),), {"training": property(mode), "__setattr__": assign, **answers}
    )
    defaults = {p.name: p.default for p in others if p.default is not p.empty}
    try:
        with _as_ambient(ambient), _ValuesRead() as values:
            tracer.ambient = _ambient()
            graph = tracer.trace(probe, concrete_args=defaults or None)
    except Exception as error:  # whatever a forward does with a symbol instead of a tensor
        reason = str(error).strip().splitlines()
        raise NotTraceable(reason[0] if reason else type(error).__name__) from error
    if values.noted:
        raise NotTraceable("it reads the value of a tensor")
    if tracer.questions:
        raise NotTraceable(tracer.questions[0])
    _drop_defaults(graph)
    return Trace(graph, bool(asked), tuple(own))


def _drop_defaults(graph: fx.Graph) -> None:
    """Remove the arguments that keep their defaults, and the checks that they do."""
    _, *others = [node for node in graph.nodes if node.op == "placeholder"]
    for node in others:
        for user in _all_users(node):
            graph.erase_node(user)
        graph.erase_node(node)


def _all_users(node: fx.Node) -> list[fx.Node]:
    """The nodes that depend on a node, the last first."""
    found: dict[fx.Node, None] = {}
    for user in node.users:
        found |= dict.fromkeys([*_all_users(user), user])
    return list(found)
