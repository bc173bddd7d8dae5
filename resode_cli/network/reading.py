"""Read a block: is it a residual step, what follows the addition, and what is its branch?

A block's own forward is traced symbolically (torch.fx) with its children left whole. If what it returns is
a(x + g), where x is the very input and a an activation or nothing, the block is a step, and the traced code
up to g is its branch. So a new class of block needs no entry here, and none is ever written again by hand.

The traced code runs on the block itself: its children are called as they are, in train and eval mode.
"""

from __future__ import annotations

import operator
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import first_few
from .parts import BlockSplit, Branch
from .premises import premises_of, runs_its_class
from .residual import GENERIC, LINEAR, activation_name, is_called_activation, is_identity
from .seen_values import Restless
from .tracing import NotTraceable, Trace, trace

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
# Activations for which no residual formula is known: blocks that end in one are steps taken as a whole.
_OTHER_ACTIVATIONS = {"leakyrelu", "leaky_relu", "relu6", "elu", "mish", "prelu", "celu", "selu", "tanh", "hardtanh"}


@dataclass(frozen=True)
class Reading:
    """What a block's forward says.

    split: how to run the block as a step; None if it is none.
    reason: why it is none, to follow the block's name.
    near: it comes near enough to one for the reason to be of interest.
    adds: its own forward adds something, as that of a mere container of blocks does not.
    untraceable: what its forward does cannot be told.
    basis: what the traced code of its split made of the block, if it has any.
    """

    split: BlockSplit | None
    reason: str = ""
    near: bool = False
    adds: bool = False
    untraceable: bool = False
    basis: _Basis | None = field(default=None, repr=False)

    @property
    def unclear(self) -> bool:
        """Whether only a run of the block can tell."""
        return self.split is None and (self.adds or self.untraceable)


def whole(block: nn.Module, x: Tensor) -> Tensor:
    """The branch of a block of which only the whole is known: the block."""
    return block(x)


def read_split(block: nn.Module) -> BlockSplit:
    """The split of a block that is known to be a step."""
    reading = read(block)
    return reading.split or BlockSplit(whole, GENERIC, reason=reading.reason)


def read_again(block: nn.Module, split: BlockSplit, *, as_branch: bool = False) -> BlockSplit:
    """The split of a block for which the premises of its split no longer hold.

    Another reading was never compared with the block, so the block is called instead, which is right in any case,
    unless its branch is needed (`as_branch`).
    """
    again = read_split(block)
    return again if as_branch or again == split else BlockSplit(whole, GENERIC)


def read(block: nn.Module) -> Reading:
    """What the block's forward says."""
    for known in _recent:
        if known.split is not None and known.split.premises is not None and known.split.premises.hold(block):
            return known
    reading = _read(block)
    if reading.split is not None and reading.split.premises is not None:
        _recent.append(reading)
    return reading


# Blocks of one network are alike, and a reading holds of each for which all that it rests on is the same.
_recent: deque[Reading] = deque(maxlen=8)


def _read(block: nn.Module) -> Reading:
    try:
        first = trace(block, block.training)
        reading = _read_trace(first, block)
        if not first.mode_matters or reading.split is None:
            return reading
        other = _read_trace(trace(block, not block.training), block)
    except NotTraceable as error:
        return Reading(None, f"cannot be followed ({error})", untraceable=True)
    here, there = reading.split, other.split or BlockSplit(whole, GENERIC)
    if here.activation != there.activation or not isinstance(here.branch, TracedBranch):
        return Reading(BlockSplit(whole, GENERIC))
    assert isinstance(there.branch, TracedBranch) and reading.basis is not None and other.basis is not None
    branches = (here.branch, there.branch) if block.training else (there.branch, here.branch)
    return _founded(
        block,
        BlockSplit(
            here.branch if here == there else ByMode(*branches), here.activation, here.in_place and there.in_place
        ),
        reading.basis.and_of(other.basis),
    )


@dataclass(frozen=True)
class _Basis:
    """What traced code made of a block's modules and numbers; the arguments of `premises_of`."""

    called: frozenset[str]
    erased: frozenset[str]
    live: frozenset[str]

    def and_of(self, other: _Basis) -> _Basis:
        return _Basis(self.called & other.called, self.erased | other.erased, self.live & other.live)


