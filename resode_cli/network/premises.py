"""What a reading of a block's forward rests on beside tensors, so that a change of it is seen.

A forward is traced once, and the traced code runs in its place. While it was traced Python had a say: by the block's
own attributes, the classes of its children, the functions that forward calls and the globals that they name. Which
of them it looked at is taken from the code of these functions. Whatever they name counts: that may be too much, and
then a block is read again for nothing, but what they look at is among it. That holds for plain code; for a function
of the user's that is not plain (plain_code.py) nothing can be told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import nn

from .plain_code import check_function, check_modules, content_of
from .seen_values import (
    ABSENT,
    COLLECTIONS,
    LIBRARIES,
    TRUSTED,
    Restless,
    as_seen,
    is_as_seen,
    root,
)

_modules_of_torch = nn.modules.module
_OWN = frozenset(nn.Module().__dict__)  # what torch itself keeps in a module


class _Place(NamedTuple):
    """Where a module of the block is: under its name in the module at place `outer`. The block itself is at place 0.

    first: the place where the same module is under its first name.
    """

    outer: int
    name: str
    kind: type
    first: int


class _Part(NamedTuple):
    """What counts of the module at a place, beside its class.

    names: the names of the children and tensors that it holds.
    values: attributes, as `as_seen` sees them; of a number that the code reads itself the type alone.
    erased: whether the traced code leaves the module out: it follows the addition, or is an identity.
    size: how many attributes the block itself has.
    """

    place: int
    names: list[str]
    values: tuple[tuple[str, Any], ...]
    erased: bool
    size: int | None


@dataclass(frozen=True, eq=False)
class Premises:
    """What was found when a block was read. It may hold of another block too, a copy for instance.

    names: what the functions that were looked at name, which decides what counts of an object.
    outside: entries of dictionaries, those of classes and of the modules in which functions stand.
    cells: closures' cells. functions: those that were looked at, with their code and defaults, which may be edited.
    """

    places: tuple[_Place, ...]
    parts: tuple[_Part, ...]
    names: frozenset[str]
    outside: tuple[tuple[Mapping[str, Any], str, Any], ...]
    cells: tuple[tuple[CellType, Any], ...]
    functions: tuple[tuple[FunctionType, tuple[Any, ...]], ...]

    def hold(self, block: nn.Module) -> bool:
        """Whether all that the reading rests on is as it was."""
        modules: list[nn.Module] = []
        try:
            for outer, name, kind, first in self.places:
                module = modules[outer]._modules[name] if modules else block
                if module is None or type(module) is not kind:
                    return False
                modules.append(module)
                if modules[first] is not module:
                    return False
            for place, held, values, erased, size in self.parts:
                own = modules[place].__dict__
                if (size is not None and len(own) != size) or held != _held(own):
                    return False
                if erased and not runs_its_class(modules[place]):
                    return False
                for name, seen in values:
                    value = own.get(name, ABSENT)
                    if value is not seen and not is_as_seen(value, seen, self.names):
                        return False
        except KeyError:
            return False
        for table, name, seen in self.outside:
            if not is_as_seen(table.get(name, ABSENT), seen, self.names):
                return False
        if any(_content(function) != seen for function, seen in self.functions):
            return False
        return all(is_as_seen(content_of(cell), seen, self.names) for cell, seen in self.cells)

    def __deepcopy__(self, memo: dict[int, Any]) -> Premises:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _unknown, ()


def _unknown() -> Premises:
    """Of a rule from another process: its block is read anew before it is used."""
    return Premises((_Place(0, "", type(None), 0),), (), frozenset(), (), (), ())


def _has_own_hooks(module: nn.Module) -> bool:
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def runs_its_class(module: nn.Module) -> bool:
    """Whether calling the module means the forward of its class: no hook of its own, no forward of its own."""
    return not _has_own_hooks(module) and "forward" not in module.__dict__


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward: by its own hooks, or those of all modules."""
    return bool(
        _has_own_hooks(module)
        or _modules_of_torch._global_forward_hooks
        or _modules_of_torch._global_forward_pre_hooks
        or _modules_of_torch._global_backward_hooks
        or _modules_of_torch._global_backward_pre_hooks
    )


def premises_of(
    block: nn.Module, *, called: Iterable[str] = (), erased: Iterable[str] = (), live: Iterable[str] = ()
) -> Premises:
    """What a reading of the block's forward rests on. Raises Restless where that cannot be told from its values.

    called: paths of the modules that the traced code calls as they are, so that what is in them does not count.
    erased: paths of the modules that it leaves out. live: the block's own numbers that it reads when it runs.
    """
    called, erased, live = set(called), set(erased), set(live)
    closed, paths, places, aliases = called - erased, dict[str, nn.Module](), list[_Place](), set[str]()
    for path, module in block.named_modules(remove_duplicate=False):
        outer, _, name = path.rpartition(".")
        if path and (outer not in paths or outer in closed | aliases):
            continue
        first = next((known for known, other in paths.items() if other is module), path)
        aliases |= {path} - {first}
        paths[path] = module
        order = list(paths)
        places.append(_Place(order.index(outer), name, type(module), order.index(first)))
    if any(_holds_twice(module) for path, module in paths.items() if path not in closed):
        raise Restless("it holds a tensor under two names")  # of which a trace knows one
    counting = {path: module for path, module in paths.items() if path not in aliases}
    check_modules(counting.values())
    try:
        search = _Search(block, [m for path, m in counting.items() if path not in called], counting.values())
        parts = [
            _Part(
                list(paths).index(path),
                _held(module.__dict__),
                tuple(_values(module, search.names, live if not path else set(), is_block=not path)),
                path in erased,
                None if path else len(module.__dict__),
            )
            for path, module in counting.items()
        ]
        tables = [*search.outside.values(), *((kind.__dict__, "forward") for kind in _forwards(block, erased))]
        outside = tuple((table, name, as_seen(table.get(name, ABSENT), search.names)) for table, name in tables)
        cells = tuple((cell, as_seen(content_of(cell), search.names)) for cell in search.cells)
    except RecursionError as error:
        raise Restless("what it looks at holds itself") from error
    return Premises(tuple(places), tuple(parts), frozenset(search.names), outside, cells, tuple(search.functions))


