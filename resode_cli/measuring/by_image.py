"""What a model makes of each image of a data set, and what follows for classes: which are taken for which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Batch, ImageData, batches
from ..errors import ResodeError
from ..network.repeat import in_eval_mode
from .class_figures import ClassFigures
from .multi_label import LabelResults


@dataclass(frozen=True)
class ImageResults:
    """A figure per image that could be read, in the order of the data: (N,) each, on the CPU, 25 bytes an image.

    classes: how many there are. places: the image's place in the data. labels, predictions: classes.
    probabilities: of the predicted class. losses: cross-entropy. top5: whether the label is among the five likeliest.
    """

    classes: int
    places: Tensor
    labels: Tensor
    predictions: Tensor
    probabilities: Tensor
    losses: Tensor
    top5: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def top1(self) -> float:
        return (self.labels == self.predictions).double().mean().item()

    @cached_property
    def pairs(self) -> dict[tuple[int, int], int]:
        """How many images of a class are taken for a class, by (class, prediction), where there are any."""
        numbers, counts = torch.unique(self.labels.long() * self.classes + self.predictions.long(), return_counts=True)
        found = zip(numbers.tolist(), counts.tolist(), strict=True)
        return {divmod(number, self.classes): count for number, count in found}

    def mistakes(self, count: int) -> list[int]:
        """Where the wrong predictions with the largest losses stand in these tensors, the largest first."""
        wrong = (self.labels != self.predictions).nonzero().flatten()
        return wrong[self.losses[wrong].argsort(descending=True, stable=True)][:count].tolist()

    def confused(self, count: int) -> list[tuple[int, int, int]]:
        """The commonest mistakes: class, prediction, images."""
        wrong = [(label, guess, images) for (label, guess), images in self.pairs.items() if label != guess]
        return sorted(wrong, key=lambda pair: (-pair[2], pair[:2]))[:count]

    def by_class(self) -> list[ClassFigures]:
        """Of every class, in order."""
        right = torch.bincount(self.labels[self.labels == self.predictions], minlength=self.classes).tolist()
        own = torch.bincount(self.labels, minlength=self.classes).tolist()
        named = torch.bincount(self.predictions, minlength=self.classes).tolist()
        return [ClassFigures(*counts) for counts in zip(own, named, right, strict=True)]


def evaluate_images(
    model: nn.Module,
    data: ImageData,
    *,
    batch_size: int,
    workers: int | str = 0,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] = lambda images: None,
) -> ImageResults | LabelResults:
    """Every image's prediction, in eval mode; of images with several labels, `LabelResults`.

    Raises ResodeError where no image could be read.
    """
    found: list[tuple[Tensor, ...]] = []
    done = classes = 0
    with in_eval_mode(model), torch.no_grad():
        for number, batch in enumerate(batches(data, batch_size, workers=workers)):
            if len(batch.labels):
                logits = model(batch.images.to(device)).float()
                classes = logits.shape[1]
                found.append((_places(data, batch, number * batch_size, batch_size), *_figures(logits, batch.labels)))
                done += len(batch.labels)
                on_batch(done)
    if not found:
        raise ResodeError("no image could be read")
    if data.multi_label:
        return LabelResults(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    return ImageResults(classes, *(torch.cat(parts) for parts in zip(*found, strict=True)))


def _figures(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Label, prediction, its probability, loss and whether the label is among five, of each image.

    Of images with several labels: these, the probabilities of all, and the loss.
    """
    labels = labels.to(logits.device)
    if labels.ndim == 2:
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
        return [t.cpu() for t in (labels.bool(), logits.sigmoid(), losses)]
    likeliest = logits.topk(min(5, logits.shape[1]), dim=1).indices
    probabilities = logits.softmax(1).gather(1, likeliest[:, :1]).flatten()
    losses = F.cross_entropy(logits, labels, reduction="none")
    among = (likeliest == labels[:, None]).any(1)
    return [t.cpu() for t in (labels.int(), likeliest[:, 0].int(), probabilities, losses, among)]


def _places(data: ImageData, batch: Batch, first: int, size: int) -> Tensor:
    """Where a batch's images stand in the data: those of its place in it, but for what could not be read."""
    places = range(first, min(first + size, len(data)))
    return torch.tensor([i for i in places if not batch.skipped or data.file_of(i) not in batch.skipped])