def _founded(block: nn.Module, split: BlockSplit, basis: _Basis) -> Reading:
    """The reading with the premises of its split, or with the block as a whole where they cannot be told."""
    try:
        premises = premises_of(block, called=basis.called, erased=basis.erased, live=basis.live)
    except Restless as error:
        return Reading(BlockSplit(whole, GENERIC, reason=f"cannot be followed ({error})"))
    return Reading(replace(split, premises=premises), basis=basis)


def is_plain_sequence(module: nn.Module) -> bool:
    """Whether it is a list, or torch's own sequence."""
    return isinstance(module, nn.ModuleList) or (
        isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    )


def runs_its_children(module: nn.Module) -> bool:
    """Whether calling, or iterating over, the module means running its children one after the other."""
    if is_plain_sequence(module):
        return True
    children = dict(module.named_children())
    if not children or type(module).__module__.startswith("torch.nn."):
        return False
    try:
        traced = trace(module, module.training)
        if traced.mode_matters:
            other = trace(module, not module.training).graph.python_code("self").src
            if traced.graph.python_code("self").src != other:
                return False
    except NotTraceable:
        return False
    before, *nodes, output = traced.graph.nodes
    for node in nodes:
        if node.op != "call_module" or node.args != (before,) or node.kwargs:
            return False
        before = node
    return output.args == (before,) and [node.target for node in nodes] == list(children)


@dataclass(frozen=True)
class TracedBranch:
    """A branch as generated code.

    scope: what the code's names mean: functions, and modules by name.
    numbers: the attributes of the block that it reads as numbers.
    """

    source: str
    scope: tuple[tuple[str, Any], ...]
    numbers: tuple[str, ...] = ()
    run: Branch = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = {name: import_module(what) if isinstance(what, str) else what for name, what in self.scope}
        exec(compile(self.source, "<branch of a block>", "exec"), names)
        object.__setattr__(self, "run", names["forward"])

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        g = self.run(block, x)
        return g if g.shape == x.shape else g.expand_as(x)  # what is added may be one number per channel

    def __reduce__(self) -> tuple[Any, ...]:
        return _traced_branch, (self.source, self.scope, self.numbers)


@cache
def _traced_branch(source: str, scope: tuple[tuple[str, Any], ...], numbers: tuple[str, ...] = ()) -> TracedBranch:
    """The same object for equal code: torch.compile shares its graphs between blocks that share their branch."""
    return TracedBranch(source, scope, numbers)


@dataclass(frozen=True)
class ByMode:
    """A branch that is another in train mode than in eval mode."""

    training: TracedBranch
    evaluating: TracedBranch

    @property
    def numbers(self) -> tuple[str, ...]:
        """The attributes of the block that the code reads as numbers, in either mode."""
        return tuple(dict.fromkeys((*self.training.numbers, *self.evaluating.numbers)))

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        return (self.training if block.training else self.evaluating)(block, x)