def _values(module: nn.Module, names: set[str], live: set[str], *, is_block: bool) -> Iterator[tuple[str, Any]]:
    own = module.__dict__
    for name in own.keys() - _OWN:
        if name in live:
            yield name, float
        elif name in names or name == "approximate":  # which GELU it is
            yield name, as_seen(own[name], names)
        elif is_block:  # named nowhere, but its name may have been put together
            with suppress(Restless):
                yield name, as_seen(own[name], names)
    for base in type(module).__mro__:
        if root(base) not in LIBRARIES:  # what an attribute of the module's own would stand before
            yield from ((name, ABSENT) for name in names & base.__dict__.keys() - own.keys())


def _forwards(block: nn.Module, erased: Iterable[str]) -> set[type]:
    """The classes that the erased modules have their forward from."""
    kinds = (kind for path in erased for kind in type(block.get_submodule(path)).__mro__)
    return {kind for kind in kinds if "forward" in kind.__dict__}


def _held(own: Mapping[str, Any]) -> list[str]:
    """The names of a module's children and tensors."""
    tables = own["_modules"], own["_parameters"], own["_buffers"]
    return [name for table in tables for name, value in table.items() if value is not None]


def _holds_twice(module: nn.Module) -> bool:
    tensors = [id(t) for table in (module._parameters, module._buffers) for t in table.values() if t is not None]
    return len(set(tensors)) < len(tensors)


def _content(function: FunctionType) -> tuple[Any, ...]:
    """What may be edited in a function, as tools do that load edited code into a running notebook."""
    return function.__code__, function.__defaults__, tuple((function.__kwdefaults__ or {}).items())


class _Search:
    """The functions that a block's forward may call, what they name, and what these names stand for.

    names: identifiers in their code. outside: entries of dictionaries that they read. cells: their closures' cells.
    """

    def __init__(self, block: nn.Module, modules: list[nn.Module], in_reach: Iterable[nn.Module]) -> None:
        """modules: those of the block whose methods its forward may call, the block among them.

        in_reach: those of which it may look at an attribute.
        """
        self._in_reach = tuple(in_reach)
        self.names: set[str] = {"forward", "__call__"}
        self.outside: dict[tuple[int, str], tuple[Mapping[str, Any], str]] = {}
        self.cells: list[CellType] = []
        self.functions: list[tuple[FunctionType, tuple[Any, ...]]] = []
        self._functions: set[int] = set()
        self._note_methods(type(block), {"forward", "__call__"})
        looked_at = -1
        while looked_at != (now := len(self.names)):
            looked_at = now
            for module in modules:
                self._note_methods(type(module), self.names)
                for name in self.names & module.__dict__.keys() - _OWN:
                    self._meet(module.__dict__[name])

    def _note_methods(self, kind: type, names: set[str]) -> None:
        """Note what classes say to the names, those too that say nothing yet and come before others that do."""
        found: set[str] = set()
        for base in reversed(kind.__mro__):
            found |= {name for name in names & base.__dict__.keys() if name == "__call__" or not name.startswith("__")}
            if base is not nn.Module and root(base) not in LIBRARIES:
                for name in found:
                    self._note(base.__dict__, name, base)

    def _note(self, table: Mapping[str, Any], name: str, owner: object) -> None:
        key = (id(owner), name)
        if key not in self.outside:
            self.outside[key] = (table, name)
            self._meet(table.get(name))

    def _meet(self, value: Any) -> None:
        """Look at a value that a function may use."""
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, property):
            for accessor in (value.fget, value.fset):
                self._meet(accessor)
        elif isinstance(value, partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._meet(part)
        elif isinstance(value, FunctionType):
            self._read(value)
        elif type(value) in COLLECTIONS:
            for element in value:
                self._meet(element)

    def _read(self, function: FunctionType) -> None:
        if id(function) in self._functions or root(function) in LIBRARIES:
            return
        self._functions.add(id(function))
        self.functions.append((function, _content(function)))
        if root(function) not in TRUSTED:
            for module, name in check_function(function, self._in_reach):
                self._note(vars(module), name, vars(module))
        self._meet(getattr(function, "__wrapped__", None))
        for cell in function.__closure__ or ():
            content = content_of(cell)
            if not isinstance(content, (nn.Module, type)) and content is not ABSENT:
                self.cells.append(cell)
                self._meet(content)
        named = _names_in(function.__code__)
        self.names |= named
        for name in named & function.__globals__.keys():
            if not isinstance(function.__globals__[name], (ModuleType, type)):
                self._note(function.__globals__, name, function.__globals__)


@lru_cache(maxsize=4096)
def _names_in(code: CodeType) -> frozenset[str]:
    """The names in a function's code, those in strings and in functions inside it among them."""
    words = {c for c in code.co_consts if isinstance(c, str) and c.isidentifier()}
    inner = [_names_in(c) for c in code.co_consts if isinstance(c, CodeType)]
    return frozenset(code.co_names).union(words, *inner)
