"""The evaluations of a training run, and the best of its models."""

from __future__ import annotations

import math

import torch

from ..data import ImageData, batches
from ..errors import ResodeError
from ..measuring.evaluate import Evaluation, evaluate
from ..network.model import OdeResNet
from . import run_folder
from .loop import Loop
from .results import Progress
from .resuming import loaded_checksum
from .saves import Saves
from .settings import Settings


class Evaluations:
    """Measures a run's model on images that do not train it, and keeps the best. test: None where there are none.

    before: of the model as it began; after: the latest.
    """

    def __init__(
        self,
        model: OdeResNet,
        test: ImageData | None,
        settings: Settings,
        device: torch.device,
        progress: Progress,
        *,
        loop: Loop,
        saves: Saves,
        per_epoch: int,
    ) -> None:
        self.model, self.test, self.settings, self.device = model, test, settings, device
        self.progress, self.loop, self.saves, self.per_epoch = progress, loop, saves, per_epoch
        self.before: Evaluation | None = None
        self.after: Evaluation | None = None

    def begin(self) -> None:
        """Measure the model as it begins."""
        if self.test is not None:
            self.before = self._evaluate(self.test)
            self.saves.log.test(0, 0, self.before)

    def due(self) -> bool:
        """Whether the model of this step is to be measured, and was not yet."""
        step = self.progress.step
        end_of_epoch = step % self.per_epoch == 0 and (step // self.per_epoch) % self.settings.eval_every == 0
        due = step > 0 and (end_of_epoch or step == self.loop.total)
        return self.test is not None and due and self.progress.evaluated < step

    def choose_best(self) -> None:
        """Measure the model of this step, and save it where it is the best so far."""
        assert self.test is not None
        self.after = self._evaluate(self.test)
        with self.loop.undisturbed():
            step = self.progress.evaluated = self.progress.step
            self.saves.move_log()
            self.saves.log.test(step, (step - 1) // self.per_epoch + 1, self.after)
            if not math.isfinite(self.after.loss):
                raise ResodeError(
                    f"after step {step} the loss on the test images is {self.after.loss}{self.saves.advice()}"
                )
            if self.after.top1 > self.progress.best_top1:
                self.progress.best_top1 = self.after.top1
                self.saves.model_as(run_folder.BEST)
                self.progress.best_file = loaded_checksum(self.saves.lock.folder / run_folder.BEST)

    def _evaluate(self, test: ImageData) -> Evaluation:
        size, workers = max(self.settings.batch_size, 100), self.settings.workers
        data = batches(test, size, workers=workers, device=self.device)
        with self.saves.averaged():
            return evaluate(self.model, data, device=self.device)
