"""Values that a forward may go by, so that a change of them is seen: what is compared of each kind of object."""

from __future__ import annotations

import enum
import os
import random
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (
    int,
    float,
    range,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.memory_format,
    slice,
    enum.Enum,
)
BY_IDENTITY = (type, FunctionType, BuiltinFunctionType, ModuleType, property, staticmethod, classmethod)
COLLECTIONS = (tuple, list, set, frozenset, deque)
STATEFUL = (random.Random, torch.Generator, ContextVar, Iterator, type(os.environ))
# Their functions are not looked into.
LIBRARIES = frozenset({"torch", "numpy", "builtins"}) | sys.stdlib_module_names
# Theirs are known: what they look at beside tensors is found by its names.
TRUSTED = LIBRARIES | {"timm", "torchvision"}
ABSENT = object()


class Restless(Exception):
    """What forward looks at may be another at each call: a generator, an iterator, the clock."""


def root(thing: Any) -> str:
    return (getattr(thing, "__module__", None) or "").partition(".")[0]


@dataclass(frozen=True)
class Seen:
    """A value that may change and stay the same object: its class, and what counts of it."""

    kind: type
    content: Any


def as_seen(value: Any, names: AbstractSet[str]) -> Any:
    """The value, where it cannot change in place, else what is to be compared. Raises Restless."""
    if isinstance(value, type) and is_namespace(value):
        named = [(n, v) for base in value.__mro__ for n, v in vars(base).items() if n in names and not callable(v)]
        return Seen(type(value), (value, *((n, v if v is value else as_seen(v, names)) for n, v in named)))
    if isinstance(value, (PLAIN, BY_IDENTITY)) or value is ABSENT:
        return value
    if isinstance(value, Tensor):
        return Seen(type(value), None)
    if isinstance(value, nn.Module):  # as in a list, where no child is
        own = value.__dict__
        return Seen(type(value), tuple((n, own[n]) for n in sorted(names & own.keys()) if isinstance(own[n], PLAIN)))
    if isinstance(value, STATEFUL) or type(value).__module__.startswith("numpy.random"):
        raise Restless(f"{type(value).__name__} moves on with each use")
    if isinstance(value, MethodType):
        return Seen(MethodType, (value.__func__, as_seen(value.__self__, names)))
    if isinstance(value, partial):
        return Seen(partial, (value.func, as_seen((value.args, value.keywords), names)))
    if isinstance(value, Mapping):
        return Seen(type(value), tuple((as_seen(k, names), as_seen(v, names)) for k, v in value.items()))
    if isinstance(value, COLLECTIONS):
        return Seen(type(value), tuple(as_seen(v, names) for v in value))
    if type(value).__module__ == "numpy":
        return Seen(type(value), (value.shape, value.tobytes()))
    found = tuple((n, as_seen(v, names)) for n, v in _attributes(value) if n in names or _answers_itself(type(value)))
    if not found and not hasattr(value, "__dict__") and not callable(value):
        raise Restless(f"what a {type(value).__name__} holds cannot be compared")
    return Seen(type(value), found)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """An object's own attributes, those in slots among them."""
    yield from getattr(value, "__dict__", {}).items()
    for base in type(value).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def is_namespace(kind: type) -> bool:
    """Whether a class may hold settings in its attributes."""
    return root(kind) not in LIBRARIES and not issubclass(kind, (nn.Module, enum.Enum))


def _answers_itself(kind: type) -> bool:
    """Whether objects of a class may find what they are asked for under other names, as configurations do."""
    own = {name for base in kind.__mro__ if root(base) not in LIBRARIES for name in base.__dict__}
    return bool(own & {"__getattr__", "__getattribute__", "__getitem__", "__float__", "__index__", "__bool__"})


def is_as_seen(value: Any, seen: Any, names: frozenset[str]) -> bool:
    if value is seen:
        return True
    if seen is float:  # a number that the code reads itself
        return type(value) is float
    if not isinstance(seen, Seen):
        return type(value) is type(seen) and isinstance(value, PLAIN) and bool(value == seen)
    if type(value) is not seen.kind:
        return False
    try:
        return bool(as_seen(value, names) == seen)
    except (Restless, RecursionError):
        return False
