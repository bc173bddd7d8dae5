"""Accuracy and loss of a model on a data set."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Batch, ending
from ..errors import ResodeError
from ..machine.processes import ALONE, Processes
from ..machine.signals import Stopped
from ..network.labels_loss import labels_loss
from ..network.repeat import in_eval_mode
from .multi_label import MultiLabelEvaluation, measure


@dataclass(frozen=True)
class Evaluation:
    """top1, top5: fractions of images; loss: mean cross-entropy; skipped: corrupt files left out; predictions: (N,)."""

    MAIN: ClassVar[str] = "top1"  # the figure by which models are compared where nothing is said

    top1: float
    top5: float
    loss: float
    images: int
    skipped: tuple[str, ...] = ()
    predictions: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)

    @property
    def figures(self) -> Mapping[str, float]:
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss}


Measured = Evaluation | MultiLabelEvaluation


def agreement(one: Measured, other: Measured) -> float:
    """Fraction of images for which both predict the same class, or the same set of labels."""
    same = one.predictions == other.predictions
    return (same if same.ndim == 1 else same.all(1)).double().mean().item()


def evaluate(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] = lambda images: None,
    processes: Processes = ALONE,
    should_stop: Callable[[], bool] = lambda: False,
) -> Measured:
    """Top-1, top-5 and cross-entropy in eval mode; each module's own mode is put back.

    With fewer than five classes top-5 counts them all. Of images with several labels: a `MultiLabelEvaluation`.
    processes: data are this one's part of every batch, and all of them find what one would find on the whole.
    should_stop: asked where there are several, which stop together.

    Raises ResodeError where no image could be read, Stopped where any process is to stop.
    """
    top1 = top5 = images = 0
    loss = 0.0
    predictions: list[Tensor] = []
    probabilities: list[Tensor] = []  # of each label, where images have several
    sets: list[Tensor] = []
    skipped: list[str] = []
    with in_eval_mode(model), torch.no_grad(), ending(data):
        for batch in data:
            gone, logits, labels = _of_whole_batch(model, batch, device, processes, should_stop)
            skipped += gone
            if len(labels) == 0:
                continue
            images += len(labels)
            if labels.ndim == 2:
                loss += labels_loss(logits, labels).item() * len(labels)
                probabilities.append(logits.sigmoid().cpu())
                sets.append(labels.bool().cpu())
                on_batch(images)
                continue
            # timm.utils.accuracy gives percentages of a batch; the predictions are wanted too.
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices
            hits = best == labels[:, None]
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.sum())
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            predictions.append(best[:, 0].cpu())
            on_batch(images)
    if images == 0:
        raise ResodeError("no image could be read")
    if sets:
        return measure(torch.cat(probabilities), torch.cat(sets), loss / images, tuple(skipped))
    return Evaluation(top1 / images, top5 / images, loss / images, images, tuple(skipped), torch.cat(predictions))


def _of_whole_batch(
    model: nn.Module,
    batch: Batch,
    device: torch.device | str,
    processes: Processes,
    should_stop: Callable[[], bool],
) -> tuple[list[str], Tensor, Tensor]:
    """What is skipped of a batch, the logits of the rest in float32, and its labels; of the parts of all processes."""
    x, labels = batch.on(device)
    logits = model(x).float() if len(labels) else torch.empty(0)
    if processes.alone:
        return list(batch.skipped), logits, labels
    parts = processes.exchanged((list(batch.skipped), logits.cpu(), labels.cpu(), should_stop()))
    if any(stopped for *_, stopped in parts):
        raise Stopped(signal.SIGINT)
    full = [part for part in parts if len(part[2])] or parts[:1]
    return (
        [name for skipped, *_ in parts for name in skipped],
        torch.cat([logits for _, logits, *_ in full]),
        torch.cat([labels for _, _, labels, _ in full]),
    )
