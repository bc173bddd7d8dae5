"""How far each adjoint method's gradients are from true backprop, stage by stage."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError
from ..network.model import OdeResNet, freeze_batch_norm
from ..ode import SCHEMES, Adjoint, RandomState, required_scheme
from ..surgery.steps import deepened
from .choose import choose_adjoints
from .results import ChosenAdjoints

Gradients = dict[str, Tensor]

ROUNDING = 16  # roundoffs: gradients of float32 by an exact method are off by some of them


@dataclass(frozen=True)
class StageGradient:
    """One method on one stage. ĝ: its gradient, g: backprop's, both of the steps' parameters.

    stage: a stage's name, or 'stem' for the parameters before the first stage. adjoint: what it ran under.
    relative_error: ‖g − ĝ‖ / ‖g‖. cosine: that of the angle between them.
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


@dataclass(frozen=True)
class StageAdjoints:
    """An adjoint for each stage, under one name, as they are chosen."""

    name: str
    stages: Mapping[str, Adjoint]


@dataclass(frozen=True)
class ParameterGradient:
    """One parameter's gradient against backprop's: its name in a model file, relative error and cosine."""

    parameter: str
    relative_error: float
    cosine: float


@dataclass(frozen=True)
class MethodGradients:
    """One method on all stages and all parameters; name: its label."""

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
        """The largest relative error of a stage or the stem; infinite if any gradient is not finite."""
        errors = [stage.relative_error for stage in self.stages]
        return max((e if math.isfinite(e) else math.inf for e in errors), default=0.0)


@dataclass(frozen=True)
class GradientReport:
    """Every method against backprop on one batch."""

    images: int
    data: str
    batch_norm: str
    loss: float
    methods: tuple[MethodGradients, ...]


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


def check_gradients(
    model: OdeResNet,
    images: Tensor,
    labels: Tensor,
    *,
    methods: Sequence[Adjoint | StageAdjoints],
    batch_norm: str = "frozen",
    data: str = "",
    on_method: Callable[[str], None] = lambda name: None,
) -> GradientReport:
    """Compare each method's gradients of the cross-entropy with backprop's, on the same forward rule.

    A method tied to a forward rule (heun) is measured under that rule, against backprop under that
    rule, and reported as switched. The model is left as it was, buffers included. Random layers
    draw the same numbers every time.

    images: (B, 3, H, W), labels: (B,); batch_norm: 'frozen' (running statistics) or 'batch'.
    """
    _check_batch_norm(batch_norm)
    schemes = {name: stage.spec.scheme for name, stage in model.stages.items()}
    references: dict[str | None, Gradients] = {}
    results: list[MethodGradients] = []
    loss: float | None = None
    for adjoint in methods:
        on_method(_name(adjoint))
        scheme = required_scheme(adjoint.method) if isinstance(adjoint, Adjoint) else None
        switched = scheme is not None and any(own != scheme for own in schemes.values())
        key = scheme if switched else None
        with _measuring(model, schemes, key, batch_norm):
            if key not in references:
                model.use_adjoint(Adjoint("backprop"))
                reference_loss, references[key] = _gradients(model, images, labels)
                loss = reference_loss if key is None else loss
            model.use_adjoint(adjoint if isinstance(adjoint, Adjoint) else adjoint.stages)
            method_loss, gradients = _gradients(model, images, labels)
            loss = method_loss if loss is None and key is None else loss
            results.append(_compare(model, _name(adjoint), references[key], gradients, switched))
    if loss is None:  # every method switched the forward rule
        with torch.no_grad():
            loss = F.cross_entropy(model(images), labels).item()
    return GradientReport(len(images), data, batch_norm, loss, tuple(results))


def choose_as_measured(
    model: OdeResNet,
    images: Tensor,
    labels: Tensor,
    *,
    tolerance: float,
    budget: int | None,
    methods: Sequence[str] | None = None,
    batch_norm: str = "frozen",
    on_stage: Callable[[str, str], None] = lambda stage, adjoint: None,
) -> ChosenAdjoints:
    """What `auto` chooses on a batch in the mode that gradients are checked in. The model is left as it was."""
    _check_batch_norm(batch_norm)
    schemes = {name: stage.spec.scheme for name, stage in model.stages.items()}
    with _measuring(model, schemes, None, batch_norm):
        return choose_adjoints(
            model,
            images,
            labels,
            tolerance=tolerance,
            budget=budget,
            batch_size=len(images),
            methods=methods,
            on_stage=on_stage,
        )


def _check_batch_norm(mode: str) -> None:
    if mode not in ("frozen", "batch"):
        raise UsageError(f"unknown BatchNorm mode {mode!r} (allowed: frozen, batch)")


def _name(adjoint: Adjoint | StageAdjoints) -> str:
    return adjoint.label if isinstance(adjoint, Adjoint) else adjoint.name


