"""What a block is called with beside the state: a rotary embedding, the size of a grid."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves


def further_arguments(
    block: nn.Module | inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """By name, all arguments of a module's call but the first, and but those that have their default values.

    block: the module, or the signature of its forward.
    """
    if len(args) < 2 and not kwargs:
        return {}
    signature = inspect.signature(block.forward) if isinstance(block, nn.Module) else block
    _, *others = signature.bind(*args, **kwargs).arguments.items()
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    return {name: value for name, value in others if tensors_in(value) or value != defaults[name]}


def tensors_in(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def equal(first: object, second: object) -> bool:
    """Whether two arguments, or collections of them, have the same values. On the meta device, the same shapes."""
    (mine, structure), (others, other_structure) = tree_flatten(first), tree_flatten(second)
    return structure == other_structure and all(_equal(a, b) for a, b in zip(mine, others, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    alike = a.shape == b.shape and a.dtype == b.dtype
    return a is b or (alike and (a.is_meta or torch.equal(a, b)))


@dataclass(frozen=True, eq=False)
class WithArguments:
    """The branch of a block taken as a whole: the block, called with more than the state."""

    further: Mapping[str, Any]

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = block(x, **self.further)
        return result


def keep_channels_last(x: Tensor) -> None:
    """Let the gradient of a state that is in the order (B, H, W, C) in memory, and not in the usual one as well, be so.

    Poolings hand in one in the other order, and every step of the sweep would mix the two.
    """
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        x.register_hook(lambda adjoint: adjoint.contiguous(memory_format=torch.channels_last))  # type: ignore
