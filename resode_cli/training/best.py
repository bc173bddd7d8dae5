"""The evaluations of a training run, and the best of its models."""

from __future__ import annotations

import math
import shutil
from typing import Any

import torch

from ..data import ImageData, batches
from ..errors import ResodeError, UsageError
from ..machine.atomic import atomic_path
from ..measuring.evaluate import Measured, evaluate
from ..network.model import OdeResNet
from ..quantities import counted
from . import run_folder
from .contradictions import PLATEAU, refuse_of_other_labels
from .lengths import AUTO
from .loop import Loop
from .results import Progress
from .saves import Saves
from .settings import Settings

TOP = 5  # of --best-by top5


def check_tells_apart(model: OdeResNet, settings: Settings) -> None:
    """Raises UsageError for a figure that is the same for every model, or is not of such labels, and other settings."""
    refuse_of_other_labels(settings, multi_label=model.info.multi_label)
    classes = model.info.num_classes
    if settings.best_by == "top5" and classes <= TOP:
        raise UsageError(f"--best-by top5: the five likeliest of {classes} classes are all of them, for every model")


def check_evaluations(settings: Settings, per_epoch: int | None, total: int) -> list[str]:
    """What to say of settings that wait for more evaluations than a run has.

    per_epoch: steps of an epoch; None where nothing is evaluated. total: steps of the run.
    Raises UsageError for settings that wait in vain altogether.
    """
    patience, waits = settings.patience, settings.plateau_evaluations
    plateau = settings.schedule == PLATEAU
    if per_epoch is None:
        asked = {
            "--patience": patience is not None,
            "--keep-best": settings.keep_best > 1,
            "--schedule plateau": plateau,
        }
        if names := [name for name, given in asked.items() if given]:
            raise UsageError(f"{names[0]} waits for evaluations, and there are no test images")
        return []
    every = per_epoch * settings.eval_every
    before_end = (total - 1) // every
    of_run = f"the run has {counted(before_end, 'evaluation')} before its end"
    if plateau and not before_end:
        raise UsageError(
            f"--schedule plateau goes by evaluations, and {counted(total, 'step')} with one every {every} have none"
            " before the end: ask for more --epochs or --max-steps, or choose another schedule"
        )
    said = []
    if plateau and before_end <= waits:
        said.append(f"note: --plateau-evaluations {waits} never lowers the rate: they follow a first one, and {of_run}")
    if patience is not None and before_end < patience:
        said.append(f"note: --patience {patience} ends nothing, as {of_run}")
    return said


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
        self.before: Measured | None = None
        self.after: Measured | None = None

    def begin(self) -> None:
        """Measure the model as it begins: the first of those among which the best is chosen."""
        if self.test is None:
            return
        self.before = self._evaluate(self.test)
        self.saves.log.test(0, 0, self.before)
        if math.isfinite(self.before.loss):
            with self.loop.undisturbed():
                self.progress.best_file = self.saves.first_model(self._measured(self.before))
                self._note_best(self.before, self._score(self.before))
                self.progress.kept = [[0, self._score(self.before)]]

    def go_on(self) -> None:
        """Of the models that were kept, know those that are still there."""
        folder, progress = self.saves.lock.folder, self.progress
        there = {*run_folder.runners_up(folder), run_folder.runner_up(progress.best_step)}
        progress.kept = [[int(n), score] for n, score in progress.kept if run_folder.runner_up(int(n)) in there]

    def waited_enough(self) -> bool:
        """Whether so many evaluations in a row were no better as end the run."""
        return self.settings.patience is not None and self.progress.waited >= self.settings.patience

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
                failure = f"after step {step} the loss on the test images is {self.after.loss}{self.saves.advice()}"
                raise self.loop.processes.alike(ResodeError(failure))
            score = self._score(self.after)
            if (
                self.loop.plateau is not None
                and (falls := self.loop.plateau.see(score, step))
                and step < self.loop.total
            ):
                self.saves.callbacks.on_message(falls)
            if self.progress.best_score is None or score > self.progress.best_score:
                self._keep_the_one_before()
                self._note_best(self.after, score)
                self.progress.best_file = self.saves.best_model(self._measured(self.after))
                self.progress.waited = 0
            else:
                self.progress.waited += 1
            self._keep_among_the_best(step, score)

    def _measured(self, found: Measured) -> dict[str, Any]:
        """An evaluation, for a model's history."""
        assert self.test is not None
        return {"split": self.test.split, **found.figures, "images": found.images}

    def _score(self, found: Measured) -> float:
        """Larger is better."""
        by = found.MAIN if self.settings.best_by == AUTO else self.settings.best_by
        return -found.loss if by == "loss" else found.figures[by]

    def _note_best(self, found: Measured, score: float) -> None:
        self.progress.best_score, self.progress.best_top1 = score, found.figures[found.MAIN]
        self.progress.best_step = self.progress.step

    def _keep_the_one_before(self) -> None:
        """The best so far is to become one of the best: a copy of it, so that at no moment there is no best."""
        best = self.saves.lock.ensure() / run_folder.BEST
        own = not self.saves.nothing_of and self.progress.best_file is not None
        if self.saves.writes and self.settings.keep_best > 1 and own and best.is_file():
            with atomic_path(best.with_name(run_folder.runner_up(self.progress.best_step))) as temporary:
                shutil.copyfile(best, temporary)

    def _keep_among_the_best(self, step: int, score: float) -> None:
        """Save the model of this step where it is among the best, and remove those that are no more."""
        progress, most = self.progress, self.settings.keep_best
        ranked = sorted([*progress.kept, [step, score]], key=lambda entry: -entry[1])[:most]
        if most > 1 and [step, score] in ranked and step != progress.best_step:
            assert self.after is not None
            self.saves.model_as(run_folder.runner_up(step), measured=self._measured(self.after))
        progress.kept = ranked
        folder = self.saves.lock.folder
        kept = {run_folder.runner_up(int(n)) for n, _ in ranked if n != progress.best_step}
        if self.saves.writes and not self.saves.nothing_of:
            for name in run_folder.runners_up(folder):
                if name not in kept:
                    (folder / name).unlink(missing_ok=True)

    def _evaluate(self, test: ImageData) -> Measured:
        size, workers = max(self.settings.images_per_batch, 100), self.settings.workers
        data = batches(test, size, workers=workers, device=self.device, processes=self.loop.processes)
        with self.saves.averaged():
            return evaluate(
                self.model,
                data,
                device=self.device,
                processes=self.loop.processes,
                should_stop=self.loop.should_stop,
            )
