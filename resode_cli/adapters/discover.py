"""Find the stages of a network: containers whose children are residual steps.

Decided block by block, from the shortcut. Blocks of a known class (block_rules.py) are read from
their attributes. Blocks of any other class are put to a test: with all its parameters set to zero,
a block that adds a branch to its own input returns that input, or its activation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ResodeError
from ..parts import StageParts
from ..residual import ACTIVATIONS
from .block_rules import has_identity_shortcut, is_known

_AFTER_ADDITION: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda z: z,
    *ACTIVATIONS.values(),
    F.leaky_relu,
    F.relu6,
    F.elu,
    F.mish,
    F.tanh,
)


def find_stages(net: nn.Module, example: Tensor) -> list[StageParts]:
    """The stages of `net`, in order. Raises ResodeError, naming the reason, if there is no step."""
    known = [m for m in net.modules() if is_known(m)]
    is_step = has_identity_shortcut if known else _StepTest(net, example)
    stages = list(_stages(net, lambda block: (not known or is_known(block)) and is_step(block)))
    if not any(stage.blocks for stage in stages):
        raise ResodeError(
            f"{type(net).__name__} has no residual steps to convert: no nn.Sequential or nn.ModuleList"
            " in it holds a shape-preserving block that adds to its own input"
        )
    return stages


def is_container(module: nn.Module) -> bool:
    """Whether calling, or iterating over, the module means running its children one after the other."""
    plain_sequence = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return plain_sequence or isinstance(module, nn.ModuleList)


def _stages(net: nn.Module, is_step: Callable[[nn.Module], bool]) -> Iterator[StageParts]:
    inside: list[str] = []  # paths of blocks and containers already accounted for
    for path, container in net.named_modules():
        if not is_container(container) or any(path.startswith(done + ".") for done in inside):
            continue
        children = dict(container.named_children())
        steps = {name for name, child in children.items() if not is_container(child) and is_step(child)}
        all_known = bool(children) and all(is_known(child) for child in children.values())
        if not steps and not all_known:
            continue
        inside += [f"{path}.{name}".lstrip(".") for name in steps]
        yield from _split(path, list(children), steps)


def _split(path: str, names: list[str], steps: set[str]) -> Iterator[StageParts]:
    """Cut a container's children into stages: transition blocks, then steps. A tail stays as it is."""
    transition: list[str] = []
    blocks: list[str] = []
    for name in names:
        if name in steps:
            blocks.append(name)
            continue
        if blocks:
            yield StageParts(path, tuple(transition), tuple(blocks))
            transition, blocks = [], []
        transition.append(name)
    if blocks or not steps:
        yield StageParts(path, tuple(transition), tuple(blocks))


@dataclass
class _Seen:
    calls: int = 0
    shape: torch.Size | None = None  # of the only tensor that went in, if it came out in the same shape


class _StepTest:
    """Whether a block of an unknown class maps a state to a state and adds to its own input."""

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        self.seen: dict[nn.Module, _Seen] = {}
        blocks = [child for m in net.modules() if is_container(m) for child in m.children() if not is_container(child)]
        hooks = [block.register_forward_hook(self._record, with_kwargs=True) for block in blocks]
        training = net.training
        net.eval()
        try:
            with torch.no_grad():
                net(example)
        finally:
            net.train(training)
            for hook in hooks:
                hook.remove()

    def _record(self, block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], out: object) -> None:
        seen = self.seen.setdefault(block, _Seen())
        seen.calls += 1
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(out, Tensor):
            seen.shape = out.shape if args[0].shape == out.shape else None

    def __call__(self, block: nn.Module) -> bool:
        seen = self.seen.get(block)
        has_branch = any(True for _ in block.parameters()) and any(True for _ in block.children())
        if seen is None or seen.calls != 1 or seen.shape is None or not has_branch:
            return False
        probe = copy.deepcopy(block).eval()
        with torch.no_grad():
            for parameter in probe.parameters():
                parameter.zero_()
            dtype = next(probe.parameters()).dtype
            x = torch.randn(seen.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            result = probe(x.clone())
            return any(torch.allclose(result, a(x), rtol=1e-5, atol=1e-6) for a in _AFTER_ADDITION)
