"""Accuracy and loss of a model on a data set."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Batch
from ..errors import ResodeError
from ..machine.processes import ALONE, Processes
from ..machine.signals import Stopped
from ..network.repeat import in_eval_mode


@dataclass(frozen=True)
class Evaluation:
    """top1, top5: fractions of images; loss: mean cross-entropy; skipped: corrupt files left out."""

    top1: float
    top5: float
    loss: float
    images: int
    skipped: tuple[str, ...] = ()
    predictions: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)

    def agreement(self, other: Evaluation) -> float:
        """Fraction of images on which both predict the same class."""
        return (self.predictions == other.predictions).double().mean().item()


def evaluate(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] = lambda images: None,
    processes: Processes = ALONE,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Top-1, top-5 and cross-entropy in eval mode; each module's own mode is put back.

    With fewer than five classes top-5 counts them all. processes: data are this one's part of every batch, and all of
    them find what one would find on the whole. should_stop: asked where there are several, which stop together.

    Raises ResodeError where no image could be read, Stopped where any process is to stop.
    """
    top1 = top5 = images = 0
    loss = 0.0
    predictions: list[Tensor] = []
    skipped: list[str] = []
    with in_eval_mode(model), torch.no_grad():
        for batch in data:
            gone, logits, labels = _of_whole_batch(model, batch, device, processes, should_stop)
            skipped += gone
            if len(labels) == 0:
                continue
            # timm.utils.accuracy gives percentages of a batch; the predictions are wanted too.
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices
            hits = best == labels[:, None]
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.sum())
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            images += len(labels)
            predictions.append(best[:, 0].cpu())
            on_batch(images)
    if images == 0:
        raise ResodeError("no image could be read")
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
