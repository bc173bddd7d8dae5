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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import get_overridable_functions

from .seen_values import ABSENT, LIBRARIES, TRUSTED, Restless, root

# What bytecode may do, by the beginning of an instruction's name. Left out is what imports, handles exceptions or
# contexts, makes sets and dictionaries, and assigns to anything but local variables.
_ALLOWED = (
    *("LOAD_FAST", "LOAD_CONST", "LOAD_SMALL_INT", "LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"),
    *("LOAD_DEREF", "LOAD_CLOSURE", "LOAD_ASSERTION_ERROR", "LOAD_COMMON_CONSTANT", "STORE_FAST", "STORE_DEREF"),
    *("DELETE_FAST", "POP_TOP", "POP_JUMP", "POP_ITER", "PUSH_NULL", "COPY", "SWAP", "NOP", "CACHE", "RESUME"),
    *("RETURN_", "CALL", "PRECALL", "KW_NAMES", "BINARY_", "COMPARE_OP", "CONTAINS_OP", "IS_OP", "TO_BOOL", "UNARY_"),
    *("JUMP_", "BUILD_LIST", "BUILD_TUPLE", "BUILD_SLICE", "LIST_", "UNPACK_", "GET_ITER", "FOR_ITER", "END_FOR"),
    *("FORMAT_", "CONVERT_VALUE", "BUILD_STRING", "MAKE_", "SET_FUNCTION_ATTRIBUTE", "RAISE_VARARGS", "RERAISE"),
    *("YIELD_VALUE", "EXTENDED_ARG", "NOT_TAKEN"),
)
_BUILTINS = frozenset(
    "isinstance len range zip enumerate reversed list tuple int float bool min max sum abs round super slice any all"
    " sorted AssertionError ValueError TypeError RuntimeError NotImplementedError".split()
)
_OF_MODULES = frozenset({"forward", "training", "children", "named_children"})
# How a tensor is recorded, and by whom, differs between the forward pass and what evaluates it again.
_OF_TENSORS = frozenset(name for name in dir(Tensor) if not name.startswith("_")) - {
    *("requires_grad", "requires_grad_", "is_leaf", "grad", "grad_fn", "data", "register_hook", "retain_grad"),
}
_NAMESPACES = (torch, torch.nn, torch.nn.functional, torch.jit, torch.special, torch.linalg, torch.fft, math)
_OPEN = ("timm", "torchvision")
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


class Look(NamedTuple):
    """What a function looks at: `names`, one in the other.

    of: 'global'; 'first', of its first argument, which may be the block; or 'other', of whatever it has then.
    sure: not, where the function asks first whether it is there.
    """

    of: str
    names: tuple[str, ...]
    sure: bool = True


def check_function(function: FunctionType, modules: Iterable[nn.Module]) -> list[tuple[ModuleType, str]]:
    """Raises Restless, naming what it is, where a user's function does or looks at more than can be followed.

    modules: those whose attributes it may look at.
    Returns what it looks at in Python modules, such as a function of torch.
    """
    if function.__dict__:
        raise Restless(f"{function.__name__} has attributes")
    for cell in function.__closure__ or ():
        content = content_of(cell)
        own_class = isinstance(content, type) and issubclass(content, nn.Module)  # what super() needs
        if not (own_class or is_plain(content) or isinstance(content, FunctionType)):
            raise Restless(f"{function.__name__} has a {type(content).__name__} in its closure")
    for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        if not is_plain(default) or isinstance(default, list):
            raise Restless(f"{function.__name__} has a {type(default).__name__} as a default")
    modules = tuple(modules)
    found = []
    for code, first in _codes(function.__code__):
        looks = _looks_in(code, first)
        asked = {look.names[0] for look in looks if not look.sure}
        calls_super = any(look.names[0] in ("super", "__class__") for look in looks)
        for look in looks:
            if look.of == "global":
                found += _check_global(function, *look.names)
            elif look.of == "first":
                _check_first(look, modules, sure=look.names[0] not in asked)
            else:
                _check_other(look, modules, calls_super=calls_super)
    return found


def content_of(cell: CellType) -> Any:
    """What a closure's cell holds, ABSENT for nothing."""
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return ABSENT


def _codes(code: CodeType, first: str = "") -> Iterator[tuple[CodeType, str]]:
    """The code of a function and of those inside it, each with the name that the outermost first argument has there."""
    first = first or (code.co_varnames[0] if code.co_argcount else "")
    storing = [
        i.argval if isinstance(i.argval, tuple) else (i.argval,)
        for i in dis.get_instructions(code)
        if i.opname.startswith(("STORE_FAST", "STORE_DEREF"))
    ]
    yield code, "" if any(first in names for names in storing) else first
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant, first if first in constant.co_freevars else "\0")


