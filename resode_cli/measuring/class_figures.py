"""How well images of one class are told, or images that have one label."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClassFigures:
    """images: of the class; predicted: that were taken for it; right: both. Fractions are None where there is none."""

    images: int
    predicted: int
    right: int

    @property
    def precision(self) -> float | None:
        """Of what is taken for the class, the share that is of it."""
        return self.right / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        """Of the class, the share that is taken for it."""
        return self.right / self.images if self.images else None

    @property
    def f1(self) -> float | None:
        """The harmonic mean of precision and recall."""
        return 2 * self.right / (self.images + self.predicted) if self.images + self.predicted else None
