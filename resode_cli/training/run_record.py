"""What a run's folder says of the run, read without changing anything there: finished, stopped, or in progress."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import ResodeError, UsageError
from ..files import model_file
from ..files.model_schema import parse_metadata
from ..machine.locks import is_written_to
from ..network.model import ModelInfo
from ..ode import Adjoint
from .run_folder import BEST, CONFIG, LAST, STATE, is_own, run_metadata
from .run_log import LOG, is_whole
from .settings import Settings

TRAIN, TEST = "train", "test"
Row = dict[str, float]  # of a log: what it has a number for, and the step


@dataclass(frozen=True)
class RunRecord:
    """rows: of the log, by split. run: progress, settings and fingerprint of the saved state; None before the first
    save. info: of the model; None where none is saved. recipe: the text of config.toml. notes: what cannot be read.
    """

    folder: Path
    rows: Mapping[str, Sequence[Row]]
    run: Mapping[str, Any] | None
    info: ModelInfo | None
    running: bool
    recipe: str
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def model(self) -> Path | None:
        """The best model, or the last one where none was chosen."""
        return next((path for path in (self.folder / BEST, self.folder / LAST) if path.is_file()), None)

    @property
    def step(self) -> int:
        """The last step that is known of."""
        logged = max((int(row["step"]) for rows in self.rows.values() for row in rows), default=0)
        return max(logged, self.progress.get("step", 0))

    @property
    def progress(self) -> Mapping[str, Any]:
        return {} if self.run is None else self.run["progress"]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """By name; empty before the first save."""
        return {} if self.run is None else dict(self.run["settings"])

    @cached_property
    def total(self) -> int | None:
        """Steps of the whole run, where its state says so."""
        known = {f.name: self.settings[f.name] for f in fields(Settings) if f.name in self.settings}
        images = None if self.run is None else self.run["fingerprint"].get("images")
        try:
            return Settings(**known).steps(images) if isinstance(images, int) else None
        except (ResodeError, TypeError):
            return None

    @property
    def standing(self) -> str:
        """Whether the run is over, in a few words."""
        if self.total is not None and self.step >= self.total:
            return "finished"
        if self.running:
            return "in progress"
        patience = self.settings.get("patience")
        waited_enough = patience is not None and self.progress.get("waited", 0) >= patience
        return "ended by --patience" if waited_enough else "stopped"

    @property
    def main(self) -> str:
        """The figure by which models are compared: 'top1', or of images with several labels 'map'."""
        return "map" if any("map" in row for row in self.rows[TEST]) else "top1"

    @property
    def best(self) -> float | None:
        """The main figure of the best model on the images that choose it, as the log and the state have it."""
        logged = [row[self.main] for row in self.rows[TEST] if row["step"] > 0 and self.main in row]
        known = [value for value in (self.progress.get("best_top1"),) if value is not None and value >= 0]
        return max([*known, *logged], default=None)

    def evaluation(self, place: int) -> Row | None:
        """The first (0) or last (-1) one in the log."""
        rows = self.rows[TEST]
        return rows[place] if rows else None

    def figures(self, column: str, split: str = TRAIN) -> list[tuple[float, float]]:
        """(step, value) of a column, where it has one."""
        return [(row["step"], row[column]) for row in self.rows[split] if column in row]

    @property
    def images_per_second(self) -> float | None:
        values = [value for _, value in self.figures("images_per_second")]
        return median(values) if values else None

    @property
    def peak_bytes(self) -> float | None:
        return max((value for _, value in self.figures("peak_bytes")), default=None)

    @property
    def stages(self) -> list[str]:
        """Of which the monitor had something to say, in the log's order."""
        columns = dict.fromkeys(name for row in self.rows[TRAIN] for name in row)
        found = (name.partition("_") for name in columns)
        return list(dict.fromkeys(stage for figure, _, stage in found if figure in FIGURES and stage))

    @property
    def history(self) -> Sequence[Mapping[str, Any]]:
        """The commands that made the model."""
        return () if self.info is None else self.info.history

    @property
    def calibrations(self) -> list[Mapping[str, Any]]:
        """What `auto` chose in this run, one by one; a model that was trained before has older ones in its history."""
        if self.run is None:  # the history is of a model file, which ends with the run itself
            return []
        found: list[Mapping[str, Any]] = []
        for entry in self.history:
            if entry["command"] == "finetune":
                found.clear()
            elif entry["command"] == "calibrate" and isinstance(entry.get("pieces"), dict):
                found.append(entry)
        return found

    @property
    def adjoints(self) -> dict[str, str]:
        """What the stages are run backwards by now, by its label."""
        known = self.progress.get("guard", {}).get("adjoints", {})
        try:
            return {name: Adjoint(**values).label for name, values in known.items()}
        except (ResodeError, TypeError, AttributeError):
            return {}


FIGURES = ("drift", "correction", "contraction")


def read_run(folder: Path) -> RunRecord:
    """The run of a folder, or of one of its files. Raises UsageError where there is none."""
    folder = folder.parent if folder.is_file() else folder
    known = [name for name in (STATE, BEST, LAST) if (folder / name).is_file()]
    if not known and not (folder / LOG).is_file():
        what = "holds no run" if folder.is_dir() else "does not exist"
        raise UsageError(f"{folder} {what}; a run's folder is what `resode finetune` wrote")
    if (folder / LOG).is_file() and not is_own(folder / LOG):
        raise UsageError(f"{folder / LOG} is not the log of a run")
    notes: list[str] = []
    run, info = None, None
    for name in known:
        try:
            if name == STATE:
                run = run_metadata(folder)
            said = model_file.read_metadata(folder / name)
            info = info or parse_metadata({k: v for k, v in said.items() if k not in ("run", model_file.CHECKSUM)})[0]
        except ResodeError as error:
            notes.append(str(error))
    if not known:
        notes.append(f"{folder}: nothing is saved yet; the log is all there is")
    recipe = folder / CONFIG
    text = recipe.read_text(encoding="utf-8", errors="replace") if is_own(recipe) else ""
    return RunRecord(folder, _log(folder / LOG), run, info, is_written_to(folder), text, tuple(notes))


def _log(path: Path) -> dict[str, list[Row]]:
    """The whole rows of a log; the last one may be in the making."""
    rows: dict[str, list[Row]] = {TRAIN: [], TEST: []}
    if not path.is_file():
        return rows
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        try:
            for row in csv.DictReader(file):
                if is_whole(row):
                    rows[row["split"]].append(_numbers(row))
        except csv.Error:  # what stands before it is as it was written
            pass
    return rows


def _numbers(row: Mapping[str, str]) -> Row:
    found = {}
    for name, text in row.items():
        try:
            value = float(text)
        except ValueError:
            continue
        if math.isfinite(value):
            found[name] = value
    return found