@lru_cache(maxsize=4096)
def _looks_in(code: CodeType, first: str) -> tuple[Look, ...]:
    """What a function looks at. Raises Restless for an instruction that is not allowed.

    first: the name of what may be the block.
    """
    found: list[Look] = []
    chain: Look | None = None
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("PUSH_NULL", "NOP", "CACHE", "RESUME")]
    for n, instruction in enumerate(instructions):
        name, what = instruction.opname, instruction.argval
        if not name.startswith(_ALLOWED):
            raise Restless(f"{code.co_name} does more than calculate ({name})")
        if name in ("LOAD_ATTR", "LOAD_METHOD") and chain is not None:
            chain = chain._replace(names=(*chain.names, what))
            continue
        if chain is not None and chain.names:
            found.append(chain)
        chain = None
        if name == "LOAD_GLOBAL" and what in ("getattr", "hasattr"):
            held, asked = (*instructions[n + 1 : n + 3], None, None)[:2]
            if not (_loads(held, first) and asked and asked.opname == "LOAD_CONST" and isinstance(asked.argval, str)):
                raise Restless(f"it uses {what}")
            found.append(Look("first", (asked.argval,), sure=False))
        elif name == "LOAD_GLOBAL":
            chain = Look("global", (what,))
        elif _loads(instruction, first):
            chain = Look("first", ())
        elif name.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")):
            chain = Look("other", (what,))
            if name == "LOAD_SUPER_ATTR":
                found.append(Look("other", ("__class__",)))
    return (*found, chain) if chain is not None and chain.names else tuple(found)


def _loads(instruction: dis.Instruction | None, first: str) -> bool:
    """Whether an instruction puts the function's first argument on top of the stack."""
    if instruction is None or not first or not instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
        return False
    what = instruction.argval
    return bool(what == first or (isinstance(what, tuple) and what[-1] == first))


def _check_first(look: Look, modules: tuple[nn.Module, ...], *, sure: bool) -> None:
    """That what is looked at in the first argument can be followed, as far as it may be a block's."""
    name, *others = look.names
    if not _check_attribute(name, modules) and sure:
        raise Restless(f"it looks at {name}")
    children = [child for module in modules if (child := module._modules.get(name)) is not None]
    for child in children if others else ():
        _check_in_child(name, child, *others)
    if not children and not set(others) <= _OF_TENSORS:
        raise Restless(f"it looks at {'.'.join(look.names)}")


def _check_other(look: Look, modules: tuple[nn.Module, ...], *, calls_super: bool) -> None:
    """That what is looked at in anything else is a tensor's, or, in what super() gives, the block's."""
    name, *others = look.names
    in_block = calls_super and name not in _OF_TENSORS and _check_attribute(name, modules)
    if not (in_block or name in _OF_TENSORS) or not set(others) <= _OF_TENSORS:
        raise Restless(f"it looks at {'.'.join(look.names)}")


def _check_in_child(path: str, child: nn.Module, name: str, *others: str) -> None:
    """That what is looked at in a child, which itself may be called, can be followed: its tensors and plain values."""
    own = child.__dict__
    if name in own["_parameters"] or name in own["_buffers"]:
        if set(others) <= _OF_TENSORS:
            return
    elif not others and (name in _OF_MODULES or is_plain(own.get(name, getattr(type(child), name, ABSENT)))):
        return
    raise Restless(f"it looks at {'.'.join((path, name, *others))}")


def _check_attribute(name: str, modules: tuple[nn.Module, ...]) -> bool:
    """Whether a module or a tensor has it. Raises Restless where what a module has cannot be followed."""
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
    return known


def _check_global(function: FunctionType, first: str, *names: str) -> list[tuple[ModuleType, str]]:
    """That a global, or what is looked at in it, can be followed; what is looked at in Python modules."""
    value = function.__globals__.get(first, ABSENT)
    if value is ABSENT and first in _BUILTINS and not names:
        return []
    found = []
    for name in names:
        opened = isinstance(value, ModuleType) and (value in _NAMESPACES or value.__name__.partition(".")[0] in _OPEN)
        if not opened:
            raise Restless(f"it looks at {name} of {first}")
        found.append((value, name))
        value = vars(value).get(name, ABSENT)
    own = is_plain(value) and not names
    if not (own or _is_traced(value) or (isinstance(value, FunctionType) and root(value) not in LIBRARIES)):
        raise Restless(f"it uses {'.'.join((first, *names))}")
    return found


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
    if isinstance(value, type):  # a class of layers is asked for, as none is made
        return value is Tensor or (issubclass(value, nn.Module) and root(value) in TRUSTED)
    return id(value) in _overridable()
