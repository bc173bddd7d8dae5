"""Is a user's function plain enough for a trace of it to stand for it?

A trace shows what tensors go through, not what Python looked at on the way. Of that, only what is listed here can be
followed: the block's own children, tensors, methods and plain values, torch's functions of tensors, and plain values
and functions of the function's own module. Whatever else a function does, or looks at, makes its block one that is
called as it is, each time, which is right in any case.
"""

from __future__ import annotations

import dis
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import get_overridable_functions

from .seen_values import ABSENT, LIBRARIES, TRUSTED, Restless, root

# What bytecode may do, by the beginning of an instruction's name. Left out is what imports, spells out numbers, handles
# exceptions or contexts, looks up in sets and dictionaries, and assigns to anything but local variables.
_ALLOWED = (
    *("LOAD_FAST", "LOAD_CONST", "LOAD_SMALL_INT", "LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"),
    *("LOAD_DEREF", "LOAD_CLOSURE", "LOAD_ASSERTION_ERROR", "LOAD_COMMON_CONSTANT", "STORE_FAST", "STORE_DEREF"),
    *("DELETE_FAST", "POP_TOP", "POP_JUMP", "POP_ITER", "PUSH_NULL", "COPY", "SWAP", "NOP", "CACHE", "RESUME"),
    *("RETURN_", "CALL", "PRECALL", "KW_NAMES", "BINARY_", "COMPARE_OP", "IS_OP", "TO_BOOL", "UNARY_", "JUMP_"),
    *("BUILD_LIST", "BUILD_TUPLE", "BUILD_SLICE", "LIST_", "UNPACK_", "GET_ITER", "FOR_ITER", "END_FOR", "MAKE_"),
    *("SET_FUNCTION_ATTRIBUTE", "RAISE_VARARGS", "RERAISE", "YIELD_VALUE", "EXTENDED_ARG", "NOT_TAKEN"),
)
_BUILTINS = frozenset(
    "isinstance range zip enumerate reversed list tuple int float bool min max sum abs round super slice any all sorted"
    " AssertionError ValueError TypeError RuntimeError NotImplementedError".split()
)
_OF_MODULES = frozenset({"forward", "training", "children", "named_children"})
# How a tensor is recorded, and by whom, differs between the forward pass and what evaluates it again.
_OF_TENSORS = frozenset(dir(Tensor)) - {"requires_grad", "requires_grad_", "is_leaf", "grad", "grad_fn", "data"}
_NAMESPACES = (torch, torch.nn, torch.nn.functional, torch.jit, torch.special, torch.linalg, torch.fft, math)
_METHODS = (FunctionType, staticmethod, classmethod, property)
_CONSTANT = (torch.dtype, torch.memory_format, torch.layout)
_ALWAYS_ALIKE = (
    *(torch.jit.is_scripting, torch.jit.is_tracing),  # type: ignore[attr-defined]  # never where a trace is used
    *(torch.arange, torch.zeros, torch.ones, torch.full, torch.eye, torch.linspace),
)
# Special methods that have no say in what a forward does.
_HARMLESS = frozenset(
    "__init__ __repr__ __str__ __doc__ __module__ __qualname__ __dict__ __weakref__ __annotations__ __constants__"
    " __firstlineno__ __static_attributes__ __annotate__ __annotate_func__ __annotations_cache__ __setstate__"
    " __getstate__ __deepcopy__ __copy__ __reduce__ __reduce_ex__ __init_subclass__ __class_getitem__ __slots__"
    " __orig_bases__ __parameters__ __abstractmethods__ __classdictcell__ __jit_unused_properties__".split()
)


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a string, a constant of torch, or a tuple or list of such."""
    if type(value) in (tuple, list):
        return all(is_plain(element) for element in value)
    return type(value) in (int, float, bool, complex, str, type(None), torch.device, *_CONSTANT)


def check_modules(modules: Iterable[nn.Module]) -> None:
    """Raises Restless where a user's class of modules answers for itself, by a special method."""
    for kind in {type(module) for module in modules}:
        if odd := _special_methods(kind):  # type: ignore[arg-type]
            raise Restless(f"{kind.__name__} has a method {odd} of its own")


