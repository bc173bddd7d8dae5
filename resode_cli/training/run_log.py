"""log.csv of a training run: what it says of its steps and evaluations, and how that is found again."""

from __future__ import annotations

import csv
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import ResodeWarning
from ..machine.atomic import atomic_path, clear_errors
from ..measuring.evaluate import Measured

LOG = "log.csv"
# What the log has in place of top1 where images have several labels: of evaluations, and last of training steps.
LABEL_ACCURACY = "label_accuracy"
OF_SEVERAL = ("map", "micro_f1", "macro_f1", "exact_match", LABEL_ACCURACY)
Figures = dict[str, dict[str, float | None]]  # by figure and stage


@dataclass(frozen=True)
class StepRecord:
    """One training step, for a progress display. Loss and accuracy are of this batch; accuracy_of: its column's name.

    monitor: drift, correction and contraction of every stage, None where there is none.
    """

    step: int
    total: int
    epoch: int
    loss: float
    accuracy: float
    lr: float
    images_per_second: float
    peak_bytes: int
    monitor: Figures
    accuracy_of: str = "top1"

    @property
    def columns(self) -> dict[str, float]:
        """What the log tells of steps together."""
        figures = {
            f"{figure}_{name}": v
            for figure, values in self.monitor.items()
            for name, v in values.items()
            if v is not None
        }
        return {"loss": self.loss, self.accuracy_of: self.accuracy, **figures}


def is_whole(row: dict[str, str | None]) -> bool:
    """Whether a row of a log is one: a killed run may have left half of one."""
    step = row.get("step")
    return step is not None and step.isdigit() and None not in row.values() and row["split"] in ("train", "test")


def _rows(path: Path, up_to: Mapping[str, int]) -> list[dict[str, Any]]:
    """The rows of a log up to a step, by their split. A log that cannot be read is set aside: it is not worth a run."""
    try:
        with path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if is_whole(row) and int(row["step"]) <= up_to[row["split"]]]
    except (ValueError, KeyError, csv.Error) as error:
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        reason = str(error).splitlines()[0][:100]
        warnings.warn(f"{path} cannot be read ({reason}); it is {aside.name} now", ResodeWarning, stacklevel=2)
        return []


_HELD_BACK = re.compile(rf"\.{re.escape(LOG)}\.[0-9a-f]{{8}}")


def log_path(folder: Path, run: str | None, *, replacing: bool) -> Path:
    """Where a run writes its log; beside the one of the run that it replaces until its first save stands.

    A run that was killed between that save and the renaming finds its own log here. run: tells it from other runs.
    """
    own = folder / f".{LOG}.{run}"
    for other in folder.glob(f".{LOG}.*"):
        if other != own and _HELD_BACK.fullmatch(other.name):  # of a run that was killed before it saved anything
            other.unlink(missing_ok=True)
    if replacing:
        return own
    if own.is_file():
        own.replace(folder / LOG)
    return folder / LOG


class Log:
    """log.csv: a row of means over the last steps, and a row per evaluation.

    Columns: split, step, epoch, loss, top1 (of several labels an image: those of `OF_SEVERAL`), lr, images_per_second,
    peak_bytes and the largest drift, correction and contraction of each stage since the last row (see `ode.Monitor`).
    Fractions, bytes, seconds; empty where there is nothing to say.
    """

    def __init__(
        self,
        path: Path,
        stages: Sequence[str],
        *,
        keep_up_to: int,
        evaluated_up_to: int | None = None,
        on_row: Callable[[dict[str, Any]], None] = lambda row: None,
        multi_label: bool = False,
    ) -> None:
        """keep_up_to: of an existing log, keep the rows up to this step; 0 starts a new one. on_row: hears of each.

        evaluated_up_to: the same for rows of evaluations, of which that of the very step may be still to come.
        """
        self.path, self.on_row = path, on_row
        accuracies = OF_SEVERAL if multi_label else ("top1",)
        self.fields = ["split", "step", "epoch", "loss", *accuracies, "lr", "images_per_second", "peak_bytes"]
        self.figures = [f"{figure}_{name}" for figure in ("drift", "correction", "contraction") for name in stages]
        self.fields += self.figures
        evaluated = keep_up_to if evaluated_up_to is None else evaluated_up_to
        up_to = {"train": keep_up_to, "test": evaluated}
        rows = _rows(path, up_to) if keep_up_to and path.is_file() else []
        with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.fields, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def _write(self, row: dict[str, Any]) -> None:
        with clear_errors(self.path, None), self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.fields)
            if not file.tell():  # the folder was made anew
                writer.writeheader()
            writer.writerow(row)
        self.on_row(row)

    def train(self, record: StepRecord, window: Sequence[Mapping[str, float]]) -> None:
        """window: the `columns` of the steps since the last row."""
        row: dict[str, Any] = {
            "split": "train",
            "step": record.step,
            "epoch": record.epoch,
            **{name: fmean(step[name] for step in window) for name in ("loss", record.accuracy_of)},
            "lr": record.lr,
            "images_per_second": round(record.images_per_second, 1),
            "peak_bytes": record.peak_bytes,
        }
        for name in self.figures:
            if values := [step[name] for step in window if name in step]:
                row[name] = max(values)
        self._write(row)

    def test(self, step: int, epoch: int, evaluation: Measured) -> None:
        figures = {name: value for name, value in evaluation.figures.items() if name in self.fields}
        self._write({"split": "test", "step": step, "epoch": epoch, **figures})


class NoLog(Log):
    """Of a process beside the one that writes the log."""

    def __init__(self) -> None:
        self.path, self.fields, self.on_row = Path(os.devnull), [], lambda row: None

    def _write(self, row: dict[str, Any]) -> None:
        pass

    def train(self, record: StepRecord, window: Sequence[Mapping[str, float]]) -> None:
        pass
