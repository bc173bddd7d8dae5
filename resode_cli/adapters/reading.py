"""Read a block: is it a residual step, what follows the addition, and what is its branch?

A block's own forward is traced symbolically (torch.fx) with its children left whole. If what it returns is
a(x + g), where x is the very input and a an activation or nothing, the block is a step, and the traced code
up to g is its branch. So a new class of block needs no entry here, and none is ever written again by hand.

The traced code runs on the block itself: its children are called as they are, in train and eval mode.
"""

from __future__ import annotations

import copy
import inspect
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import first_few
from ..parts import BlockRule, Branch
from ..residual import GENERIC, LINEAR, activation_name

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
# Activations for which no residual formula is known: blocks that end in one are steps taken as a whole.
_OTHER_ACTIVATIONS = {"leakyrelu", "leaky_relu", "relu6", "elu", "mish", "prelu", "celu", "selu", "tanh", "hardtanh"}


@dataclass(frozen=True)
class Reading:
    """What a block's forward says.

    rule: how to run the block as a step; None if it is none.
    reason: why it is none, to follow the block's name.
    near: it comes near enough to one for the reason to be of interest.
    adds: its own forward adds something, as that of a mere container of blocks does not.
    untraceable: what its forward does cannot be told.
    """

    rule: BlockRule | None
    reason: str = ""
    near: bool = False
    adds: bool = False
    untraceable: bool = False

    @property
    def unclear(self) -> bool:
        """Whether only a run of the block can tell."""
        return self.rule is None and (self.adds or self.untraceable)


class _NotTraceable(Exception):
    pass


def whole(block: nn.Module, x: Tensor) -> Tensor:
    """The branch of a block of which only the whole is known: the block."""
    return block(x)


def read_rule(block: nn.Module) -> BlockRule:
    """The rule of a block that is known to be a step."""
    return read(block).rule or BlockRule(whole, GENERIC)


def read(block: nn.Module) -> Reading:
    """What the block's forward says."""
    try:
        graph, mode_matters = _trace(block, block.training)
        reading = _read_graph(graph, block)
        if not mode_matters or reading.rule is None:
            return reading
        other = _read_graph(_trace(block, not block.training)[0], block)
    except _NotTraceable as error:
        return Reading(None, f"cannot be traced ({error})", untraceable=True)
    here, there = reading.rule, other.rule or BlockRule(whole, GENERIC)
    if here == there:
        return reading
    if here.activation != there.activation or not isinstance(here.branch, TracedBranch):
        return Reading(BlockRule(whole, GENERIC))
    assert isinstance(there.branch, TracedBranch)
    first, second = (here.branch, there.branch) if block.training else (there.branch, here.branch)
    return Reading(BlockRule(ByMode(first, second), here.activation))


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
        graph, _ = _trace(module, module.training)
    except _NotTraceable:
        return False
    before, *nodes, output = graph.nodes
    for node in nodes:
        if node.op != "call_module" or node.args != (before,) or node.kwargs:
            return False
        before = node
    return output.args == (before,) and [node.target for node in nodes] == list(children)


@dataclass(frozen=True)
class TracedBranch:
    """A branch as generated code.

    scope: what the code's names mean: functions, and modules by name.
    """

    source: str
    scope: tuple[tuple[str, Any], ...]
    run: Branch = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = {name: import_module(what) if isinstance(what, str) else what for name, what in self.scope}
        exec(compile(self.source, "<branch of a block>", "exec"), names)
        object.__setattr__(self, "run", names["forward"])

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        g = self.run(block, x)
        return g if g.shape == x.shape else g.expand_as(x)  # what is added may be one number per channel

    def __reduce__(self) -> tuple[Any, ...]:
        return _traced_branch, (self.source, self.scope)


@cache
def _traced_branch(source: str, scope: tuple[tuple[str, Any], ...]) -> TracedBranch:
    """The same object for equal code: torch.compile shares its graphs between blocks that share their branch."""
    return TracedBranch(source, scope)


@dataclass(frozen=True)
class ByMode:
    """A branch that is another in train mode than in eval mode."""

    training: TracedBranch
    evaluating: TracedBranch

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        return (self.training if block.training else self.evaluating)(block, x)


class _BlockTracer(fx.Tracer):
    proxy_buffer_attributes = True  # what is done to the block's own buffers is part of the code, and not done now

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace(block: nn.Module, training: bool) -> tuple[fx.Graph, bool]:
    """The graph of a block's own forward of one tensor, and whether it looked at its mode."""
    arguments = inspect.signature(block.forward).parameters.values()
    others = list(arguments)[1:]
    if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in others):
        raise _NotTraceable("its forward takes more than the state")
    asked: list[bool] = []

    def mode(_: nn.Module) -> bool:
        asked.append(True)
        return training

    def assign(module: nn.Module, name: str, value: object) -> None:
        if not name.startswith("_tensor_constant"):
            raise _NotTraceable(f"it sets its attribute {name}")  # which the traced code would leave out
        module.__dict__[name] = value

    # A shallow copy takes the constants that tracing finds; its class answers for the mode.
    probe = copy.copy(block)
    probe.__class__ = type(type(block).__name__, (type(block),), {"training": property(mode), "__setattr__": assign})
    defaults = {p.name: p.default for p in others if p.default is not p.empty}
    try:
        graph = _BlockTracer().trace(probe, concrete_args=defaults or None)
    except Exception as error:  # whatever a forward does with a symbol instead of a tensor
        reason = str(error).strip().splitlines()
        raise _NotTraceable(reason[0] if reason else type(error).__name__) from error
    _drop_defaults(graph)
    return graph, bool(asked)


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


def _read_graph(graph: fx.Graph, block: nn.Module) -> Reading:
    """The reading of a traced forward. Uses the graph up."""
    children = dict(block.named_modules())
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
        return Reading(BlockRule(whole, GENERIC))
    output.args = (branches[0],)
    for node in (*after, last):
        graph.erase_node(node)
    if any(not _resolves(block, str(node.target)) for node in graph.nodes if node.op == "get_attr"):
        return Reading(BlockRule(whole, GENERIC))  # a tensor made while tracing
    for node in graph.nodes:
        node.type = None  # annotations may be names that only the block's module knows
    code = graph.python_code("self")
    used = set(re.findall(r"\w+", code.src))
    scope = ((k, v.__name__ if isinstance(v, ModuleType) else v) for k, v in code.globals.items() if k in used)
    return Reading(BlockRule(_traced_branch(code.src, tuple(scope)), activation))


def _is_identity(node: fx.Node, children: dict[str, nn.Module]) -> bool:
    if node.op != "call_module":
        return False
    child = children[str(node.target)]
    return isinstance(child, nn.Identity) or (is_plain_sequence(child) and not list(child.children()))


def _behind(node: Any, children: dict[str, nn.Module]) -> Any:
    """The node itself, or what identities were applied to."""
    while isinstance(node, fx.Node) and _is_identity(node, children):
        node = node.args[0]
    return node


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
            return GENERIC if type(module).__name__.lower() in _OTHER_ACTIVATIONS else None
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
