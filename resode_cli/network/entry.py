"""A stage's transition as a part by itself, which the backward pass can evaluate again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import ResodeError
from ..ode import MAPPING, Adjoint, Field, Monitor, RandomState, solve
from .repeat import remember
from .residual import BlockCall


@dataclass
class Entry:
    """How a stage's transition is run.

    adjoint: its own method; None: what goes with that of the stage's steps.
    monitor: what its last passes did.
    kept: by the modes of its modules, why its activations are kept although the adjoint says otherwise; empty where
        they are not. The first pass in these modes finds it out.
    """

    adjoint: Adjoint | None = None
    monitor: Monitor = field(default_factory=Monitor)
    kept: dict[tuple[bool, ...], str] = field(default_factory=dict)

    def run(
        self,
        blocks: Sequence[nn.Module],
        names: Sequence[str],
        adjoint: Adjoint,
        plainly: Callable[[Tensor], Tensor],
        x: Tensor,
    ) -> Tensor:
        """The transition's output, by an adjoint that replays unless that is found not to do. plainly: runs it."""
        modes = tuple(module.training for block in blocks for module in block.modules())
        if not blocks or not torch.is_grad_enabled() or torch.compiler.is_exporting() or self.kept.get(modes):
            return plainly(x)
        part = Field(tuple(map(BlockCall, blocks)), tuple(range(len(blocks))), 1.0, tuple(names))
        plan = adjoint.plan(len(blocks), MAPPING.name)
        if modes in self.kept:
            return solve(part, MAPPING, plan, x, monitor=self.monitor)
        restore, random = remember(blocks), RandomState.everywhere(x.device, part.modules())
        try:
            result = solve(part, MAPPING, plan, x.clone(), monitor=self.monitor)
        except ResodeError as reason:
            self.kept[modes] = str(reason)
            restore()
            random.restore()
            return plainly(x)
        self.kept[modes] = ""
        return result
