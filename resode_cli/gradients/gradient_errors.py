"""What is known of gradients that are no backprop's: errors by stage and parameter, over batches and over depths."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UsageError


@dataclass(frozen=True)
class StageGradient:
    """One method on one stage. ĝ: its gradient, g: backprop's, both of the steps' parameters.

    stage: a stage's name, or 'stem' for the parameters before the first stage. adjoint: what it ran under.
    relative_error: ‖g − ĝ‖ / ‖g‖. cosine: that of the angle between them. Over several batches these, and the next
        two, are medians.
    least_error, largest_error: the same over the batches, the smallest and the largest.
    transition_error: the same relative error for the transition's parameters; None without any.
    drift: ‖x̃ − x‖ / ‖x‖ of reconstructed states; None where nothing is reconstructed.
    evaluations_per_step: of the increment Φ in the backward pass, the taped one included; 0 for backprop.
    bytes_kept: what the stage's steps keep between forward and backward, parameters aside.
    states_kept: the same in states, from the plan; None for backprop.
    """

    stage: str
    steps: int
    relative_error: float
    cosine: float
    transition_error: float | None = None
    drift: float | None = None
    evaluations_per_step: float | None = None
    bytes_kept: int | None = None
    states_kept: int | None = None
    adjoint: str | None = None
    least_error: float | None = None
    largest_error: float | None = None


@dataclass(frozen=True)
class ParameterGradient:
    """One parameter's gradient against backprop's: its name in a model file, relative error and cosine."""

    parameter: str
    relative_error: float
    cosine: float


@dataclass(frozen=True)
class MethodGradients:
    """One method on all stages and all parameters; name: its label. scheme: the stages' forward rule, or rules."""

    name: str
    scheme: str
    stages: tuple[StageGradient, ...]
    parameters: tuple[ParameterGradient, ...]
    scheme_switched: bool

    @property
    def worst(self) -> tuple[tuple[str, float], ...]:
        """The parameters with the largest relative errors, by name."""
        largest = sorted(self.parameters, key=lambda own: -_sortable(own.relative_error))[:5]
        return tuple((own.parameter, own.relative_error) for own in largest)

    @property
    def largest_error(self) -> float:
        """The largest relative error of a stage or the stem, on any batch; infinite if any gradient is not finite."""
        errors = [e for stage in self.stages for e in (stage.relative_error, stage.largest_error) if e is not None]
        return max((e if math.isfinite(e) else math.inf for e in errors), default=0.0)


@dataclass(frozen=True)
class GradientReport:
    """Every method against backprop on one batch of so many images, or on several.

    loss: the mean over them.
    """

    images: int
    data: str
    batch_norm: str
    loss: float
    methods: tuple[MethodGradients, ...]
    batches: int = 1


def over_batches(reports: Sequence[GradientReport]) -> GradientReport:
    """One report of several batches: medians of the errors, with the range of the stages'.

    Raises UsageError for batches of different sizes, whose errors are not alike.
    """
    first, *others = reports
    if not others:
        return first
    if any(report.images != first.images for report in others):
        raise UsageError("gradient errors of batches of different sizes cannot be taken together")
    methods = []
    for alike in zip(*(report.methods for report in reports), strict=True):
        stages = tuple(map(_stage_over, zip(*(method.stages for method in alike), strict=True)))
        parameters = tuple(map(_parameter_over, zip(*(method.parameters for method in alike), strict=True)))
        methods.append(replace(alike[0], stages=stages, parameters=parameters))
    loss = statistics.fmean(report.loss for report in reports)
    return replace(first, loss=loss, methods=tuple(methods), batches=len(reports))


def _stage_over(alike: tuple[StageGradient, ...]) -> StageGradient:
    medians = {
        name: _median([getattr(own, name) for own in alike])
        for name in ("relative_error", "cosine", "transition_error", "drift")
    }
    errors = [_sortable(own.relative_error) for own in alike]
    return replace(alike[0], **medians, least_error=min(errors), largest_error=max(errors))


def _parameter_over(alike: tuple[ParameterGradient, ...]) -> ParameterGradient:
    medians = {name: _median([getattr(own, name) for own in alike]) for name in ("relative_error", "cosine")}
    return replace(alike[0], **medians)


def _median(values: Sequence[float | None]) -> Any:
    """The middle of the values, of which NaN counts as the largest; None if any is missing."""
    known = [value for value in values if value is not None]
    return statistics.median(map(_sortable, known)) if len(known) == len(values) else None


def _sortable(error: float) -> float:
    return error if math.isfinite(error) else math.inf


@dataclass(frozen=True)
class SweepRow:
    """Errors against depth. rounding: at or below it an error is that of the arithmetic, whatever the depth."""

    method: str
    stage: str
    depths: tuple[int, ...]
    errors: tuple[float, ...]
    rounding: float = 0.0

    @property
    def slope(self) -> float | None:
        """Least-squares slope of log error on log depth: minus the order in 1/N.

        None if an error is 0, infinite, or no larger than rounding.
        """
        fit = self._fit
        return None if fit is None else fit.slope

    @property
    def slope_error(self) -> float | None:
        """The slope's standard error, from how far the points lie off the line. None for two points or without one."""
        fit, n = self._fit, len(self.depths)
        if fit is None or n < 3:
            return None
        x, y = self._logs
        off = sum((b - fit.intercept - fit.slope * a) ** 2 for a, b in zip(x, y, strict=True))
        return math.sqrt(off / (n - 2) / sum((a - statistics.fmean(x)) ** 2 for a in x))

    @property
    def _logs(self) -> tuple[list[float], list[float]]:
        return [math.log(n) for n in self.depths], [math.log(error) for error in self.errors]

    @property
    def _fit(self) -> statistics.LinearRegression | None:
        known = all(math.isfinite(error) and error > self.rounding for error in self.errors)
        return statistics.linear_regression(*self._logs) if known and len(self.depths) > 1 else None
