"""What a training run does to its model before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..data import ImageData, batches
from ..network.model import OdeResNet, autocast_dtype, freeze_batch_norm
from .settings import Settings

COMPARED = CALIBRATED = 32  # images


def choice_batch(train: ImageData, settings: Settings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Training images, evenly spaced: neighbours in a folder are of one class."""
    count = min(CALIBRATED, settings.batch_size, len(train))
    order = [i * len(train) // count for i in range(count)]
    batch = next(batches(train, count, order=order))
    return batch.images.to(device), batch.labels.to(device)


def train_only(model: OdeResNet, stages: Sequence[str] | None) -> None:
    """Freeze all parameters but those of some stages; of none for None."""
    if stages is None:
        return
    chosen = model.pick(stages)
    model.requires_grad_(False)
    for stage in chosen.values():
        stage.requires_grad_(True)


def prepare_to_train(model: OdeResNet, settings: Settings) -> None:
    """Put the model in the mode that it trains in."""
    model.train()
    if settings.bn == "frozen":
        freeze_batch_norm(model)


def autocast_of(settings: Settings, device: torch.device) -> AbstractContextManager[Any]:
    """The precision of the forward pass."""
    dtype = autocast_dtype(settings.amp)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def switch_scheme(
    model: OdeResNet, settings: Settings, data: ImageData, device: torch.device, say: Callable[[str], None]
) -> dict[str, float] | None:
    """Switch the forward rule where the method is tied to one, saying what that does; None where there is no need."""
    adjoint = settings.adjoint_choice()
    scheme = adjoint.required_scheme
    stages = [stage for stage in model.stages.values() if stage.spec.depth]
    if scheme is None or all(stage.spec.scheme == scheme for stage in stages):
        return None
    images = next(batches(data, COMPARED)).images.to(device)
    model.eval()
    with torch.no_grad():
        before = model(images)
        model.use_scheme(scheme)
        after = model(images)
    switched = {
        "max_logit_difference": (before - after).abs().max().item(),
        "top1_agreement": (before.argmax(1) == after.argmax(1)).double().mean().item(),
    }
    say(
        f"adjoint {adjoint.name}: the forward rule is now {scheme}; on {len(images)} images the logits changed by up to"
        f" {switched['max_logit_difference']:.3g}, and {switched['top1_agreement']:.1%} of the predictions stayed"
    )
    return switched
