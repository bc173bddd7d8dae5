"""How far each adjoint method's gradients are from true backprop, stage by stage."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..network.labels_loss import labels_loss
from ..network.model import OdeResNet, freeze_batch_norm
from ..ode import SCHEMES, Adjoint, RandomState, required_scheme
from ..surgery.steps import deepened
from .choose import choose_adjoints
from .gradient_errors import (
    GradientReport,
    MethodGradients,
    ParameterGradient,
    StageGradient,
    SweepRow,
    over_batches,
)
from .results import ChosenAdjoints

Gradients = dict[str, Tensor]

ROUNDING = 16  # roundoffs: gradients of float32 by an exact method are off by some of them


@dataclass(frozen=True)
class StageAdjoints:
    """An adjoint for each stage, under one name, as they are chosen."""

    name: str
    stages: Mapping[str, Adjoint]


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

    images: (B, 3, H, W), labels: see `labels_loss`; batch_norm: 'frozen' (running statistics) or 'batch'.
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
            loss = labels_loss(model(images), labels).item()
    return GradientReport(len(images), data, batch_norm, loss, tuple(results))


def check_batches(
    model: OdeResNet,
    batches: Sequence[tuple[Tensor, Tensor]],
    **how: Any,
) -> GradientReport:
    """The same on several batches: medians, and the range over them. how: what `check_gradients` takes besides."""
    return over_batches([check_gradients(model, images, labels, **how) for images, labels in batches])


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
        loss = labels_loss(model(images), labels)
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
    scheme = ", ".join(dict.fromkeys(stage.spec.scheme for stage in model.stages.values() if stage.spec.depth))
    return MethodGradients(name, scheme, tuple(rows), tuple(parameters), switched)


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
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    depths: Sequence[int],
    methods: Sequence[Adjoint],
    batch_norm: str = "frozen",
    on_depth: Callable[[int, str], None] = lambda depth, method: None,
) -> tuple[SweepRow, ...]:
    """The error against depth (the paper's figure 3c): the model deepened by replication to each depth.

    batches: of images and labels, over which errors are medians.

    Raises UsageError for a depth below a stage's own.
    """
    errors: dict[tuple[str, str], list[float]] = {}
    for depth in depths:
        deep = copy.deepcopy(model)
        for name, stage in deep.stages.items():
            if stage.spec.depth:
                deep.replace_stage(name, deepened(stage, depth))
        report = check_batches(
            deep, batches, methods=methods, batch_norm=batch_norm, on_method=partial(on_depth, depth)
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
