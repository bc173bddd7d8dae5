"""A rewrite, whole: change a model, fit it to what it came from if asked to, and measure it before and after."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..data import ImageData, batches
from ..errors import ResodeError
from ..measuring.comparison import NetworkFigures, logits_of, network_figures, spread
from ..measuring.evaluate import Measured, evaluate
from ..network.model import OdeResNet, check_finite
from ..network.residual import ACTIVATIONS, Form
from ..network.stage import OdeStage
from ..surgery.convert import compare_logits, random_batch
from ..training.teacher import Teacher
from .fit import fit
from .images import FitData, held_out
from .results import FitCallbacks, FitResult, PhaseResult
from .settings import FitSettings

RANDOM_IMAGES = 4
FIGURES_IMAGES = 256  # held out of a fit, on which networks are compared

Save = Callable[[OdeResNet, Mapping[str, Any], bool], None]


@dataclass(frozen=True)
class Measuring:
    """Where and on what networks are measured.

    data: labelled images; without any, accuracy is not known. gradients: measure the error of each method's gradients.
    """

    device: torch.device
    data: ImageData | None = None
    batch_size: int = 100
    workers: int | str = 0
    gradients: bool = False


@dataclass(frozen=True)
class FitPlan:
    """What to fit to, on what, and how.

    form: the form of the fitted stages; None: `pre` where blocks allow it, else the form that they have.
    own: whether the teacher is the network itself, as it was, or in the form that its weights are of.
    deepening: `depths` and `depth_weights` of `fit`, which then takes stages to their depths by itself.
    """

    settings: FitSettings
    teacher: Teacher
    data: FitData
    form: Form | None = None
    own: bool = True
    deepening: Mapping[str, Any] = field(default_factory=dict)

    def images(self) -> Tensor:
        """Images that are held out of the fit."""
        order = spread(held_out(len(self.data.plain)), FIGURES_IMAGES)
        found = [b.images for b in batches(self.data.plain, 64, order=order) if len(b.labels)]
        if not found:
            raise ResodeError(f"{self.data.plain.name}: no image could be read")
        return torch.cat(found)

    def reference(self, images: Tensor, device: torch.device) -> Tensor:
        """The teacher's logits."""
        return torch.cat([self.teacher.logits(part.to(device)).cpu() for part in torch.split(images, 64)])

    def record(self, data: str) -> dict[str, Any]:
        """For the model's history. data: what the user called it."""
        return {"data": data, "teacher": self.teacher.name, **asdict(self.settings)}


@dataclass(frozen=True)
class RewriteCallbacks:
    """What a caller wants to hear.

    save: called with a model, what is to stand in its history, and whether the work on it is done: after every phase
    of a fit, and at the end.
    """

    save: Save = lambda model, verified, done: None
    on_message: Callable[[str], None] = lambda message: None
    fit: FitCallbacks = field(default_factory=FitCallbacks)


@dataclass(frozen=True)
class Column:
    """A network's figures, and its evaluation where there is data."""

    figures: NetworkFigures
    evaluation: Measured | None


@dataclass(frozen=True)
class RewriteResult:
    """columns: before and after; with a fit the source, unfitted and fitted. verified: for the model's history.

    changed: whether any stage is described otherwise than before. fit: None without one.
    """

    columns: tuple[Column, ...]
    verified: dict[str, Any]
    changed: bool
    fit: FitResult | None = None


def change_stages(model: OdeResNet, names: Sequence[str], change: Callable[[OdeStage], OdeStage]) -> None:
    """Replace stages by what `change` makes of them."""
    for name in names:
        model.replace_stage(name, change(model.stages[name]))


def rewrite(
    model: OdeResNet, change: Callable[[OdeResNet], None], measuring: Measuring, callbacks: RewriteCallbacks
) -> RewriteResult:
    """Change a model in place, and compare it with what it was on random images."""
    model.to(measuring.device)
    images = random_batch(model.info.preprocessing, RANDOM_IMAGES)
    reference = logits_of(model, images)
    before = _column("before", model, images, reference, measuring, callbacks)
    described = [stage.spec for stage in model.stages.values()]
    change(model)
    verified = _verified(model, images, reference)
    callbacks.save(model, verified, True)
    after = _column("after", model, images, reference, measuring, callbacks)
    return RewriteResult((before, after), verified, [stage.spec for stage in model.stages.values()] != described)


