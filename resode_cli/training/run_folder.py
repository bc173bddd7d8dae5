"""The folder of a training run: log.csv, best and last model, and the state that a resumed run needs.

The state is one safetensors file, written atomically: tensors of the model, the optimizer and the
generators, and everything else as JSON. No pickle.
"""

from __future__ import annotations

import csv
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ..errors import ResodeError, ResodeWarning, UsageError, first_few
from ..files import model_file
from ..files.model_schema import HEUN_RENAMED
from ..machine.atomic import atomic_path, clear_errors
from ..measuring.evaluate import Measured
from ..network.model import OdeResNet
from .optimizer_state import OptimizerState, Saved
from .plateau import is_state
from .settings import Settings

STATE, BEST, LAST, LOG = "state.safetensors", "best.safetensors", "last.safetensors", "log.csv"
CONFIG = "config.toml"
# What the log has in place of top1 where images have several labels: of evaluations, and last of training steps.
LABEL_ACCURACY = "label_accuracy"
OF_SEVERAL = ("map", "micro_f1", "macro_f1", "exact_match", LABEL_ACCURACY)
FILES = (STATE, BEST, LAST, LOG, CONFIG)
ALONE = (LOG, CONFIG)  # which are there from the start of a run, and are none by themselves
_RUNNER_UP, _FIRST = re.compile(r"best-step-\d+\.safetensors"), re.compile(r"\.best\.safetensors\.[0-9a-f]{8}")


def runner_up(step: int) -> str:
    """The file of one of the best models that is not the best."""
    return f"best-step-{step}.safetensors"


def runners_up(folder: Path) -> list[str]:
    """The files of that kind that a folder holds."""
    return sorted(path.name for path in folder.glob("best-step-*.safetensors") if _RUNNER_UP.fullmatch(path.name))


def first_model(folder: Path, run: str | None) -> Path:
    """Where a run keeps the model that it began with until its first save stands. run: tells it from other runs."""
    return folder / f".{BEST}.{run}"


def forget_first_models(folder: Path) -> None:
    """Remove those of runs that were killed before they saved anything."""
    for path in folder.glob(f".{BEST}.*"):
        if _FIRST.fullmatch(path.name):
            path.unlink(missing_ok=True)


def settle_first_model(folder: Path, run: str | None, *, best_step: int, keep_best: int) -> None:
    """Give the model that a run began with its name, now that a save stands: as the best, or one of the best."""
    first = first_model(folder, run)
    if not first.is_file():
        return
    if best_step == 0:
        first.replace(folder / BEST)
    elif keep_best > 1:
        first.replace(folder / runner_up(0))
    else:
        first.unlink()


@dataclass(frozen=True)
class State:
    """A saved run. `restore` puts the optimizer, the scaler and the generators back.

    average: of the weights, by name; empty where the run has none.
    """

    model: OdeResNet
    progress: dict[str, Any]
    settings: dict[str, Any]
    fingerprint: dict[str, Any]
    optimizer: Saved
    scaler: dict[str, Any]
    generators: dict[str, Tensor]
    average: dict[str, Tensor]

    def restore(self, optimizer: OptimizerState, scaler: torch.amp.GradScaler, device: torch.device) -> None:
        """Put optimizer, loss scale and generators where they were. Raises ResodeError for what does not fit them."""
        try:
            optimizer.restore(self.optimizer)
            if self.scaler and scaler.is_enabled():
                scaler.load_state_dict(self.scaler)
            torch.set_rng_state(self.generators["cpu"])
            if "cuda" in self.generators and device.type == "cuda":
                torch.cuda.set_rng_state(self.generators["cuda"], device)
        except ResodeError:
            raise
        except Exception as error:  # whatever torch makes of what a state holds
            reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
            raise ResodeError(f"the state of the run cannot be restored ({reason}); start a new run") from error


def save_state(
    path: Path,
    model: OdeResNet,
    *,
    optimizer: OptimizerState,
    scaler: torch.amp.GradScaler,
    average: Mapping[str, Tensor],
    progress: dict[str, Any],
    settings: dict[str, Any],
    fingerprint: dict[str, Any],
) -> None:
    """Write everything a resumed run needs, atomically."""
    tensors = {f"model/{name}": value for name, value in model.file_state().items()}
    packed = optimizer.pack()
    tensors |= {f"optimizer/{name}": tensor for name, tensor in packed.tensors.items()}
    tensors |= {f"average/{name}": tensor.detach() for name, tensor in average.items()}
    tensors["generator/cpu"] = torch.get_rng_state()
    if next(model.parameters()).is_cuda:
        tensors["generator/cuda"] = torch.cuda.get_rng_state(next(model.parameters()).device)
    metadata = {
        **model_file.model_metadata(model),
        "run": {
            "progress": progress,
            "settings": settings,
            "fingerprint": fingerprint,
            "optimizer": packed.values,
            "optimizer_by": "name",
            "scaler": scaler.state_dict(),
        },
    }
    model_file.write_tensors(path, tensors, metadata)