@lru_cache(maxsize=1024)
def _special_methods(kind: type) -> str:
    for base in kind.__mro__:
        if root(base) in TRUSTED:
            continue
        for name in base.__dict__:
            if name.startswith("__") and name.endswith("__") and name not in _HARMLESS:
                return name
    return ""


def check_function(function: FunctionType, modules: Iterable[nn.Module]) -> None:
    """Raises Restless, naming what it is, where a user's function does or looks at more than can be followed.

    modules: those whose attributes it may look at.
    """
    if function.__dict__:
        raise Restless(f"{function.__name__} has attributes")
    for cell in function.__closure__ or ():
        content = content_of(cell)
        own_class = isinstance(content, type) and issubclass(content, nn.Module)  # what super() needs
        if not (own_class or is_plain(content) or isinstance(content, FunctionType)):
            raise Restless(f"{function.__name__} has a {type(content).__name__} in its closure")
    for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        if not is_plain(default):
            raise Restless(f"{function.__name__} has a {type(default).__name__} as a default")
    modules = tuple(modules)
    for code in _codes(function.__code__):
        for chain in _chains_in(code):
            if isinstance(chain, str):
                _check_attribute(chain, modules)
            else:
                _check_global(function, *chain)


def content_of(cell: CellType) -> Any:
    """What a closure's cell holds, ABSENT for nothing."""
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return ABSENT


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


@lru_cache(maxsize=4096)
def _chains_in(code: CodeType) -> tuple[str | tuple[str, ...], ...]:
    """What a function looks at: globals with what is looked at in them, and other attributes, by their names alone.

    Raises Restless for an instruction that is not allowed.
    """
    found: list[str | tuple[str, ...]] = []
    chain: tuple[str, ...] = ()
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if not name.startswith(_ALLOWED):
            raise Restless(f"{code.co_name} does more than calculate ({name})")
        if name in ("LOAD_ATTR", "LOAD_METHOD") and chain:
            chain = (*chain, instruction.argval)
            continue
        if chain:
            found.append(chain)
            chain = ()
        if name == "LOAD_GLOBAL":
            chain = (instruction.argval,)
        elif name.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")):
            found.append(instruction.argval)
    return (*found, chain) if chain else tuple(found)


def _check_attribute(name: str, modules: tuple[nn.Module, ...]) -> None:
    """That what has the name in a module can be followed, and that a tensor has it where no module has."""
    known = name in _OF_TENSORS or name in _OF_MODULES
    for module in modules:
        own = module.__dict__
        known = known or any(name in own[table] for table in ("_modules", "_parameters", "_buffers"))
        holders = [own, *(base.__dict__ for base in type(module).__mro__ if root(base) not in TRUSTED)]
        for holder in holders:
            if name in holder:
                known = True
                value = holder[name]
                if not (is_plain(value) or _is_traced(value) or (holder is not own and isinstance(value, _METHODS))):
                    raise Restless(f"it looks at {name}, a {type(value).__name__}")
        known = known or any(name in b.__dict__ for b in type(module).__mro__ if b not in (nn.Module, object))
    if not known:
        raise Restless(f"it looks at {name}")


def _check_global(function: FunctionType, first: str, *names: str) -> None:
    """That a global, or what is looked at in it, can be followed."""
    value = function.__globals__.get(first, ABSENT)
    if value is ABSENT and first in _BUILTINS and not names:
        return
    for name in names:
        if not isinstance(value, ModuleType) or value not in _NAMESPACES:
            raise Restless(f"it looks at {name} of {first}")
        value = getattr(value, name, ABSENT)
    own = is_plain(value) or (isinstance(value, FunctionType) and root(value) not in LIBRARIES)
    if not (_is_traced(value) or (own and not names)):
        raise Restless(f"it uses {'.'.join((first, *names))}")


@lru_cache(maxsize=1)
def _overridable() -> frozenset[int]:
    """Torch's functions that a tensor may answer for, so that a trace shows them."""
    return frozenset(id(f) for functions in get_overridable_functions().values() for f in functions)


def _is_traced(value: Any) -> bool:
    """Whether a trace shows what it does, or it does nothing that changes."""
    if isinstance(value, (*_CONSTANT, float)) or value in _ALWAYS_ALIKE:
        return True
    if isinstance(value, BuiltinFunctionType) and value.__module__ == "math":
        return True
    return value is Tensor or id(value) in _overridable()