def rewrite_and_fit(
    model: OdeResNet,
    names: Sequence[str],
    change: Callable[[OdeStage], OdeStage],
    plan: FitPlan,
    measuring: Measuring,
    callbacks: RewriteCallbacks,
) -> RewriteResult:
    """Change stages in place, and fit the result to the network that they came from, on held-out images of the fit.

    An interrupted fit has no last column: its model is saved as it is. Nor has one that a signal met at its very end.
    """

    def ended(phase: PhaseResult, so_far: OdeResNet) -> None:
        callbacks.fit.on_phase(phase, so_far)
        callbacks.save(so_far, {}, False)

    device = measuring.device
    check_finite(model, "the model holds NaN or infinity in {}: nothing can be fitted from there")
    model.to(device)
    noise = random_batch(model.info.preprocessing, RANDOM_IMAGES)
    before = logits_of(model, noise)
    teacher = plan.teacher.net
    source = teacher if plan.own and isinstance(teacher, OdeResNet) else copy.deepcopy(model)
    _into_form(model, names, plan.form)
    unfitted = copy.deepcopy(model)
    change_stages(unfitted, names, change)  # refuses what cannot be before anything is computed
    images = plan.images()
    reference = plan.reference(images, device)
    columns = [_column("source", source, images, reference, replace(measuring, gradients=False), callbacks)]
    columns.append(_column("unfitted", unfitted, images, reference, replace(measuring, data=None), callbacks))
    if not plan.deepening:
        change_stages(model, names, change)
    for name in names:  # `change` may set it; a fit takes stages to their depths by itself
        model.stages[name].use_horizon(unfitted.stages[name].spec.horizon)
    del unfitted, source
    result = fit(
        model,
        plan.teacher,
        plan.data,
        settings=plan.settings,
        device=device,
        callbacks=replace(callbacks.fit, on_phase=ended),
        **plan.deepening,
    )
    with callbacks.fit.deferred():
        verified = _verified(model, noise, before)
        if result.phases or not result.interrupted:  # else nothing was fitted
            callbacks.save(model, verified, not result.interrupted)
    if not result.interrupted and not callbacks.fit.should_stop():
        columns.append(_column("fitted", model, images, reference, measuring, callbacks))
    return RewriteResult(tuple(columns), verified, True, result)


def _into_form(model: OdeResNet, names: Sequence[str], wanted: Form | None) -> None:
    for name in names:
        stage = model.stages[name]
        stage.use_form(wanted or ("pre" if stage.activation in ACTIVATIONS else stage.spec.form))


def _column(
    name: str,
    model: OdeResNet,
    images: Tensor,
    reference: Tensor,
    measuring: Measuring,
    callbacks: RewriteCallbacks,
) -> Column:
    model.to(measuring.device)
    evaluation = None
    if measuring.data is not None:
        data = measuring.data
        callbacks.on_message(f"{name}: evaluating on {len(data):,} images of {data.name}")
        evaluation = evaluate(
            model,
            batches(data, measuring.batch_size, workers=measuring.workers, device=measuring.device),
            device=measuring.device,
        )
        if skipped := data.skipped_note():
            callbacks.on_message(skipped)
    figures = network_figures(
        name,
        model,
        images,
        reference,
        evaluation=evaluation,
        gradients=measuring.gradients,
        on_method=lambda method: callbacks.on_message(f"{name}: gradients of {method}"),
    )
    return Column(figures, evaluation)


def _verified(model: OdeResNet, images: Tensor, before: Tensor) -> dict[str, Any]:
    after = logits_of(model, images)
    return compare_logits(before, after, batch="random images", kept=torch.equal(before, after)).record()
