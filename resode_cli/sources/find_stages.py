"""Find the stages of a network: chains of residual steps, on the live model.

The network runs once, watched. Block by block, from the outside in, a module that makes a state of a state is
read (reading.py): whether it adds a branch to its own input is decided from its own forward. Children of one
module that hand a state on from one to the next are a chain. A chain is cut where a state in it is read by
something else too, since that state must stay in reach. A block that runs several times in a row, each time on its own
last result, is that many steps of one chain: in a loop that calls it again, or as several children of one module.

Where the forward does not tell, the block is put to a test: with all its parameters set to zero, a block that
adds a branch to its own input returns that input, or its activation.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ResodeError, first_few
from ..network.block_inputs import WithArguments, equal, tensors_in
from ..network.parts import BlockSplit, StageParts
from ..network.premises import has_hooks
from ..network.reading import Reading, is_plain_sequence, read, runs_its_children, whole
from ..network.repeat import as_before, repeatable
from ..network.residual import ACTIVATIONS, GENERIC, BlockResidual
from .watch import Watch, watch

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_AFTER_ADDITION: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda z: z,
    *ACTIVATIONS.values(),
    F.leaky_relu,
    F.relu6,
    F.elu,
    F.mish,
    F.tanh,
)


@dataclass(frozen=True)
class Found:
    """What is in a network.

    stages: the stages in their order.
    left_out: blocks that look like residual steps and are none, one of each kind, and why.
    """

    stages: list[StageParts]
    left_out: list[str]


def find_stages(net: nn.Module, example: Tensor) -> Found:
    """The stages of `net`. Raises ResodeError, naming the reason, if there is no step.

    example: a batch of images that the network runs on.
    """
    with _told_apart(net) as copies:
        search = _Search(net, example, copies)
        stages = search.stages()
        left_out = search.left_out(stages)
    if not any(stage.blocks for stage in stages):
        reasons = "; ".join(left_out[:2]) or "no module in it adds a branch to its input"
        raise ResodeError(f"{type(net).__name__} has no residual steps to convert: {reasons}")
    return Found(stages, left_out)


@contextmanager
def _told_apart(net: nn.Module) -> Iterator[dict[nn.Module, tuple[str, nn.Module]]]:
    """While a module has one child under several names, let all but the first be copies that hold the same tensors.

    Yields each copy's original, with its first name.
    """
    copies: dict[nn.Module, tuple[str, nn.Module]] = {}
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(net.modules()):
        first: dict[nn.Module, str] = {}
        for name, child in parent._modules.items():
            if child is None or first.setdefault(child, name) == name or not any(True for _ in child.parameters()):
                continue
            alike = copy.copy(child)
            alike.__dict__.update({n: copy.copy(h) for n, h in vars(child).items() if "_hook" in n})  # to be watched
            copies[alike] = first[child], child
            replaced.append((parent, name, child))
            parent._modules[name] = alike
    try:
        yield copies
    finally:
        for parent, name, child in replaced:
            parent._modules[name] = child


class _Search:
    """What is known of a network's modules: which are steps, and why others are not.

    copies: modules that stand for another child of the same parent, which they name and hold.
    """

    def __init__(self, net: nn.Module, example: Tensor, copies: Mapping[nn.Module, tuple[str, nn.Module]]) -> None:
        self.net, self.example, self.copies = net, example, copies
        self.seen = watch(net, example)
        self.paths = {module: path for path, module in net.named_modules()}
        self.places: dict[nn.Module, list[str]] = {}  # the names that a module has, one in each parent
        for path, parent in net.named_modules():
            for name, child in parent.named_children():
                self.places.setdefault(child, []).append(f"{path}.{name}".lstrip("."))
        self.refused: dict[str, Reading] = {}  # by path, as `reused`
        self.reused: dict[str, Reading] = {}
        self.unlinked: dict[tuple[str, ...], list[tuple[str, str]]] = {}  # by names of what two blocks take otherwise
        self.steps: set[nn.Module] = set()
        self._visit(net)
        self.classes = {type(step) for step in self.steps}
        # An attention that adds to its input, inside a transition block of the steps' own class.
        self.steps -= {part for m in net.modules() if type(m) in self.classes for part in m.modules() if part is not m}

    def _visit(self, module: nn.Module) -> bool:
        """Find the steps inside a module; returns whether there are any."""
        found = False
        for child in module.children():
            reading = self._read(child)
            inside = reading.split is None and self._visit(child)
            is_container = inside and (reading.untraceable or self._holds_a_chain(child))
            if reading.unclear and not is_container and self._passes_zero_test(child):
                reading = Reading(BlockSplit(whole, GENERIC))
            if reading.split is not None:
                reading = self._verified(child, reading)
            if reading.split is not None:
                reading = self._in_one_place(child, reading)
            if reading.split is not None:
                self.steps.difference_update(child.modules())
                self.steps.add(child)
            elif reading.reason:
                self.refused[self.paths[child]] = reading
            found = found or inside or reading.split is not None
        return found

    def _holds_a_chain(self, module: nn.Module) -> bool:
        """Whether the steps inside a module are a stage, rather than parts of one block."""
        sequences = (part.children() for part in module.modules() if is_plain_sequence(part))
        return any(sum(child in self.steps for child in sequence) > 1 for sequence in sequences)

    def _read(self, module: nn.Module) -> Reading:
        call = self.seen.of(module)
        is_layer = type(module).__module__.startswith("torch.nn.") or not any(True for _ in module.parameters())
        if is_layer or is_plain_sequence(module) or not call.keeps_shape:
            return Reading(None)
        if not call.further:
            return read(module)
        if not self._takes_constants(module):
            names = ", ".join(call.further)
            return Reading(None, f"takes more than the state ({names}), learned or another for each image", near=True)
        return Reading(None, untraceable=True)  # for want of a way to trace it with them

    def _in_one_place(self, module: nn.Module, reading: Reading) -> Reading:
        """The reading of a step, unless it is called several times in another way than step after step.

        A block that two modules hold is none: a stage takes the place of one, and the other would go on without it.
        """
        _, original = self.copies.get(module, ("", module))
        if len(places := self.places[original]) > 1:
            reason = f"is held in several places ({first_few(places)}), of which a stage could take but one"
            return Reading(None, reason, near=True)
        call = self.seen.of(module)
        if len(call.runs) == 1:
            return reading
        times = f"is called {len(call.runs)} times"
        if not call.in_a_row:
            named = any(original is other for _, other in self.copies.values())
            how = "under each of its names in turn" if named else "not each time on its own last result"
            return Reading(None, f"{times}, and {how}", near=True)
        if not call.alike:
            names = list(dict.fromkeys(name for run in call.runs for name in run.further))
            return Reading(None, f"{times}, with another {first_few(names)} each time", near=True)
        if (reader := self.seen.read_elsewhere(module, module)) is not None:
            return Reading(None, f"{times}, and {type(reader).__name__} reads states in between", near=True)
        return reading

    def _takes_constants(self, module: nn.Module) -> bool:
        """Whether what a module takes beside the state is the same for other images, and is not learned."""
        named = {p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in _BY_NAME}
        further, again = self.seen.of(module).further, self._other_images.of(module).further
        return named >= set(further) and equal(further, again) and not any(t.requires_grad for t in tensors_in(again))

    @cached_property
    def _other_images(self) -> Watch:
        images = self.example.flip(-1)
        if images.is_floating_point():
            images = images.mul(0.5).requires_grad_()
        return watch(self.net, images, recorded=True)

    def _random_state(self, block: nn.Module) -> Tensor:
        state = self.seen.of(block).into
        assert state is not None
        return torch.randn(state.shape, generator=torch.Generator().manual_seed(0)).to(state)

    def _verified(self, block: nn.Module, reading: Reading) -> Reading:
        """The reading, if its split gives what the block gives and leaves the state alone."""
        x, split, further = self._random_state(block), reading.split, self.seen.of(block).further
        assert split is not None
        if x.is_meta:  # no values to compare: the structure alone is asked for
            return reading
        if has_hooks(block):  # only the block itself calls them
            split = BlockSplit(whole, GENERIC)
        branch = WithArguments(further) if further else split.branch
        residual = BlockResidual(block, branch, split.activation, in_place=split.in_place)
        kept = x.clone()
        with as_before(block), torch.no_grad():
            for training in (False, True):
                block.train(training)
                try:
                    expected = repeatable(lambda: block(kept.clone(), **further))
                except Exception:  # such as a norm that wants more values than one image has
                    if training:
                        break
                    raise
                found = repeatable(lambda: residual.step(x, 1.0))
                if not torch.equal(x, kept):
                    return Reading(None, "writes to its input", near=True)
                if split.branch is whole and not further:  # the block itself, which may count, or draw from its own
                    continue
                if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
                    mode = " in train mode" if training else ""
                    return Reading(None, f"does more{mode} than its own forward says", near=True)
        return reading

    def _passes_zero_test(self, block: nn.Module) -> bool:
        if not self.seen.of(block).keeps_shape:
            return False
        zeros = {name: torch.zeros_like(p) for name, p in block.named_parameters()}
        # A norm without parameters is no identity.
        zeros |= {n: torch.full_like(b, 2.0) for n, b in block.named_buffers() if n.endswith("running_var")}
        x = self._random_state(block)
        with as_before(block), torch.no_grad():
            try:
                probe = copy.deepcopy(block)  # what it keeps in lists is not put back
            except Exception:  # such as for a tensor with a history
                probe = block
            try:
                probe.eval()  # its own `train` may return nothing
                result = torch.func.functional_call(probe, zeros, x.clone(), self.seen.of(block).further)
            except (RuntimeError, ValueError, AssertionError, ArithmeticError):  # it cannot do with zeros
                if x.is_meta:
                    raise
                return False
        return any(torch.allclose(result, a(x), rtol=1e-5, atol=1e-6) for a in _AFTER_ADDITION)

    def stages(self) -> list[StageParts]:
        """In the order in which they run."""
        order = {module: i for i, module in enumerate(self.seen.calls)}
        found = [
            (order[parent.get_submodule((*part.blocks, *part.transition)[0])], part)
            for path, parent in self.net.named_modules()
            for part in self._stages_of(path, parent)
        ]
        return [part for _, part in sorted(found, key=lambda item: item[0])]

    def _stages_of(self, path: str, parent: nn.Module) -> Iterator[StageParts]:
        """The stages among a module's children. What follows the last step stays where it is."""
        children = {name: child for name, child in parent.named_children() if child in self.seen.calls}
        if not any(child in self.steps for child in children.values()):
            # Blocks of a class whose others are steps: a stage too, without any.
            if children and {type(child) for child in children.values()} <= self.classes and runs_its_children(parent):
                yield StageParts(path, tuple(children), ())
            return
        # A custom forward, as that of a whole network, may do what is not seen here; it keeps its own transitions
        # unless all that it does is run blocks, to the last of them.
        ends_in_steps = list(children.values())[-1] in self.steps
        in_order = is_plain_sequence(parent) or (ends_in_steps and runs_its_children(parent))
        chains = self._chains(children)
        if self._refuse_in_several(chains, children):
            chains = self._chains(children)
        for chain in chains:
            if len(chain.blocks) == 1 and chain.reader is not None:
                reason = f"is in a chain whose states are read by {type(chain.reader).__name__} too"
                block = f"{path}.{chain.blocks[0]}".lstrip(".")
                self.reused[block] = Reading(None, reason, near=True)
            elif chain.blocks:
                further = tuple(self.seen.of(children[chain.blocks[0]]).further)
                transition = tuple(chain.transition) if in_order and not further else ()
                same = {name: self.copies[children[name]][0] for name in chain.blocks if children[name] in self.copies}
                yield StageParts(path, transition, tuple(chain.blocks), further, same)

    def _refuse_in_several(self, chains: list[_Chain], children: dict[str, nn.Module]) -> bool:
        """Take blocks that run in several chains for no steps; whether there are any."""
        first = {name: self.copies[child][0] if child in self.copies else name for name, child in children.items()}
        places = Counter(block for chain in chains for block in {first[name] for name in chain.blocks})
        again = [name for name in children if places[first[name]] > 1]
        for name in again:
            self.steps.discard(children[name])
            reason = "runs in several places, which are not one chain"
            self.refused[self.paths[children[name]]] = Reading(None, reason, near=True)
        return bool(again)

    def _chains(self, children: dict[str, nn.Module]) -> list[_Chain]:
        """Children that hand a state on, each to the next alone: any that are no steps, then steps."""
        calls = list(self.seen.calls)
        makers: dict[int, str] = {}  # which child made a tensor
        ending: dict[str, _Chain] = {}
        chains: list[_Chain] = []
        for name, child in sorted(children.items(), key=lambda item: calls.index(item[1])):
            call, is_step = self.seen.of(child), child in self.steps
            maker = makers.get(id(call.into), "")
            chain, cut = ending.get(maker), None
            if chain is not None and (reader := self.seen.read_elsewhere(children[maker], child)) is not None:
                if is_step and type(children[maker]) is type(child):
                    chain.reader = cut = reader
                chain = None
            goes_on = is_step and bool(maker) and self._is_one_run(children[maker], child)
            if chain is None or (chain.blocks and not goes_on):
                chain = _Chain(reader=cut)
                chains.append(chain)
            if not is_step and not self.steps.isdisjoint(child.modules()):
                continue
            if is_step:
                chain.blocks += [name] * len(call.runs)
            else:
                chain.transition.append(name)
            ending[name] = chain
            if call.out is not None:
                makers[id(call.out)] = name
        return chains

    def _is_one_run(self, first: nn.Module, second: nn.Module) -> bool:
        """Whether a step that gets what a child gave may be of the same stage as that child."""
        before, after = self.seen.of(first), self.seen.of(second)
        if len(before.runs) > 1 or len(after.runs) > 1:  # a loop over one block is a stage by itself
            return False
        if equal(before.further, after.further):
            return True
        if first in self.steps:
            names = tuple(before.further | after.further)
            self.unlinked.setdefault(names, []).append((self.paths[first], self.paths[second]))
        return False

    def left_out(self, stages: list[StageParts]) -> list[str]:
        """The outermost of the blocks that come near to a step, by class and reason, and links that are none."""
        used = {
            self.net.get_submodule(stage.container).get_submodule(name)
            for stage in stages
            for name in (*stage.transition, *stage.blocks)
        }
        within = {part for module in used for part in module.modules()}
        kinds: dict[tuple[type, str], list[str]] = {}
        for path, reading in sorted({**self.reused, **self.refused}.items(), key=lambda item: item[0].count(".")):
            module = self.net.get_submodule(path)
            if reading.near and module not in within:
                within.update(module.modules())
                kinds.setdefault((type(module), reading.reason), []).append(path)
        blocks = [f"{paths[0]} ({kind.__name__}){_more(paths)} {reason}" for (kind, reason), paths in kinds.items()]
        links = [
            f"the link from {pairs[0][0]} to {pairs[0][1]}{_more(pairs)} where blocks are given another"
            f" {first_few(names)}: a stage has the same for all its steps, so another one begins there"
            for names, pairs in self.unlinked.items()
        ]
        return blocks + links


def _more(found: Sequence[object]) -> str:
    return f", like {len(found) - 1} more," if len(found) > 1 else ""


@dataclass
class _Chain:
    """transition: names of the children before the first step; reader: what else reads a state where it was cut."""

    transition: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    reader: nn.Module | None = None