@contextmanager
def _measuring(model: OdeResNet, schemes: dict[str, str], scheme: str | None, batch_norm: str) -> Iterator[None]:
    """Train mode with the chosen BatchNorm policy and forward rule; everything is put back afterwards."""
    training = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    adjoints = model.adjoints
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        model.train()
        if batch_norm == "frozen":
            freeze_batch_norm(model)
        model.requires_grad_(True)
        model.use_adjoint(Adjoint("backprop"))
        for stage in model.stages.values():
            stage.monitor.count_kept = True
            if scheme is not None:
                stage.use_scheme(scheme)
        yield
    finally:
        for name, stage in model.stages.items():
            stage.use_scheme(schemes[name])
            stage.monitor.count_kept = False
        model.use_adjoint(adjoints)
        for name, p in model.named_parameters():
            p.requires_grad_(wanted[name])
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        for module, mode in training.items():
            module.training = mode


def _gradients(model: OdeResNet, images: Tensor, labels: Tensor) -> tuple[float, Gradients]:
    named = dict(model.net.named_parameters())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    random = RandomState.everywhere(images.device, model.modules())
    torch.manual_seed(0)
    try:
        loss = F.cross_entropy(model(images), labels)
    finally:
        random.restore()  # the next method draws the same numbers
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    with torch.no_grad():  # the next method starts from the same statistics
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return loss.item(), {name: g for name, g in zip(named, gradients, strict=True) if g is not None}


def _compare(
    model: OdeResNet, name: str, reference: Gradients, gradients: Gradients, switched: bool
) -> MethodGradients:
    groups: dict[str, list[str]] = {}
    for key, group in model.parameter_groups().items():
        if key in reference:
            groups.setdefault(group, []).append(key)
    rows = []
    if "stem" in groups:
        rows.append(StageGradient("stem", 0, *_difference(reference, gradients, groups["stem"])))
    for stage_name, stage in model.stages.items():
        if stage.spec.depth == 0:
            continue
        transition = groups.get(f"{stage_name} transition")
        monitor, evaluations = stage.monitor, SCHEMES[stage.spec.scheme].evaluations
        error, cosine = _difference(reference, gradients, groups.get(stage_name, []))
        plan = stage.adjoint.plan(stage.spec.depth, stage.spec.scheme)
        rows.append(
            StageGradient(
                stage_name,
                stage.spec.depth,
                error,
                cosine,
                transition_error=_difference(reference, gradients, transition)[0] if transition else None,
                drift=None if monitor.drift is None else monitor.drift.item(),
                evaluations_per_step=monitor.evaluations / evaluations / stage.spec.depth,
                bytes_kept=monitor.kept,
                states_kept=None if plan is None else plan.states_kept,
                adjoint=stage.adjoint.label,
            )
        )
    parameters = [
        ParameterGradient(model.file_name(key), *_difference(reference, gradients, [key])) for key in reference
    ]
    scheme = next(iter(model.stages.values())).spec.scheme
    return MethodGradients(name, scheme, tuple(rows), tuple(parameters), switched)


def _sortable(error: float) -> float:
    return error if math.isfinite(error) else math.inf


def _difference(reference: Gradients, gradients: Gradients, names: Sequence[str]) -> tuple[float, float]:
    """Relative error and cosine of the named gradients taken as one vector, in float64."""
    error = norm = other = dot = 0.0
    for name in names:
        g = reference[name].double()
        h = gradients[name].double() if name in gradients else torch.zeros_like(g)
        error += (g - h).square().sum().item()
        norm += g.square().sum().item()
        other += h.square().sum().item()
        dot += (g * h).sum().item()
    if norm == 0.0:
        return (0.0, 1.0) if other == 0.0 else (math.inf, 0.0)
    cosine = dot / math.sqrt(norm * other) if other > 0 else 0.0
    return math.sqrt(error / norm), cosine


def sweep_depths(
    model: OdeResNet,
    images: Tensor,
    labels: Tensor,
    *,
    depths: Sequence[int],
    methods: Sequence[Adjoint],
    batch_norm: str = "frozen",
    on_depth: Callable[[int, str], None] = lambda depth, method: None,
) -> tuple[SweepRow, ...]:
    """The error against depth (the paper's figure 3c): the model deepened by replication to each depth.

    Raises UsageError for a depth below a stage's own.
    """
    errors: dict[tuple[str, str], list[float]] = {}
    for depth in depths:
        deep = copy.deepcopy(model)
        for name, stage in deep.stages.items():
            if stage.spec.depth:
                deep.replace_stage(name, deepened(stage, depth))
        report = check_gradients(
            deep,
            images,
            labels,
            methods=methods,
            batch_norm=batch_norm,
            on_method=partial(on_depth, depth),
        )
        for method in report.methods:
            for stage_gradient in method.stages:
                key = (method.name, stage_gradient.stage)
                errors.setdefault(key, []).append(stage_gradient.relative_error)
    dtype = next(model.parameters()).dtype
    rounding = ROUNDING * torch.finfo(dtype).eps
    return tuple(
        SweepRow(method, stage, tuple(depths), tuple(values), rounding) for (method, stage), values in errors.items()
    )
