"""Train a model on labelled images, with the backward pass of one's choice."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..data import ImageData
from ..gradients.results import ChosenAdjoints
from ..machine.deterministic import deterministic
from ..machine.locks import FolderLock, NoLock
from ..machine.processes import ALONE, Processes, begin_together
from ..network.model import OdeResNet, check_finite
from . import run_folder, run_log
from .averaging import Average, average_bytes
from .balance import balanced_labels, class_weights
from .best import Evaluations, check_evaluations, check_tells_apart
from .bf16_weights import leave_in_float32, raised
from .dropping import use_random_layers
from .guard import Guard, GuardState
from .loop import DONE, INTERRUPTED, Loop, training_batches
from .objective import Objective
from .optimizer_state import OptimizerState
from .parallel import Joint, settings_of_one
from .results import NO_PATIENCE, OUT_OF_TIME, Callbacks, FinetuneResult, Progress, peak_bytes
from .resuming import run_fingerprint, teacher_fingerprint
from .run_log import StepRecord
from .saves import NoSaves, Saves
from .settings import Settings
from .starting import choice_batch, prepare_to_train, switch_scheme, tell_of_shared_statistics, tell_of_warmup
from .step import Steps, Taken
from .synced_norm import check_synchronises, synchronise
from .teacher import Teacher
from .trackers import Tracking
from .trained import train_only, with_stage_names
from .unfreezing import Unfreezing


def finetune(
    model: OdeResNet,
    train: ImageData,
    test: ImageData | None,
    *,
    out: str | Path,
    settings: Settings,
    device: torch.device | str = "cpu",
    callbacks: Callbacks | None = None,
    resume: run_folder.State | None = None,
    teacher: Teacher | None = None,
    lock: FolderLock | None = None,
    began_with: str | None = None,
    call: Mapping[str, Any] | None = None,
    processes: Processes = ALONE,
) -> FinetuneResult:
    """Minimise the `Objective` on `train`; write best, last, log and state files to the folder `out`.

    The order of images and their augmentation follow from the seed, so a resumed run repeats what
    the uninterrupted one would have done, bit for bit on one device.

    lock: on `out`, where the caller holds it already. An error after a step leaves that step saved.
    began_with: the checksum of the model's file, by which a resumed run will know it.
    call: what else a resumed run is to know of how this one was asked for, for JSON.

    processes: this one and the others of the run, of which each takes a part of every batch and all call this alike;
    the first one writes. The run is then that of one process, but for the order of sums and random layers' draws.

    What a run before has left in the folder goes once the first save of this one stands.

    Raises ResodeError if the loss stops being finite, on drift past the tolerance with 'stop', and if
    the memory budget is too small.
    """
    own = callbacks or Callbacks()
    if not processes.leads:
        settings = replace(settings, track=None)
        own, lock = Callbacks(should_stop=own.should_stop, deferred=own.deferred), NoLock(Path(out))
    tracking = Tracking(settings, Path(out), own, data=train.name, source=model.info.source)
    with nullcontext(lock) if lock is not None else FolderLock(Path(out), on_message=tracking.say) as held:
        to = (held, settings, torch.device(device), tracking.callbacks, resume, teacher, began_with, call, processes)
        try:
            with deterministic(settings.deterministic, torch.device(device)):
                return tracking.around(lambda: _Run(model, train, test, *to).run())
        finally:
            if settings.weights_dtype is not None:  # and the run ended before it began
                leave_in_float32(model)


class _Run:
    def __init__(
        self,
        model: OdeResNet,
        train: ImageData,
        test: ImageData | None,
        lock: FolderLock,
        settings: Settings,
        device: torch.device,
        callbacks: Callbacks,
        resume: run_folder.State | None,
        teacher: Teacher | None,
        began_with: str | None,
        call: Mapping[str, Any] | None,
        processes: Processes,
    ) -> None:
        self.model, self.train, self.processes = model.to(device), train, processes
        settings = with_stage_names(settings, model)
        mine = settings_of_one(settings, processes, train)
        self.settings, self.device, self.callbacks = settings, device, callbacks
        self.per_epoch, self.total = settings.per_epoch(len(train)), settings.steps(len(train))
        self.progress = Progress()
        self.last_step_at = 0.0
        weights = class_weights(train, settings, callbacks.on_message)
        own = None if teacher is None else teacher.to(device)
        objective = Objective(model, own, settings, weights, processes=processes)
        fingerprint = (
            {
                **run_fingerprint(train, test, settings),
                "model": began_with,
                "teacher": teacher_fingerprint(teacher),
                "run": secrets.token_hex(4),
                "call": dict(call or {}),
            }
            if resume is None
            else resume.fingerprint
        )
        for said in check_evaluations(settings, None if test is None else self.per_epoch, self.total):
            callbacks.on_message(said)
        tell_of_warmup(settings, self.total, callbacks.on_message)
        check_tells_apart(model, settings)
        check_finite(model, "the model holds NaN or infinity in {}: nothing can be trained from there")
        self.stage_names = [name for name, stage in model.stages.items() if stage.spec.depth]
        use_random_layers(model, settings)
        train_only(model, settings, self.callbacks.on_message)
        unfreezing = None if settings.unfreeze_every is None else Unfreezing(model, settings, self.total)
        if settings.bn == "sync" and not processes.alone:
            check_synchronises(model)
        begin_together()
        if resume is None:
            torch.manual_seed(settings.seed)
            data = test if test is not None else train
            tell_of_shared_statistics(model, settings, self.callbacks.on_message)
            self.progress.switched = switch_scheme(model, settings, data, device, self.callbacks.on_message)
        else:
            self.progress = Progress(**processes.decided(lambda: resume.progress))  # the first one knows the files
        if settings.bn == "sync" and not processes.alone:
            synchronise(model)
        if settings.channels_last:
            model.use_channels_last()
        if settings.compile:  # last: the graphs depend on the layout, the forward rule and what is frozen
            model.compile_branches()
        self.loop = Loop(
            model,
            mine,
            device,
            self.progress,
            total=self.total,
            should_stop=self.callbacks.should_stop,
            deferred=self.callbacks.deferred,
            processes=processes,
        )
        optimizer = OptimizerState(self.loop.optimizer, model)
        self.chosen: ChosenAdjoints | None = None
        self.guard = Guard(
            model,
            mine,
            device,
            autocast=self.loop.autocast,
            prepare=lambda: prepare_to_train(model, settings),
            on_message=self.callbacks.on_message,
            on_choice=self._chosen,
            state=GuardState(**self.progress.guard),
            beside=(0 if teacher is None else teacher.bytes) + average_bytes(model, settings),
            processes=processes,
            all_trained=nullcontext if unfreezing is None else unfreezing.all_trained,
        )
        self.guard.start(lambda: choice_batch(train, mine, device))
        joint = Joint(model, processes)
        objective.forward = joint
        if resume is not None:
            resume.restore(optimizer, self.loop.scaler, device)
        with raised(self.loop.optimizer):
            average = None if settings.ema is None else Average(model, settings)
        if average is not None and resume is not None:
            average.restore(resume.average)
        self.saves = (Saves if processes.leads else NoSaves)(
            lock,
            model,
            settings,
            self.progress,
            train=train,
            fingerprint=fingerprint,
            loop=self.loop,
            optimizer=optimizer,
            guard=self.guard,
            average=average,
            callbacks=callbacks,
            resumed=resume is not None,
        )
        self.evaluations = Evaluations(
            model,
            test,
            settings,
            device,
            self.progress,
            loop=self.loop,
            saves=self.saves,
            per_epoch=self.per_epoch,
        )
        self.steps = Steps(
            model,
            mine,
            device,
            self.progress,
            loop=self.loop,
            guard=self.guard,
            objective=objective,
            average=average,
            say=self.callbacks.on_message,
            advice=self.saves.advice,
            joint=joint,
            unfreezing=unfreezing,
        )
        if unfreezing is not None:
            for said in unfreezing.plan(self.progress.step):
                callbacks.on_message(said)
            unfreezing.at(self.progress.step)
            joint.renew()

    def _chosen(self, chosen: ChosenAdjoints) -> None:
        self.chosen = chosen
        self.model.record("calibrate", step=self.progress.step, **chosen.record())
        self.callbacks.on_choice(chosen)

    def run(self) -> FinetuneResult:
        progress, first = self.progress, self.progress.step
        self.saves.open_log(self.stage_names, keep_up_to=first)
        self.began = time.perf_counter()
        try:
            ended = self._train()
            if ended != DONE:
                self.saves.state()
        except Exception:
            # The step in progress is lost, the one before is not: between steps the model is as that one left it.
            if not self.loop.halfway and progress.step > first:
                self.saves.state()
                self.callbacks.on_message(f"step {progress.step} is saved; --resume goes on from there")
            raise
        finally:
            self.saves.close()
            leave_in_float32(self.model, self.loop.optimizer)
        return FinetuneResult(
            progress.step,
            self.total,
            self.evaluations.before,
            self.evaluations.after,
            progress.best_top1,
            time.perf_counter() - self.began,
            peak_bytes(self.device),
            ended == INTERRUPTED,
            progress.skipped,
            {name: self.model.stages[name].adjoint.label for name in self.stage_names},
            progress.switched,
            tuple(self.guard.state.moved_to_anchors),
            self.guard.state.recalibrations,
            self.chosen,
            progress.best_step,
            ended,
            "map" if self.model.info.multi_label else "top1",
        )

    def _train(self) -> str:
        """What ended it. A signal may do so anywhere but in the blocks that are `undisturbed`."""
        settings, progress = self.settings, self.progress
        if progress.step:  # the state is written first: a run killed after it has an older last model, or none
            self.saves.model_as(run_folder.LAST)
        if progress.step == 0:
            self.evaluations.begin()
        else:
            self.evaluations.go_on()
        if self.evaluations.due():  # the run was stopped before it
            self.evaluations.choose_best()
            self.saves.state()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if progress.step == self.total:
            return DONE
        if progress.step and self.evaluations.waited_enough():
            return NO_PATIENCE
        self.last_step_at = time.perf_counter()
        epoch, done = divmod(progress.step, self.per_epoch)
        source = training_batches(
            self.train,
            range(len(self.train)),
            settings.step_images,
            seed=settings.seed,
            epoch=epoch,
            skip=done,
            workers=settings.workers,
            device=self.device,
            labels=balanced_labels(self.train, settings),
            accumulate=settings.batches_per_step,
            processes=self.processes,
        )
        return self.loop.run(source, self.steps.take, self._stepped, self._between)

    def _stepped(self, taken: Taken) -> None:
        record = self._record(taken)
        self.callbacks.on_step(record)
        self.progress.window.append(record.columns)
        if record.step % self.settings.log_every == 0 or record.step == self.total:
            self.saves.move_log()
            self.saves.log.train(record, self.progress.window)
            self.progress.window.clear()

    def _between(self, _: Taken) -> str | None:
        evaluated = self.evaluations.due()
        if evaluated:
            self.evaluations.choose_best()
            self.last_step_at = time.perf_counter()
        if self.progress.step == self.total or self.progress.step % self.settings.save_every == 0:
            self.saves.state()
        if self.progress.step == self.total:
            return DONE
        if evaluated and self.evaluations.waited_enough():
            return NO_PATIENCE
        most = self.settings.most_seconds
        over = most is not None and self.processes.any(time.perf_counter() - self.began >= most)
        return OUT_OF_TIME if over else None

    def _record(self, taken: Taken) -> StepRecord:
        now = time.perf_counter()
        speed, self.last_step_at = taken.images / (now - self.last_step_at), now
        step, epoch, peak = self.progress.step, (self.progress.step - 1) // self.per_epoch + 1, peak_bytes(self.device)
        lr = self.loop.learning_rate
        known = taken.loss, taken.accuracy, lr, speed, peak, taken.monitor
        accuracy_of = run_log.LABEL_ACCURACY if self.model.info.multi_label else "top1"
        return StepRecord(step, self.total, epoch, *known, accuracy_of)
