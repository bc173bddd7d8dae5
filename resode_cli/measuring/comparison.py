"""Compare a rewritten network with its reference: size, cost, distance of logits, and how well it runs backwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..gradients.check_grad import check_gradients
from ..network.labels_loss import same_labels
from ..network.model import OdeResNet
from ..ode import SCHEMES, Adjoint
from .evaluate import Evaluation, Measured

GRADIENT_METHODS = (Adjoint("multistep"), Adjoint("pc"), Adjoint("pc", corrections=1), Adjoint("euler"))
GRADIENT_IMAGES = 32


@dataclass(frozen=True)
class NetworkFigures:
    """agreement: fraction of images with the reference's class, or set of labels. logit_distance: mean of
    ‖z − z'‖ / ‖z'‖ over images.

    evaluations: residual branches evaluated per image. gradient_errors: relative errors by method and stage, without
    anchors; empty if not asked for, infinite where a gradient is not finite.
    """

    name: str
    top1: float | None
    agreement: float
    logit_distance: float
    images: int
    parameters: int
    steps: dict[str, int]
    evaluations: int
    gradient_errors: dict[str, dict[str, float]]


def network_figures(
    name: str,
    model: OdeResNet,
    images: Tensor,
    reference: Tensor,
    *,
    evaluation: Measured | None = None,
    gradients: bool = False,
    on_method: Callable[[str], None] = lambda name: None,
) -> NetworkFigures:
    """Measure `model` on images (B, 3, H, W) against reference logits (B, K), whose predictions serve as labels."""
    logits = logits_of(model, images)
    distance = (logits - reference).norm(dim=1) / reference.norm(dim=1).clamp_min(1e-12)
    stages = {name: stage for name, stage in model.stages.items() if stage.spec.depth}
    errors: dict[str, dict[str, float]] = {}
    if gradients and stages:
        few = images[:GRADIENT_IMAGES].to(next(model.parameters()).device)
        known = reference[:GRADIENT_IMAGES].to(few.device)
        labels = (known >= 0).float() if model.info.multi_label else known.argmax(1)
        report = check_gradients(model, few, labels, methods=GRADIENT_METHODS, on_method=on_method)
        for method in report.methods:
            found = {row.stage: row.relative_error for row in method.stages if row.stage in stages}
            errors[method.name] = {stage: e if math.isfinite(e) else math.inf for stage, e in found.items()}
    return NetworkFigures(
        name,
        evaluation.top1 if isinstance(evaluation, Evaluation) else None,
        same_labels(logits, reference, several=model.info.multi_label).double().mean().item(),
        distance.mean().item(),
        len(images),
        sum(p.numel() for p in model.parameters()),
        {name: stage.spec.depth for name, stage in stages.items()},
        sum(stage.spec.depth * SCHEMES[stage.spec.scheme].evaluations for stage in stages.values()),
        errors,
    )


def logits_of(model: torch.nn.Module, images: Tensor, batch_size: int = 64) -> Tensor:
    """In eval mode, on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part.to(device)).float().cpu() for part in torch.split(images, batch_size)])


def spread(images: Sequence[int], count: int) -> list[int]:
    """`count` of the images at most, evenly spaced."""
    n = min(count, len(images))
    return [images[i * len(images) // n] for i in range(n)]
