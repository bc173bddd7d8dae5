"""The images of a fit: what is trained on, and what is held out of it."""

from __future__ import annotations

from dataclasses import dataclass

from ..data import ImageData
from ..errors import UsageError

FEWEST = 3  # images: one is held out, and statistics need two
CHECKED = 256  # images that are not trained on, on which a phase must have been of use


@dataclass(frozen=True)
class FitData:
    """The same images twice: as they are trained on, and without augmentation. Raises UsageError for hardly any."""

    train: ImageData
    plain: ImageData

    def __post_init__(self) -> None:
        count = len(self.plain)
        if count < FEWEST:
            raise UsageError(f"{self.plain.name} has {count} images for the fit; {FEWEST} are the fewest, many better")


def held_out(count: int) -> list[int]:
    """Which of so many images are not trained on: an eighth, but not too many, evenly spaced."""
    held = min(CHECKED, max(count // 8, 1))
    return [i * count // held for i in range(held)]
