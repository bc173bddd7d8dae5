"""What a training run does to its model before the first step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..data import ImageData, batches
from ..errors import join
from ..gradients.results import ChosenAdjoints
from ..network.labels_loss import same_labels
from ..network.model import OdeResNet, autocast_dtype, check_finite, freeze_batch_norm
from ..network.stage import OdeStage
from ..surgery.batch_norm import batch_norms
from .bf16_weights import lower
from .dropping import use_random_layers
from .guard import Guard
from .settings import Settings
from .trained import freeze_norms_of_frozen_parts, train_only, with_stage_names

COMPARED = CALIBRATED = 32  # images


def choice_batch(train: ImageData, settings: Settings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Training images, evenly spaced: neighbours in a folder are of one class."""
    count = min(CALIBRATED, settings.images_per_batch, len(train))
    order = [i * len(train) // count for i in range(count)]
    return next(batches(train, count, order=order)).on(device)


def make_ready(
    model: OdeResNet, settings: Settings, train: ImageData, device: torch.device, say: Callable[[str], None]
) -> Settings:
    """Do to the model what a run does to it before its first plan. Returns the settings, with stages by name."""
    settings = with_stage_names(settings, model)
    check_finite(model, "the model holds NaN or infinity in {}: nothing can be trained from there")
    model.to(device)
    use_random_layers(model, settings)
    train_only(model, settings, say)
    torch.manual_seed(settings.seed)
    tell_of_shared_statistics(model, settings, say)
    switch_scheme(model, settings, train, device, say)
    if settings.channels_last:
        model.use_channels_last()
    if settings.weights_dtype is not None:
        lower(model)
    if settings.compile:
        model.compile_branches()
    return settings


def guard_at_start(
    model: OdeResNet,
    settings: Settings,
    train: ImageData,
    device: torch.device,
    *,
    beside: int,
    on_message: Callable[[str], None],
    on_choice: Callable[[ChosenAdjoints], None],
    of_free: float = 1.0,
) -> Guard:
    """The guard of a run that begins, which has set the adjoints; see `Guard`."""
    guard = Guard(
        model,
        settings,
        device,
        autocast=lambda: autocast_of(settings, device),
        prepare=lambda: prepare_to_train(model, settings),
        on_message=on_message,
        on_choice=on_choice,
        state=None,
        beside=beside,
        of_free=of_free,
    )
    guard.start(lambda: choice_batch(train, settings, device))
    return guard


def prepare_to_train(model: OdeResNet, settings: Settings) -> None:
    """Put the model in the mode that it trains in. BatchNorms of what is not trained stay in eval mode."""
    model.train()
    if settings.bn == "frozen":
        freeze_batch_norm(model)
    elif not all(parameter.requires_grad for parameter in model.parameters()):
        freeze_norms_of_frozen_parts(model)


def tell_of_shared_statistics(model: OdeResNet, settings: Settings, say: Callable[[str], None]) -> None:
    """Say which stages have one BatchNorm for all their steps, where its running statistics move in training.

    They become an average over the states of all steps, so that in eval mode no step normalises as it was trained to.
    """
    shared = [name for name, stage in model.stages.items() if stage.spec.kind == "tied" and _keeps_statistics(stage)]
    if settings.bn != "frozen" and shared:
        say(
            f"note: all steps of {join(shared)} share BatchNorms, whose running statistics average over their states;"
            " where steps are large, the network is another one in eval mode than the one that is trained"
            " (`resode tie --depth-weights tied+stats` gives every step its own, --bn frozen keeps those there are)"
        )


def tell_of_warmup(settings: Settings, total: int, say: Callable[[str], None]) -> None:
    """Say it where the warmup leaves no step to the schedule. total: steps of the run."""
    if settings.warmup >= total:
        say(
            f"note: --warmup {settings.warmup} lasts to the end of the run, at step {total}: the learning rate"
            f" never reaches --lr {settings.lr:g}"
        )


def _keeps_statistics(stage: OdeStage) -> bool:
    return any(True for block in stage.blocks for _ in batch_norms(block))


def autocast_of(settings: Settings, device: torch.device) -> AbstractContextManager[Any]:
    """The precision of the forward pass."""
    dtype = autocast_dtype(settings.precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def switch_scheme(
    model: OdeResNet, settings: Settings, data: ImageData, device: torch.device, say: Callable[[str], None]
) -> dict[str, float] | None:
    """Switch the forward rule of the stages whose method is tied to another, saying what that does and recording it.

    None where there is no need.
    """
    asked = settings.adjoint_choice().with_names(model)
    tied = {name: scheme for name in model.stages if (scheme := asked.of(name).required_scheme) is not None}
    others = {name: scheme for name, scheme in tied.items() if model.stages[name].spec.scheme != scheme}
    if not any(model.stages[name].spec.depth for name in others):
        return None
    images = next(batches(data, COMPARED)).images.to(device)
    model.eval()
    with torch.no_grad():
        before = model(images)
        for name, scheme in others.items():
            model.stages[name].use_scheme(scheme)
        after = model(images)
    switched = {
        "max_logit_difference": (before - after).abs().max().item(),
        "top1_agreement": same_labels(before, after, several=model.info.multi_label).double().mean().item(),
    }
    methods = list(dict.fromkeys(others.values()))  # a method that is tied to a rule has its name
    everywhere = len(tied) == len(model.stages) and len(set(tied.values())) == 1
    if everywhere:
        rule = f"the forward rule is now {methods[0]}"
    else:
        rule = "; ".join(
            f"the forward rule of {join([name for name in others if others[name] == method])} is now {method}"
            for method in methods
        )
    say(
        f"adjoint {join(methods)}: {rule}; on {len(images)} images the logits changed by up to"
        f" {switched['max_logit_difference']:.3g}, and {switched['top1_agreement']:.1%} of the predictions stayed"
    )
    model.record("switch-scheme", **({"scheme": methods[0]} if everywhere else {"stages": others}), **switched)
    return switched
