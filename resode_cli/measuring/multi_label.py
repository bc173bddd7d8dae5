"""What a model of several labels an image is worth: mean average precision, F1 scores, and whole sets of labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from .class_figures import ClassFigures

THRESHOLD = 0.5  # of a probability, from which on a label is given


@dataclass(frozen=True)
class MultiLabelEvaluation:
    """map: mean over the classes of `average_precisions`. micro_f1: F1 of all labels of all images together.

    macro_f1: mean of the classes' own F1, of those that some image has or is given. exact_match: fraction of images
    whose labels are all right. Labels are given from a probability of 0.5 on. loss: mean binary cross-entropy;
    skipped: corrupt files left out; predictions: (N, K) bool.
    """

    MAIN: ClassVar[str] = "map"

    map: float
    micro_f1: float
    macro_f1: float
    exact_match: float
    loss: float
    images: int
    skipped: tuple[str, ...] = ()
    predictions: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.bool), repr=False)

    @property
    def figures(self) -> Mapping[str, float]:
        return {name: getattr(self, name) for name in ("map", "micro_f1", "macro_f1", "exact_match", "loss")}


@dataclass(frozen=True)
class LabelResults:
    """A row per image that could be read, in the order of the data, on the CPU.

    places: (N,), the image's place in the data. labels: (N, K) bool; probabilities: (N, K), of each label by itself;
    losses: (N,), binary cross-entropy.
    """

    places: Tensor
    labels: Tensor
    probabilities: Tensor
    losses: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def given(self) -> Tensor:
        """Which labels each image is given, (N, K) bool."""
        return self.probabilities >= THRESHOLD

    @cached_property
    def evaluation(self) -> MultiLabelEvaluation:
        return measure(self.probabilities, self.labels, self.losses.double().mean().item(), ())

    @cached_property
    def average_precisions(self) -> list[float | None]:
        """Of every class, in order; None of one that no image has."""
        return [None if p.isnan() else p.item() for p in average_precisions(self.probabilities, self.labels)]

    def mistakes(self, count: int) -> list[int]:
        """Where the images with a wrong label and the largest losses stand in these tensors, the largest first."""
        wrong = (self.given != self.labels).any(1).nonzero().flatten()
        return wrong[self.losses[wrong].argsort(descending=True, stable=True)][:count].tolist()

    def by_class(self) -> list[ClassFigures]:
        """Of every class, in order."""
        counts = (self.labels, self.given, self.labels & self.given)
        return [ClassFigures(*own) for own in zip(*(each.sum(0).tolist() for each in counts), strict=True)]


def measure(probabilities: Tensor, labels: Tensor, loss: float, skipped: tuple[str, ...]) -> MultiLabelEvaluation:
    """The figures of all images. probabilities: (N, K); labels: (N, K) bool; loss: their mean."""
    given = probabilities >= THRESHOLD
    precisions = average_precisions(probabilities, labels)
    known = precisions[~precisions.isnan()]
    f1 = f1_scores(given, labels)
    return MultiLabelEvaluation(
        known.mean().item() if len(known) else 0.0,
        f1_of_counts((given & labels).sum(), given.sum(), labels.sum()).item(),
        f1[~f1.isnan()].mean().item() if bool((~f1.isnan()).any()) else 0.0,
        (given == labels).all(1).double().mean().item(),
        loss,
        len(labels),
        skipped,
        given,
    )


def average_precisions(scores: Tensor, labels: Tensor) -> Tensor:
    """Σ (R_n − R_{n−1}) P_n of every class, (K,), over its thresholds from the highest score on; NaN without an image.

    P_n, R_n: precision and recall where every image from the n-th score on has the label; equal scores are one
    threshold. So scikit-learn's `average_precision_score` has it. scores, labels: (N, K).
    """
    found = torch.full((scores.shape[1],), torch.nan, dtype=torch.double)
    for k in range(scores.shape[1]):
        positive = labels[:, k].sum().double()
        if not positive:
            continue
        ranked, order = scores[:, k].sort(descending=True, stable=True)
        hits = labels[order, k].double().cumsum(0)
        last = torch.cat([ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool)])  # of its score
        hits, taken = hits[last], (torch.arange(len(ranked)) + 1)[last]
        gained = torch.diff(hits, prepend=hits.new_zeros(1))
        found[k] = (gained * hits / taken).sum() / positive
    return found


def f1_scores(given: Tensor, labels: Tensor) -> Tensor:
    """F1 of every class, (K,); NaN of one that no image has or is given. given, labels: (N, K) bool."""
    return f1_of_counts((given & labels).sum(0), given.sum(0), labels.sum(0), empty=torch.nan)


def f1_of_counts(right: Tensor, given: Tensor, own: Tensor, *, empty: float = 0.0) -> Tensor:
    """The harmonic mean of precision and recall. right: labels that are given and there; own: that are there."""
    both = (given + own).double()
    return torch.where(both > 0, 2 * right.double() / both, empty)
