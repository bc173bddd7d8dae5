"""What a network does before its first stage, as a part that the backward pass can evaluate again.

The network's own code runs it, up to the first stage's entry, without keeping its activations. In the backward pass
the same code runs once more, and is left by an exception at that entry. Nothing needs to be known about its class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from ..errors import ResodeError
from ..ode import MAPPING, Adjoint, Begun, Field, Monitor, Residual, solve, version
from ..ode.generators import HostWatch, RandomState, generators_in
from ..ode.reentry import buffer_versions

STEM = "stem"


@dataclass
class Stem:
    """How the part before the first stage is run.

    adjoint: 'backprop' keeps its activations, 'checkpoint' evaluates it again.
    monitor: what its last passes did.
    kept: by the modes of the network's modules, why its activations are kept although the adjoint says otherwise; empty
        where they are not. The first run in these modes finds it out.
    apart: the modes in which it was seen to keep images apart.
    """

    adjoint: Adjoint = field(default_factory=Adjoint)
    monitor: Monitor = field(default_factory=Monitor)
    kept: dict[tuple[bool, ...], str] = field(default_factory=dict)
    apart: tuple[bool, ...] = ()


class CannotCut(BaseException):
    """Leaves the first run of a network, which cannot be cut at its first stage's entry."""


class Reached(BaseException):
    """Leaves a network's forward at its first stage, with the state that the stage was given."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state


class OutsideModules(nn.Module):
    """The modules of a network outside its stages, and the parameters that a run of some of them depends on."""

    def __init__(self, outside: list[nn.Module]) -> None:
        super().__init__()
        self.outside = tuple(outside)
        self.used: tuple[nn.Parameter, ...] = ()

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:  # noqa: ARG002
        return iter(self.outside)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:  # noqa: ARG002
        return iter(self.used)


class _StemResidual(Residual):
    """The first stage's input as a function of the images."""

    def __init__(self, run: Callable[[Tensor], Tensor], module: nn.Module) -> None:
        self.run, self.module = run, module

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x)


class Opening:
    """One run of a network from its images to its first stage's entry, nothing of which is kept.

    again: runs it once more. first: whether it is not yet known that it can be. begin, end: numbers of the nodes of
        autograd's graph that are made meanwhile.
    """

    def __init__(
        self,
        stem: Stem,
        images: Tensor,
        outside: list[nn.Module],
        again: Callable[[Tensor], Tensor],
        *,
        first: bool,
    ) -> None:
        self.stem, self.images, self.again, self.first = stem, images, again, first
        self.module = OutsideModules(outside)
        self.leaf = (images.detach().clone() if first else images.detach()).requires_grad_(images.requires_grad)
        self.written = version(self.leaf)
        self.versions = buffer_versions([self.module])
        self.host = HostWatch()
        self.random = RandomState.now(images.device, generators_in(outside))
        self.begin = self.end = _next_node()
        self.hooks = saved_tensors_hooks(lambda _: None, _refuse)
        self.hooks.__enter__()
        self.is_open, self.closed = True, False

    def abandon(self) -> None:
        """Keep from now on what is computed."""
        if self.is_open:
            self.is_open = False
            self.hooks.__exit__()

    def close(self, state: Tensor) -> Tensor:
        """The state, as the result of a part whose backward pass evaluates it again."""
        if _top_hooks() not in (None, self.hooks.pack_hook):
            self._give_up("its first stage is called inside hooks on saved tensors, such as those of a checkpoint")
        self.abandon()
        self.closed, self.end = True, _next_node()
        if version(self.leaf) != self.written:
            self._give_up("it writes to its images")
        if not state.requires_grad:
            return state
        self.module.used = self._walk(state)
        draws, host = None, self.host.drawn()
        held = [generator for generator, _ in self.random.held]
        if host is not None or not self.random.equals(RandomState.now(state.device, held)):
            draws = dataclasses.replace(self.random, host=host)
        part = Field((_StemResidual(self.again, self.module),), (0,), 1.0, ("before the first stage",))
        begun = Begun([state.detach()], draws, self.versions)
        plan = self.stem.adjoint.plan(1, MAPPING.name)
        return solve(part, MAPPING, plan, self.images, monitor=self.stem.monitor, begun=begun)

    def why_not(self, result: Any) -> str:
        """Why this run was none to be cut; empty if it was. result: the network's."""
        if not self.closed:
            return "no stage is called with a tensor"
        beyond = _leads_into(result, self.begin, self.end)
        return "what it computes is used beyond the first stage's entry too" if beyond else ""

    def _give_up(self, why: str) -> NoReturn:
        if self.first:
            raise CannotCut(why)
        raise ResodeError(f"what comes before the first stage cannot be evaluated again: {why}; {_REMEDY}")

    def _walk(self, state: Tensor) -> tuple[nn.Parameter, ...]:
        """The parameters that the state depends on."""
        found: dict[int, nn.Parameter] = {}
        seen: set[Any] = set()
        waiting: list[Any] = [state.grad_fn]
        while waiting:
            node = waiting.pop()
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                if leaf is not self.leaf:
                    found[id(leaf)] = leaf
                continue
            if node not in seen:
                seen.add(node)
                waiting += [following for following, _ in node.next_functions if following is not None]
        return tuple(found.values())


_REMEDY = "keep its activations (model.use_adjoint({'stem': Adjoint('backprop')}))"


def _refuse(_: Any) -> NoReturn:
    raise ResodeError(
        "what the network computes before its first stage is used beyond that stage's entry, where its gradient would"
        f" be lost; {_REMEDY}"
    )


def _top_hooks() -> Any:
    """The innermost hook that packs saved tensors; None where torch does not tell."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    found = top(False) if top is not None else None
    return None if found is None else found[0]


def _next_node() -> int:
    """The number that autograd gives to the next node of a graph, in this thread."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True).mul(1).grad_fn
    return int(node._sequence_nr())  # type: ignore[union-attr]


def _leads_into(result: Any, begin: int, end: int) -> bool:
    """Whether the graph of a result reaches a node that was made from the one number to the other."""
    seen: set[Any] = set()
    waiting: list[Any] = [leaf.grad_fn for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or hasattr(node, "variable"):
            continue
        if begin <= node._sequence_nr() < end:
            return True
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return False


def outside_modules(net: nn.Module, stages: set[nn.Module]) -> list[nn.Module]:
    """The modules of a network but the stages and what is in them."""
    found: list[nn.Module] = []
    seen: set[nn.Module] = set(stages)

    def visit(module: nn.Module) -> None:
        if module not in seen:
            seen.add(module)
            found.append(module)
            for child in module.children():
                visit(child)

    visit(net)
    return found