def _read_trace(traced: Trace, block: nn.Module) -> Reading:
    """The reading of a traced forward. Uses its graph up."""
    graph, children = traced.graph, dict(block.named_modules())
    x, output = next(iter(graph.nodes)), list(graph.nodes)[-1]
    last = output.args[0]
    if not isinstance(last, fx.Node):
        return Reading(None, "returns more than one tensor")
    after: list[fx.Node] = []  # what follows the addition, the last first
    activation = LINEAR
    while (name := _activation(last, children)) is not None or _is_identity(last, children):
        if name is not None and activation != LINEAR:
            break  # two activations: neither is what follows the addition
        activation = name or activation
        after.append(last)
        last = last.args[0]
    if not _is_addition(last):
        adds = any(_is_addition(node) for node in graph.nodes)
        return Reading(None, f"ends in {_describe(last, children)}, not in an addition to its input", adds=adds)
    terms = list(_terms(last, children))
    shortcuts = [term for term in terms if term is x]
    if len(shortcuts) != 1:
        added = first_few(list(dict.fromkeys(_describe(term, children) for term in terms)))
        return Reading(None, f"is a sum of {added}, not of its input and a branch", near=True, adds=True)
    if all(term is x or not _comes_from(term, x) for term in terms):
        return Reading(None, "adds what does not depend on its input")
    branches = [term for term in last.args if isinstance(term, fx.Node) and _behind(term, children) is not x]
    read_again = any(len(node.users) > 1 for node in (last, *after))
    if activation == GENERIC or len(terms) > 2 or len(branches) != 1 or read_again:
        return Reading(BlockSplit(whole, GENERIC))
    passed = [node for term in last.args for node in _passed(term, children)]
    erased = frozenset(str(node.target) for node in (*after, *passed) if node.op == "call_module")
    if not all(runs_its_class(children[path]) for path in erased):
        return Reading(BlockSplit(whole, GENERIC))
    in_place = last.target in (operator.iadd, "add_") and last.args[0] is branches[0]
    output.args = (branches[0],)
    for node in (*after, last):
        graph.erase_node(node)
    if any(not _resolves(block, str(node.target)) for node in graph.nodes if node.op == "get_attr"):
        return Reading(BlockSplit(whole, GENERIC))  # a tensor made while tracing
    for node in graph.nodes:
        node.type = None  # annotations may be names that only the block's module knows
    code = graph.python_code("self")
    used = set(re.findall(r"\w+", code.src))
    scope = ((k, v.__name__ if isinstance(v, ModuleType) else v) for k, v in code.globals.items() if k in used)
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    numbers = tuple(name for name in traced.live if name in read)
    called = frozenset(str(node.target) for node in graph.nodes if node.op == "call_module")
    split = BlockSplit(_traced_branch(code.src, tuple(scope), numbers), activation, in_place)
    return _founded(block, split, _Basis(called, erased, frozenset(traced.live)))


def _is_identity(node: fx.Node, children: dict[str, nn.Module]) -> bool:
    if node.op != "call_module":
        return False
    child = children[str(node.target)]
    return is_identity(child) or (is_plain_sequence(child) and not list(child.children()))


def _behind(node: Any, children: dict[str, nn.Module]) -> Any:
    """The node itself, or what identities were applied to."""
    passed = _passed(node, children)
    return passed[-1].args[0] if passed else node


def _passed(node: Any, children: dict[str, nn.Module]) -> list[fx.Node]:
    """The identities that a node ends in, the last first."""
    found = []
    while isinstance(node, fx.Node) and _is_identity(node, children):
        found.append(node)
        node = node.args[0]
    return found


def _is_addition(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method")
        and node.target in _ADDITIONS
        and len(node.args) == 2
        and not node.kwargs
    )


def _terms(node: Any, children: dict[str, nn.Module]) -> Iterator[Any]:
    """What a nest of additions adds up."""
    node = _behind(node, children)
    if isinstance(node, fx.Node) and _is_addition(node):
        for term in node.args:
            yield from _terms(term, children)
    else:
        yield node


def _comes_from(node: Any, x: fx.Node) -> bool:
    """Whether a node is computed from x."""
    nodes, seen = [node], set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, fx.Node) and node not in seen:
            seen.add(node)
            nodes += node.all_input_nodes
    return x in seen


def _activation(node: fx.Node, children: dict[str, nn.Module]) -> str | None:
    """The name of the activation that a node applies to its first argument, 'generic' for one without a formula."""
    if node.op == "call_module":
        module = children[str(node.target)]
        name = activation_name(module)
        if name == GENERIC:
            other = type(module).__name__.lower() in _OTHER_ACTIVATIONS or is_called_activation(module)
            return GENERIC if other else None
        return None if name == LINEAR else name
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    name = name.rstrip("_")
    if name == "gelu":
        return "gelu_tanh" if "tanh" in (*node.args[1:], *node.kwargs.values()) else "gelu"
    if name in ("relu", "silu", "hardswish"):
        return name
    return GENERIC if name in _OTHER_ACTIVATIONS else None


def _describe(node: Any, children: dict[str, nn.Module]) -> str:
    if not isinstance(node, fx.Node):
        return str(node)
    if node.op == "call_module":
        return f"{node.target} ({type(children[str(node.target)]).__name__})"
    return "its input" if node.op == "placeholder" else node.name


def _resolves(block: nn.Module, path: str) -> bool:
    try:
        operator.attrgetter(path)(block)
    except AttributeError:
        return False
    return True
