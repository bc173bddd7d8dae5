"""How many images a step of a training run has, and how many steps the run."""

from __future__ import annotations

from ..errors import UsageError

AUTO = "auto"  # as a batch size, or as a number of batches: found before the run begins, and recorded as a number


class Lengths:
    """What follows from the settings of these names.

    Raises UsageError where `batch_size` or `accumulate` is still 'auto': see `batching`.
    """

    batch_size: int | str
    accumulate: int | str
    epochs: int | None
    max_steps: int | None

    @property
    def sizes_batches(self) -> bool:
        """Whether the batches of a step are to be made to fit into memory."""
        return AUTO in (self.batch_size, self.accumulate)

    @property
    def images_per_batch(self) -> int:
        return _known("--batch-size", self.batch_size)

    @property
    def batches_per_step(self) -> int:
        return _known("--accumulate", self.accumulate)

    @property
    def step_images(self) -> int:
        """Images per step of the optimizer."""
        return self.images_per_batch * self.batches_per_step

    def batches_of(self, images: int) -> int:
        """Batches that the images of a step are split in: fewer than `accumulate` where there are few images."""
        return min(self.batches_per_step, max(-(-images // self.images_per_batch), 1))

    def per_epoch(self, images: int) -> int:
        """Steps per epoch: full ones only, but one at least."""
        return max(images // self.step_images, 1)

    def steps(self, images: int) -> int:
        """Steps of the whole run on a training split of so many images."""
        if self.epochs is None:
            return self.max_steps or self.per_epoch(images)
        total = self.per_epoch(images) * self.epochs
        return min(total, self.max_steps or total)


def _known(flag: str, value: int | str) -> int:
    if isinstance(value, str):
        raise UsageError(f"{flag} {value} is not a number yet: `batching.decided` finds it before a run begins")
    return value
