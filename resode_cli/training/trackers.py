"""Trackers of experiments that a run's log goes to as well: an adapter each, of what it is called by them.

What a tracker gets: the settings, every row of log.csv as scalars, and the final figures. A resumed run goes on in the
same run of the tracker, by the run's own token, which its state holds. A tracker that fails is off from then on, which
is said once: no run ends for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ..errors import ResodeError, one_line
from .results import Callbacks, FinetuneResult
from .run_log import OF_SEVERAL
from .settings import Settings

PROJECT = "resode"  # where the tracker's own variable of the environment names none
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Start:
    """folder: of the run. token: its own, by which it is known again. step: that it goes on from; 0: it begins."""

    folder: Path
    token: str
    step: int
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.folder.resolve().name


class Tracker(Protocol):
    """An adapter. It is made before training, which imports the package; what `begin` raises, and the rest, is said."""

    def begin(self, start: Start) -> None: ...

    def log(self, figures: Figures, step: int) -> None: ...

    def end(self, summary: Figures, *, step: int, whole: bool) -> None:
        """whole: whether the run is over, and not to be resumed."""


class TensorBoard:
    """Event files in RUN/tensorboard; what a killed run logged past its last save is struck out when it goes on."""

    module = "torch.utils.tensorboard"

    def __init__(self) -> None:
        self.writer_class = _import(self.module, "tensorboard").SummaryWriter

    def begin(self, start: Start) -> None:
        self.settings = {name: value for name, value in start.settings.items() if isinstance(value, (str, int, float))}
        folder = start.folder / "tensorboard" / start.token
        self.writer = self.writer_class(str(folder), purge_step=start.step + 1 if start.step else None)
        rows = "".join(f"| {name} | {value} |\n" for name, value in start.settings.items())
        self.writer.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}", start.step)

    def log(self, figures: Figures, step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def end(self, summary: Figures, *, step: int, whole: bool) -> None:
        if whole:
            self.writer.add_hparams(self.settings, dict(summary), run_name=".")
        self.writer.close()


class WandB:
    """Weights & Biases; `WANDB_MODE=offline` needs no network. Its files stand in RUN/wandb."""

    module = "wandb"

    def __init__(self) -> None:
        self.wandb = _import(self.module, "wandb")

    def begin(self, start: Start) -> None:
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=start.token,
            name=start.name,
            config=dict(start.settings),
            resume="allow",
            dir=str(start.folder),
        )

    def log(self, figures: Figures, step: int) -> None:
        self.run.log(dict(figures), step=step)

    def end(self, summary: Figures, *, step: int, whole: bool) -> None:
        self.run.summary.update(dict(summary))
        self.run.finish(exit_code=0 if whole else 1)


class MLflow:
    """MLflow, at `MLFLOW_TRACKING_URI`, or in this folder. The run is found again by a tag."""

    module, tag = "mlflow", "resode_run"

    def __init__(self) -> None:
        self.mlflow = _import(self.module, "mlflow")

    def begin(self, start: Start) -> None:
        experiment = self.mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        known = self.mlflow.MlflowClient().search_runs(
            [experiment.experiment_id], f"tags.{self.tag} = '{start.token}'", max_results=1
        )
        if known:
            self.mlflow.start_run(run_id=known[0].info.run_id)
        else:
            self.mlflow.start_run(run_name=start.name, tags={self.tag: start.token})
            self.mlflow.log_params({name: str(value)[:500] for name, value in start.settings.items()})

    def log(self, figures: Figures, step: int) -> None:
        self.mlflow.log_metrics(dict(figures), step=step)

    def end(self, summary: Figures, *, step: int, whole: bool) -> None:
        try:
            self.mlflow.log_metrics(dict(summary), step=step)
        finally:
            self.mlflow.end_run("FINISHED" if whole else "KILLED")


class Trackio:
    """Trackio, which keeps everything on this machine."""

    module = "trackio"

    def __init__(self) -> None:
        self.trackio = _import(self.module, "trackio")

    def begin(self, start: Start) -> None:
        self.trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{start.name}-{start.token}",
            config=dict(start.settings),
            resume="allow",
        )

    def log(self, figures: Figures, step: int) -> None:
        self.trackio.log(dict(figures), step=step)

    def end(self, summary: Figures, *, step: int, whole: bool) -> None:
        try:
            self.trackio.log(dict(summary), step=step)
        finally:
            self.trackio.finish()


ADAPTERS: dict[str, Callable[[], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def open_trackers(settings: Settings) -> dict[str, Tracker]:
    """The adapters that settings name. Raises ResodeError for a package that is missing."""
    return {name: ADAPTERS[name]() for name in settings.trackers}


def _import(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ResodeError(
            f"--track {package} needs the package {package} ({error}); pip install 'resode[{package}]'"
        ) from error


class Tracking:
    """The trackers of a run, between it and whoever called it."""

    def __init__(self, settings: Settings, folder: Path, callbacks: Callbacks, **about: object) -> None:
        """about: what is told beside the settings. Raises ResodeError for a package that is missing."""
        self.trackers = open_trackers(settings)
        self.folder, self.outer, self.step, self.begun = folder, callbacks, 0, False
        self.settings = {name: _plain(value) for name, value in asdict(settings).items() if value is not None}
        self.settings |= {name: str(value) for name, value in about.items()}

    def say(self, text: str) -> None:
        self.outer.on_message(text)

    @property
    def callbacks(self) -> Callbacks:
        """The caller's, with an ear for the trackers."""
        return replace(self.outer, on_begin=self._begin, on_row=self._row) if self.trackers else self.outer

    def around(self, run: Callable[[], FinetuneResult]) -> FinetuneResult:
        """Do the run, and tell the trackers how it ended."""
        try:
            result = run()
        except BaseException:
            self._end({}, whole=False)
            raise
        self._end(_summary(result), whole=not result.interrupted)
        return result

    def _begin(self, run: str | None, step: int) -> None:
        self.outer.on_begin(run, step)
        start = Start(self.folder, run or self.folder.resolve().name, step, self.settings)
        self.step, self.begun = step, True
        self._each(lambda tracker: tracker.begin(start))

    def _row(self, row: dict[str, Any]) -> None:
        self.outer.on_row(row)
        self.step = int(row["step"])
        figures = scalars(row)
        self._each(lambda tracker: tracker.log(figures, self.step))

    def _end(self, summary: Figures, *, whole: bool) -> None:
        if self.begun:
            self._each(lambda tracker: tracker.end(summary, step=self.step, whole=whole))

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                with redirect_stdout(sys.stderr):  # which is for results; some trackers print
                    tell(tracker)
            except Exception as error:  # whatever a network, a server or another package makes of it
                del self.trackers[name]
                reason = one_line(str(error).strip().partition("\n")[0][:200]) or type(error).__name__
                self.say(f"warning: {name} failed ({reason}), and hears no more of this run; log.csv does")


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """A row of the log by the names that trackers group: 'train/loss', 'drift/layer1', 'lr'."""
    found = {}
    for name, value in row.items():
        figure, _, stage = name.partition("_")
        if name in ("loss", "top1", *OF_SEVERAL):
            found[f"{row['split']}/{name}"] = float(value)
        elif figure in ("drift", "correction", "contraction") and stage:
            found[f"{figure}/{stage}"] = float(value)
        elif name not in ("split", "step"):
            found[name] = float(value)
    return found


def _summary(result: FinetuneResult) -> dict[str, float]:
    found: dict[str, float] = {
        f"best_{result.main}": result.best_top1,
        "steps": result.steps,
        "seconds": result.seconds,
        "peak_bytes": result.peak_bytes,
        "skipped_steps": result.skipped_steps,
    }
    for name, evaluation in (("before", result.before), ("after", result.after)):
        if evaluation is not None:
            found |= {f"{name}_{figure}": evaluation.figures[figure] for figure in (evaluation.MAIN, "loss")}
    return {f"summary/{name}": float(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float)) else ",".join(map(str, value))
