"""What a training run writes to its folder: its models, the state that it goes on from, and its log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

from ..data import ImageData
from ..files import model_file
from ..machine.locks import FolderLock
from ..network.model import OdeResNet, check_finite
from . import run_folder, run_log
from .averaging import Average
from .bf16_weights import raised
from .guard import Guard
from .loop import Loop
from .optimizer_state import OptimizerState
from .results import Callbacks, Progress
from .resuming import loaded_checksum, saved_files
from .settings import Settings
from .trained import trains_head


class Saves:
    """The files of one run. What a run before has left in the folder goes once the first save of this one stands.

    resumed: whether what the folder holds is this run's own.
    """

    def __init__(
        self,
        lock: FolderLock,
        model: OdeResNet,
        settings: Settings,
        progress: Progress,
        *,
        train: ImageData,
        fingerprint: dict[str, Any],
        loop: Loop,
        optimizer: OptimizerState,
        guard: Guard,
        average: Average | None,
        callbacks: Callbacks,
        resumed: bool,
    ) -> None:
        self.lock, self.model, self.settings, self.progress = lock, model, settings, progress
        self.train, self.fingerprint, self.run = train, fingerprint, fingerprint.get("run")
        self.loop, self.optimizer, self.guard, self.average = loop, optimizer, guard, average
        self.callbacks = callbacks
        self.writes = True
        self.nothing_of = [] if resumed else saved_files(lock.folder)  # what a run before has left

    def open_log(self, stage_names: Sequence[str], *, keep_up_to: int) -> None:
        path = run_log.log_path(self.lock.ensure(), self.run, replacing=bool(self.nothing_of))
        self.log = run_log.Log(
            path,
            stage_names,
            keep_up_to=keep_up_to,
            evaluated_up_to=max(self.progress.evaluated, keep_up_to - 1),
            on_row=self.callbacks.on_row,
            multi_label=self.model.info.multi_label,
        )
        self.callbacks.on_begin(self.run, keep_up_to)

    def move_log(self) -> None:
        """The log goes on where the folder is now."""
        self.log.path = self.lock.ensure() / self.log.path.name

    def close(self) -> None:
        """A run that never began, or saved nothing, is none, and leaves no log and no model."""
        run_folder.first_model(self.lock.folder, self.run).unlink(missing_ok=True)
        if self.progress.step == 0 or self.nothing_of:
            self.log.path.unlink(missing_ok=True)

    def model_as(self, name: str, *, measured: Mapping[str, Any] | None = None) -> None:
        """Write the model to a file of this name: the average of its weights, where there is one.

        measured: its evaluation, for its history.
        """
        with self.averaged():
            self._check_finite()
            model_file.write(self._described(measured), self.lock.ensure() / name)
        self._replace(name)

    def first_model(self, measured: Mapping[str, Any]) -> str | None:
        """Write the model that the run began with, aside until the first save stands. Returns its checksum."""
        run_folder.forget_first_models(self.lock.ensure())
        path = run_folder.first_model(self.lock.folder, self.run)
        with raised(self.loop.optimizer, self.loop.deferred):
            model_file.write(self._described(measured), path)
        return loaded_checksum(path)

    def best_model(self, measured: Mapping[str, Any]) -> str | None:
        """Write the best model so far. Returns its checksum."""
        self.model_as(run_folder.BEST, measured=measured)
        return loaded_checksum(self.lock.folder / run_folder.BEST)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model holds the average of its weights inside the block, where there is one, and float32 in any case."""
        average = nullcontext() if self.average is None else self.average.in_place(self.loop.deferred)
        with raised(self.loop.optimizer, self.loop.deferred), average:
            yield

    def state(self) -> None:
        """The state first: it alone is enough to go on; the last model is there for the other commands."""
        with self.loop.undisturbed():
            if self.average is not None:
                self.average.put_back(self.loop.deferred)
            self._check_finite()
            with raised(self.loop.optimizer):
                run_folder.save_state(
                    self.lock.ensure() / run_folder.STATE,
                    self.model,
                    optimizer=self.optimizer,
                    scaler=self.loop.scaler,
                    average={} if self.average is None else self.average.state,
                    progress={**asdict(self.progress), "guard": asdict(self.guard.state)},
                    settings=asdict(self.settings),
                    fingerprint=self.fingerprint,
                )
            self._replace(run_folder.STATE)
            self.model_as(run_folder.LAST)

    def advice(self) -> str:
        """What to say, behind what went wrong."""
        state = self.lock.folder / run_folder.STATE
        own = state.is_file() and not self.nothing_of
        kept = f"{state} holds the last saved step" if own else "nothing was saved yet"
        return f"; {kept}. Try a lower --lr, --clip-grad, or --adjoint checkpoint"

    def _check_finite(self) -> None:
        check_finite(self.model, f"after step {self.progress.step} weights are no numbers ({{}}){self.advice()}")

    def _described(self, measured: Mapping[str, Any] | None) -> OdeResNet:
        """The model with this run in its history."""
        settings = {k: v for k, v in asdict(self.settings).items() if v is not None}
        if self.train.division is not None:
            settings |= self.train.division.record()
        settings |= {"class_map": self.train.renamed} if self.train.renamed else {}
        settings |= {} if measured is None else {"measured": dict(measured)}
        steps, head = self.progress.step, trains_head(self.model)
        info = self.model.info.with_command(
            "finetune", data=self.train.name, steps=steps, trained_head=head, **settings
        )
        return self.model.with_info(info.with_classes(self.train.class_names))

    def _replace(self, written: str) -> None:
        """What a run before has left goes, now that something of this one stands."""
        folder = self.lock.folder
        for name in self.nothing_of:
            if name != written:
                (folder / name).unlink(missing_ok=True)
        if self.nothing_of:
            self.nothing_of = []
            self.log.path = self.log.path.replace(folder / run_log.LOG)
        run_folder.settle_first_model(
            folder, self.run, best_step=self.progress.best_step, keep_best=self.settings.keep_best
        )
        self.callbacks.on_saved(folder)


class NoSaves(Saves):
    """Of a process beside the one that writes the files."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{**settings, "resumed": True})
        self.writes = False
        self.log = run_log.NoLog()

    def open_log(self, stage_names: Sequence[str], *, keep_up_to: int) -> None:
        pass

    def move_log(self) -> None:
        pass

    def close(self) -> None:
        pass

    def model_as(self, name: str, *, measured: Mapping[str, Any] | None = None) -> None:
        pass

    def first_model(self, measured: Mapping[str, Any]) -> str | None:  # noqa: ARG002
        return None

    def best_model(self, measured: Mapping[str, Any]) -> str | None:  # noqa: ARG002
        return None

    def state(self) -> None:
        if self.average is not None:
            self.average.put_back(self.loop.deferred)
