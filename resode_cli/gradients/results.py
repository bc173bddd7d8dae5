"""What `auto` chose, and the figures that it rests on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ResodeError
from ..ode import Adjoint
from ..quantities import size

ABOVE = 1.01  # of a size, so that it is not rounded down


class OverBudgetError(ResodeError):
    """A training step that takes more bytes than its budget, however it is planned. advice: what would change that."""

    def __init__(self, needed: int, budget: int, advice: str) -> None:
        self.needed, self.advice = needed, advice
        super().__init__(
            f"memory budget of {size(budget)}: a training step takes at least {size(needed * ABOVE)}; {advice}"
        )


@dataclass(frozen=True)
class PieceChoice:
    """What was chosen for a piece of a network: a stage's steps, its transition, or what comes before the first stage.

    steps: of a stage, else 0.
    error: relative error of the gradient of the stage's steps, in the whole network, on the batch used.
    own_error: relative error of the stage alone, given its output's exact adjoint: the larger one of parameters and
        input. Both are None of a piece that was not to be chosen and is not exact.
    evaluations_per_step: in the backward pass; of a transition, of the whole of it.
    own_drift: drift of what was chosen; None if it is exact.
    free_drift, contraction: of the best reversal without anchors; None if none was tried.
    tried: the adjoints measured, with their own errors.
    bytes_held: between its forward and its backward pass, for the batch size planned for.
    backprop_bytes: that plain backprop would hold.
    """

    piece: str
    steps: int
    adjoint: Adjoint
    error: float | None
    own_error: float | None
    evaluations_per_step: float
    own_drift: float | None
    free_drift: float | None
    contraction: float | None
    tried: tuple[tuple[str, float], ...]
    bytes_held: int
    backprop_bytes: int
    reason: str


@dataclass(frozen=True)
class Alternative:
    """Another plan: its bytes, and memory and time against the chosen one's."""

    bytes: int
    memory: float
    time: float


@dataclass(frozen=True)
class ChosenAdjoints:
    """The choices, and what a training step takes by them.

    images: that were calibrated on; 0 where nothing had to be measured. micro_batches: parts of the batch, one after
    the other. predicted_bytes, backprop_bytes: of a step. budget: in bytes; None where there was none.
    time: of a step against plain backprop's, on the simulated machine.
    """

    choices: tuple[PieceChoice, ...]
    tolerance: float
    images: int
    batch_size: int
    micro_batches: int
    predicted_bytes: int
    backprop_bytes: int
    budget: int | None
    time: float
    alternatives: tuple[Alternative, ...] = ()

    @property
    def adjoints(self) -> dict[str, Adjoint]:
        return {choice.piece: choice.adjoint for choice in self.choices}

    def record(self) -> dict[str, Any]:
        """What a model's history says of it."""
        pieces = {
            choice.piece: {
                "adjoint": choice.adjoint.label,
                "error": choice.error,
                "bytes": choice.bytes_held,
                "backprop_bytes": choice.backprop_bytes,
            }
            for choice in self.choices
        }
        names = ("micro_batches", "tolerance", "batch_size", "predicted_bytes", "backprop_bytes", "budget", "time")
        return {"pieces": pieces, **{name: getattr(self, name) for name in names}}

    @property
    def stages(self) -> tuple[PieceChoice, ...]:
        """The choices for steps."""
        return tuple(choice for choice in self.choices if choice.steps)
