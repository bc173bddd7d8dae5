"""Gradients that a planned backward pass would lose, found while the forward pass runs.

The engine's gradients go to a stage's state and to the parameters of its blocks. Plain backprop has more ways out of a
block: a tensor that the block keeps, on which a loss is put (`self.aux = g`, a hook that collects features), and a
tensor that the block reads and that is neither its state nor its parameter (a condition made of the images, a layer
held by a hook). So every evaluation of the forward pass is recorded, without what a backward pass would need: a loss
on anything that was kept then raises, and the graph says what was read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..errors import ResodeError

WRITES = "leaf Variable that requires grad"  # what torch says of an operation in place on a recorded input


def recorded_bare(run: Callable[[Tensor], Tensor], x: Tensor, own: Collection[int] | None, *, name: str) -> Tensor:
    """`run(x)`, outside of any graph, having looked at what its gradient would depend on.

    own: ids of the parameters that get a gradient; None: do not look. name: the block's, for messages.
    Raises ResodeError if the result depends on a trained tensor that is neither x nor one of `own`, or, once a
    backward pass reaches it, for a tensor that was kept from inside.
    """

    def keep_nothing(_: Tensor) -> None:
        return None

    def refuse(_: Any) -> NoReturn:
        raise ResodeError(
            f"{name} keeps a tensor while it runs, and a loss depends on it: its gradient would be lost, for the"
            " stage's activations are not recorded; use the adjoint method 'backprop' for its stage, or detach what is"
            " kept"
        )

    with torch.enable_grad(), saved_tensors_hooks(keep_nothing, refuse):
        leaf = x.detach().requires_grad_()
        try:
            result = run(leaf)
        except RuntimeError as error:
            if WRITES not in str(error):
                raise
            raise ResodeError(f"{name} writes to its input; make that operation out of place") from error
    if leaf._backward_hooks:
        raise ResodeError(
            f"{name} puts a hook on its state: it would see a part of the state's gradient only; put the hook on a"
            " tensor of the block's own, or use the adjoint method 'backprop' for the stage"
        )
    # For what saves no tensor on its way from the state: the state itself, a sum of it.
    leaf.register_hook(refuse)  # type: ignore[no-untyped-call]
    foreign = None if own is None else foreign_leaf(result, leaf, own)
    if foreign is not None:
        raise ResodeError(
            f"{name} reads a trained tensor that is no parameter of its own (of shape {tuple(foreign.shape)}): its"
            " gradient would be lost; register it in the block, use the adjoint method 'backprop' for the stage, or"
            " freeze it (requires_grad_(False))"
        )
    return result.detach()


def foreign_leaf(result: Tensor, leaf: Tensor, own: Collection[int]) -> Tensor | None:
    """A leaf that `result` has a gradient for, and that is neither `leaf` nor one of `own`, by id."""
    if result.grad_fn is None:
        return None
    seen: set[Any] = {result.grad_fn}
    waiting: list[Any] = [result.grad_fn]
    while waiting:
        node = waiting.pop()
        found = getattr(node, "variable", None)
        if found is not None and found is not leaf and id(found) not in own:
            return found  # type: ignore[no-any-return]
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return None
