"""What a fit tells: figures, phases, predictions, progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from ..network.model import OdeResNet


@dataclass(frozen=True)
class HeldOutErrors:
    """On held-out images. logits: the loss of the phase 'logits', see `Objective.logits_loss`; agreement: fraction of
    images with the teacher's class, or set of labels.

    states: √e_k by stage, k = 0 … D; empty where the teacher's states are not known. penalty: weighted.
    """

    logits: float
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
    """A round of a phase; one is all, where the number of training steps was given.

    ended: 'done', 'early' (no more gain), 'late' (its time was over), 'interrupted', 'settled' (nothing to fit) or
        'reverted' (of no use).
    rate: peak learning rate. training_seconds: of the steps alone, without what was judged.
    """

    phase: str
    depths: dict[str, int]
    steps: int
    seconds: float
    before: HeldOutErrors
    after: HeldOutErrors
    ended: str
    round: int = 1
    rate: float = 0.0
    training_seconds: float = 0.0


@dataclass(frozen=True)
class FitResult:
    """recalibrated: whether re-estimated BatchNorm statistics were of use, and kept.

    out_of_time: whether the last phase still gained when its time was over.
    """

    phases: tuple[PhaseResult, ...]
    recalibrated: bool
    seconds: float
    interrupted: bool
    out_of_time: bool = False


@dataclass(frozen=True)
class PhaseCost:
    """What a phase will take: seconds of a training step, and bytes beside the images.

    adjoint: its exact backward method. steps: as many as were asked for; None: as many as time is left for. trial:
        further ones, over which rates are tried.
    """

    phase: str
    depths: dict[str, int]
    steps: int | None
    seconds_per_step: float
    bytes: int
    adjoint: str
    trial: int = 0

    @property
    def seconds(self) -> float:
        """Of all its steps, where their number was given, else of one."""
        return self.seconds_per_step * (1 if self.steps is None else self.steps + self.trial)


@dataclass(frozen=True)
class FitStep:
    """One step, for a progress bar. loss: of the phase. errors: √e_k by stage, where states are matched.

    agreement: with the teacher on held-out images, as it was before this round.
    """

    phase: str
    step: int
    total: int
    loss: float
    errors: dict[str, list[float]]
    round: int = 1
    agreement: float = 0.0


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
