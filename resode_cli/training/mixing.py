"""Mixed images: a training batch whose images, and whose labels, are blends of two of its own (timm's Mixup)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from .settings import Settings


class Mixing:
    """Mixes a batch by mixup or CutMix, each with its image from the other end of the batch.

    Draws follow from (seed, step), so that a resumed run mixes as the uninterrupted one. Of an odd number of images
    the last one stays as it is.
    """

    def __init__(self, settings: Settings, classes: int) -> None:
        self.settings, self.classes = settings, classes
        self.mixup = Mixup(
            mixup_alpha=settings.mixup,
            cutmix_alpha=settings.cutmix,
            prob=settings.mixup_prob,
            label_smoothing=settings.label_smoothing,
            num_classes=classes,
        )

    def __call__(self, images: Tensor, labels: Tensor, *, step: int) -> tuple[Tensor, Tensor]:
        """The images, some of them mixed, and each one's probabilities of the classes (B, K)."""
        even = len(labels) - len(labels) % 2
        if not even:
            return images, self._targets(labels)
        with _numpy_seeded(self.settings.seed, step):
            mixed, targets = self.mixup(images[:even].clone(), labels[:even])
        return torch.cat([mixed, images[even:]]), torch.cat([targets, self._targets(labels[even:])])

    def _targets(self, labels: Tensor) -> Tensor:
        targets: Tensor = mixup_target(labels, self.classes, smoothing=self.settings.label_smoothing)
        return targets


def mixing_of(settings: Settings, classes: int) -> Mixing | None:
    """None where the settings mix nothing."""
    return Mixing(settings, classes) if settings.mixup or settings.cutmix else None


@contextmanager
def _numpy_seeded(seed: int, step: int) -> Iterator[None]:
    """numpy's generator, from which timm draws, as (seed, step) has it; put back afterwards."""
    before = np.random.get_state()
    np.random.seed(np.random.SeedSequence((seed % 2**64, step)).generate_state(4))
    try:
        yield
    finally:
        np.random.set_state(before)
