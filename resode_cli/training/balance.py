"""Classes with few images: a weight for each class in the loss, or an order in which each is drawn equally often."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import ImageData
from ..data.images import shown
from ..quantities import counted, number
from .contradictions import BALANCED
from .settings import Settings


def class_weights(data: ImageData, settings: Settings, say: Callable[[str], None]) -> Tensor | None:
    """w_k = n / (K n_k) (scikit-learn's 'balanced'), of which the mean over the n images is 1; None without weights.

    n_k: images of class k; K: classes that have any. A class without images has weight 0. Of images with several
    labels it is (n − n_k) / n_k, the weight of a label that is there against one that is not. say: hears of the
    extremes.
    """
    if settings.class_weights != BALANCED:
        return None
    counts = torch.tensor(data.label_counts(), dtype=torch.double)
    there = counts > 0
    own = (len(data) - counts) / counts if data.multi_label else len(data) / (there.sum() * counts)
    weights = torch.where(there, own, 0.0).float()
    ranked = counts.argsort(descending=True, stable=True)[: int(there.sum())].tolist()
    often, seldom = (
        f"{number(weights[label].item())} ({shown(data.class_names[label])}, {counted(int(counts[label]), 'image')})"
        for label in (ranked[0], ranked[-1])
    )
    say(f"class weights from {often} to {seldom}")
    return weights


def balanced_labels(data: ImageData, settings: Settings) -> list[int] | None:
    """The labels by which `balanced_order` draws; None where images are shuffled as they are."""
    return data.image_labels() if settings.sampler == BALANCED else None


def balanced_order(chosen: Sequence[int], labels: Sequence[int], generator: torch.Generator) -> list[int]:
    """As many images as are chosen, each class as often as any other, to within one; in random order.

    labels: of all images. Of a class, no image comes again before each has come. Classes that have one more are drawn.
    """
    of_class: dict[int, list[int]] = {}
    for i in chosen:
        of_class.setdefault(labels[i], []).append(i)
    each, more = divmod(len(chosen), max(len(of_class), 1))
    with_one_more = set(torch.randperm(len(of_class), generator=generator)[:more].tolist())
    drawn: list[int] = []
    for place, label in enumerate(sorted(of_class)):
        members, count = of_class[label], each + (place in with_one_more)
        mine: list[int] = []
        while len(mine) < count:
            mine += [members[j] for j in torch.randperm(len(members), generator=generator).tolist()]
        drawn += mine[:count]
    return [drawn[j] for j in torch.randperm(len(drawn), generator=generator).tolist()]


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None, *, smoothing: float = 0.0) -> Tensor:
    """The mean of w CE(z, y) over a batch, to which its parts add up, as torch's weighted mean's do not.

    labels: classes (B,), whose weights w are theirs, or probabilities of them (B, K), whose w is their mean weight.
    """
    if weights is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    losses = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    own = weights.to(losses)
    return (losses * (own[labels] if labels.ndim == 1 else labels.to(own.dtype) @ own)).mean()