def run_metadata(folder: Path) -> dict[str, Any]:
    """What a saved run says of itself, without its tensors. Raises UsageError if there is none."""
    if not (folder / STATE).is_file():
        begin = "; begin the run anew, with --force" if (folder / BEST).exists() or runners_up(folder) else ""
        raise UsageError(f"nothing to resume: {str(folder / STATE)!r} does not exist{begin}")
    metadata = model_file.read_metadata(folder / STATE)
    if "run" not in metadata:
        raise ResodeError(f"{folder / STATE}: not the state of a run")
    problem = _run_problem(metadata["run"])
    if problem:
        raise ResodeError(f"{folder / STATE}: not the state of a run that can go on ({problem})")
    return _as_named_now(metadata["run"]) if metadata["format"] < HEUN_RENAMED else metadata["run"]


def _as_named_now(run: Any) -> Any:
    """What an older file says of a run, with the adjoint of the forward rule that was called 'heun' by its new name."""
    if not isinstance(run, dict):
        return run
    return {
        key: "heunnet" if key in ("adjoint", "method") and value == "heun" else _as_named_now(value)
        for key, value in run.items()
    }


_PARTS = ("progress", "settings", "fingerprint", "optimizer", "scaler")
_COUNTS = ("step", "evaluated", "skipped", "best_step", "waited")


def _run_problem(run: Any) -> str:
    """What is wrong with what a file says of a run; empty for nothing."""
    if not isinstance(run, dict) or not all(isinstance(run.get(part), dict) for part in _PARTS):
        return f"{' or '.join(_PARTS)} is missing"
    progress = run["progress"]
    odd = [name for name in _COUNTS if type(progress.get(name, 0)) is not int or progress.get(name, 0) < 0]
    best = progress.get("best_top1", 0.0)
    if type(best) not in (int, float) or not -1 <= best <= 1:
        odd.append("best_top1")
    kinds: dict[str, Any] = {
        "window": list,
        "guard": dict,
        "switched": (dict, type(None)),
        "best_file": (str, type(None)),
        "best_score": (int, float, type(None)),
        "kept": list,
        "plateau": dict,
    }
    odd += [name for name, kind in kinds.items() if name in progress and not isinstance(progress[name], kind)]
    if "kept" not in odd and not all(map(_is_kept, progress.get("kept", []))):
        odd.append("kept")
    if not is_state(progress.get("plateau", {})):
        odd.append("plateau")
    odd += sorted(progress.keys() - {*_COUNTS, "best_top1", *kinds})
    if odd:
        return f"progress: {first_few(odd)}"
    odd = [name for name, value in run["settings"].items() if not _suits_setting(name, value)]
    return f"settings: {first_few(odd)}" if odd else ""


def _is_kept(entry: Any) -> bool:
    return isinstance(entry, list) and [type(value) in (int, float) for value in entry] == [True, True]


def _suits_setting(name: str, value: Any) -> bool:
    """Whether a setting, if it is one, may have a value by its type; ranges are its own affair."""
    hint = _SETTING_TYPES.get(name)
    if hint is None:  # of another version
        return True
    wanted = get_args(hint) or (hint,)
    if name == "anchors" and type(value) is int:  # as older versions wrote it
        return True
    if type(value) is list:
        return any(get_origin(kind) is tuple for kind in wanted) and all(type(v) in (str, int, float) for v in value)
    return type(value) in wanted or (type(value) is int and float in wanted)


_SETTING_TYPES = get_type_hints(Settings)


def load_state(folder: Path, *, source: str | None = None, trust_source: bool = False) -> State:
    """The run saved in `folder`. Raises UsageError if there is none.

    source, trust_source: see `model_file.load`.
    """
    run = run_metadata(folder)
    tensors, metadata = model_file.read_tensors(folder / STATE)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "generator": {}, "average": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if part not in parts:
            raise ResodeError(f"{folder / STATE}: not the state of a run that can go on (it holds {name!r})")
        parts[part][rest] = tensor
    model = model_file.from_tensors(folder / STATE, parts["model"], metadata, source=source, trust_source=trust_source)
    return State(
        model,
        run["progress"],
        run["settings"],
        run["fingerprint"],
        Saved(parts["optimizer"], run["optimizer"], by_place=run.get("optimizer_by") != "name"),
        run["scaler"],
        parts["generator"],
        parts["average"],
    )


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


def is_own(path: Path) -> bool:
    """Whether a file begins as a run's file of that name does."""
    beginning = _BEGINNINGS[path.name]
    try:
        with path.open("rb") as file:
            return file.read(len(beginning)) == beginning
    except OSError:
        return False


CONFIG_BEGINNING = "# A run of resode finetune"
_BEGINNINGS = {LOG: b"split,step,epoch", CONFIG: CONFIG_BEGINNING.encode()}


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
