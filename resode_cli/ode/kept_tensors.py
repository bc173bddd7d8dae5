"""Tensors that a block keeps while it runs, for a loss outside of it.

    self.aux = some_activation

A planned forward pass records no graph, so a loss on such a tensor would get no gradient, silently. With
plain backprop it would. A weight that a hook computes from parameters before each evaluation, as torch's older
weight norm does, is kept too, but depends on no state: it is let be.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ResodeError
from .field import Field
from .generators import RandomState
from .reentry import fixed_buffers

# Types of almost every attribute of a module, which hold no tensor that is kept: passed over quickly, for this is
# asked of every module in every forward pass.
_PASSED_OVER = frozenset({bool, int, float, str, dict, OrderedDict, set, type(None)})
# The module that keeps a tensor, the attribute's name, and the place in a list or tuple.
Place = tuple[nn.Module, str, int | None]


def kept_tensors(block: nn.Module) -> dict[Place, Tensor]:
    """The tensors in plain attributes of a block's modules, or in lists and tuples there."""
    return {
        (module, name, place): tensor
        for module in block.modules()
        for name, value in vars(module).items()
        if type(value) not in _PASSED_OVER
        for place, tensor in _tensors(value)
    }


def _tensors(value: Any) -> Iterator[tuple[int | None, Tensor]]:
    if isinstance(value, Tensor):
        yield None, value
    elif type(value) in (list, tuple):
        for place, item in enumerate(value):
            if isinstance(item, Tensor):
                yield place, item


def _depends_on(tensor: Tensor, leaf: Tensor) -> bool:
    if tensor.grad_fn is None:
        return False
    ones = torch.ones_like(tensor)
    return torch.autograd.grad(tensor, leaf, ones, retain_graph=True, allow_unused=True)[0] is not None


def check_kept(field: Field, before: dict[int, dict[Place, Tensor]], x: Tensor) -> None:
    """Raise ResodeError if a block keeps a tensor that plain backprop would have a gradient for.

    before: by distinct block, what its modules kept before the forward pass. x: a state.
    A block that keeps other tensors now is evaluated once more, on the tape; what it leaves behind is undone.
    """
    for n, block in enumerate(field.schedule):
        if block in before:
            module, kept = field.residuals[block].module, before.pop(block)
            after = kept_tensors(module)
            if any(kept.get(place) is not tensor for place, tensor in after.items()):
                _check(field, n, module, x)


def _check(field: Field, n: int, block: nn.Module, x: Tensor) -> None:
    attributes = [(module, dict(vars(module))) for module in block.modules()]
    lists = [(value, list(value)) for _, own in attributes for value in own.values() if type(value) is list]
    random = RandomState.everywhere(x.device, block.modules())
    try:
        with fixed_buffers([block]), torch.enable_grad():
            leaf = x.detach().requires_grad_()
            field.residuals[field.schedule[n]](leaf)
        found = [place for place, tensor in kept_tensors(block).items() if _depends_on(tensor, leaf)]
    finally:
        random.restore()
        for value, items in lists:
            value[:] = items
        for module, own in attributes:
            vars(module).clear()
            vars(module).update(own)
    if found:
        module, name, _ = found[0]
        raise ResodeError(
            f"{field.describe(n)} keeps a tensor in {type(module).__name__}.{name} while it runs; a loss on it would"
            " get no gradient, for the stage's activations are not recorded; use the adjoint method 'backprop' for"
            " its stage, or detach what is kept"
        )
