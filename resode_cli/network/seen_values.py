"""Values that a forward may go by, so that a change of them is seen: what is compared of each kind of object."""

from __future__ import annotations

import builtins
import enum
import sys
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType, ModuleType
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
COLLECTIONS = (tuple, list, set, frozenset)
# Their functions are not looked into.
LIBRARIES = frozenset({"torch", "numpy", "builtins"}) | sys.stdlib_module_names
# Theirs are known: what they look at beside tensors is found by its names.
TRUSTED = LIBRARIES | {"timm", "torchvision"}
ABSENT = object()


class Restless(Exception):
    """What forward looks at may be another at each call: a generator, an iterator, the clock."""


def root(thing: Any) -> str:
    """The package that a class or function says it is from. Code without a name claims to be Python's own."""
    found = (getattr(thing, "__module__", None) or "").partition(".")[0]
    own = found == "builtins" and getattr(builtins, getattr(thing, "__name__", ""), None) is not thing
    return "" if own and isinstance(thing, (type, FunctionType)) else found


@dataclass(frozen=True)
class Seen:
    """A value that may change and stay the same object: its class, and what counts of it."""

    kind: type
    content: Any


def as_seen(value: Any, names: AbstractSet[str]) -> Any:
    """The value, where it cannot change in place, else what is to be compared. Raises Restless."""
    if isinstance(value, (PLAIN, BY_IDENTITY)) or value is ABSENT:
        return value
    if isinstance(value, Tensor):
        return Seen(type(value), None)
    if isinstance(value, nn.Module):  # as in a list, where no child is
        own = value.__dict__
        return Seen(type(value), tuple((n, own[n]) for n in sorted(names & own.keys()) if isinstance(own[n], PLAIN)))
    if isinstance(value, partial):
        return Seen(partial, (value.func, as_seen((value.args, value.keywords), names)))
    if type(value) is dict:
        return Seen(dict, tuple((as_seen(k, names), as_seen(v, names)) for k, v in value.items()))
    if type(value) in COLLECTIONS:
        return Seen(type(value), tuple(as_seen(v, names) for v in value))
    raise Restless(f"what a {type(value).__name__} holds cannot be compared")


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
