"""What a fit tells: figures, phases, predictions, progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from ..network.model import OdeResNet


@dataclass(frozen=True)
class HeldOutErrors:
    """On held-out images. distillation: the loss of `logits`; agreement: fraction of images with the
    teacher's class, or set of labels.

    states: √e_k by stage, k = 0 … D; empty where the teacher's states are not known. penalty: weighted.
    """

    distillation: float
    agreement: float
    states: dict[str, list[float]]
    penalty: float = 0.0

    @property
    def state_error(self) -> float:
        """The mean of e_k."""
        errors = [e**2 for stage in self.states.values() for e in stage]
        return sum(errors) / max(len(errors), 1)


@dataclass(frozen=True)
class PhaseResult:
    """ended: 'done', 'early' (no more gain), 'interrupted', 'settled' (nothing to fit) or 'reverted' (of no use)."""

    phase: str
    depths: dict[str, int]
    steps: int
    seconds: float
    before: HeldOutErrors
    after: HeldOutErrors
    ended: str


@dataclass(frozen=True)
class FitResult:
    """recalibrated: whether re-estimated BatchNorm statistics were of use, and kept."""

    phases: tuple[PhaseResult, ...]
    recalibrated: bool
    seconds: float
    interrupted: bool


@dataclass(frozen=True)
class PhaseCost:
    """What a phase will take: seconds, and bytes beside the images. adjoint: its exact backward method."""

    phase: str
    depths: dict[str, int]
    steps: int
    seconds: float
    bytes: int
    adjoint: str


@dataclass(frozen=True)
class FitStep:
    """One step, for a progress bar. loss: of the phase. errors: √e_k by stage, where states are matched."""

    phase: str
    step: int
    total: int
    loss: float
    errors: dict[str, list[float]]


@dataclass(frozen=True)
class FitCallbacks:
    """What a caller wants to hear. on_phase: with the model as it would be if the fit ended there.

    `should_stop` and `deferred` are those of `training.results.Callbacks`.
    """

    on_step: Callable[[FitStep], None] = lambda step: None
    on_costs: Callable[[Sequence[PhaseCost]], None] = lambda costs: None
    on_phase: Callable[[PhaseResult, OdeResNet], None] = lambda result, model: None
    on_message: Callable[[str], None] = lambda message: None
    should_stop: Callable[[], bool] = lambda: False
    deferred: Callable[[], AbstractContextManager[None]] = nullcontext
