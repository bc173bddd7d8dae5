"""Train a model on labelled images, with the backward pass of one's choice."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Batch, ImageData, batches
from ..errors import ResodeError
from ..files import model_file
from ..gradients.results import ChosenAdjoints
from ..machine.locks import FolderLock
from ..measuring.evaluate import Evaluation, evaluate
from ..network.model import OdeResNet, check_finite
from ..ode import RandomState, fixed_buffers
from . import run_folder
from .guard import Figures, Guard, GuardState, together
from .loop import DONE, INTERRUPTED, Loop, training_batches
from .objective import Objective
from .optimizer_state import OptimizerState
from .results import Callbacks, FinetuneResult, Progress, peak_bytes
from .resuming import loaded_checksum, run_fingerprint, saved_files, teacher_fingerprint, with_stage_names
from .run_folder import StepRecord
from .settings import Settings
from .starting import choice_batch, prepare_to_train, switch_scheme, tell_of_shared_statistics, train_only
from .teacher import Teacher

MOST_SKIPPED = 10  # steps in a row


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
) -> FinetuneResult:
    """Minimise the `Objective` on `train`; write best, last, log and state files to the folder `out`.

    The order of images and their augmentation follow from the seed, so a resumed run repeats what
    the uninterrupted one would have done, bit for bit on one device.

    lock: on `out`, where the caller holds it already. An error after a step leaves that step saved.
    began_with: the checksum of the model's file, by which a resumed run will know it.
    call: what else a resumed run is to know of how this one was asked for, for JSON.

    What a run before has left in the folder goes once the first save of this one stands.

    Raises ResodeError if the loss stops being finite, on drift past the tolerance with 'stop', and if
    the memory budget is too small.
    """
    callbacks, where = callbacks or Callbacks(), torch.device(device)
    with nullcontext(lock) if lock is not None else FolderLock(Path(out), on_message=callbacks.on_message) as held:
        return _Run(model, train, test, held, settings, where, callbacks, resume, teacher, began_with, call).run()


@dataclass(frozen=True)
class Taken:
    """A step: its images, their loss and accuracy, the gradient's largest entry, and the monitor's figures.

    steepest: 0 with fp16, whose gradients are scaled and may overflow; the scaler looks after them.
    """

    images: int
    loss: float
    accuracy: float
    steepest: float
    monitor: run_folder.Figures


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
    ) -> None:
        self.model, self.train, self.test, self.lock = model.to(device), train, test, lock
        self.before: Evaluation | None = None
        self.after: Evaluation | None = None
        settings = with_stage_names(settings, model)
        self.settings, self.device, self.callbacks = settings, device, callbacks
        self.per_epoch, self.total = settings.per_epoch(len(train)), settings.steps(len(train))
        self.progress = Progress()
        self.last_step_at = 0.0
        self.objective = Objective(model, None if teacher is None else teacher.to(device), settings)
        self.fingerprint = (
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
        self.nothing_of = saved_files(lock.folder) if resume is None else []  # what a run before has left
        self.in_a_row = 0  # steps skipped just now
        check_finite(model, "the model holds NaN or infinity in {}: nothing can be trained from there")
        self.stage_names = [name for name, stage in model.stages.items() if stage.spec.depth]
        train_only(model, settings.stages)
        if resume is None:
            torch.manual_seed(settings.seed)
            data = test if test is not None else train
            tell_of_shared_statistics(model, settings, self.callbacks.on_message)
            self.progress.switched = switch_scheme(model, settings, data, device, self.callbacks.on_message)
        else:
            self.progress = Progress(**resume.progress)
        if settings.channels_last:
            model.use_channels_last()
        if settings.compile:  # last: the graphs depend on the layout, the forward rule and what is frozen
            model.compile_branches()
        self.loop = Loop(
            model,
            settings,
            device,
            self.progress,
            total=self.total,
            should_stop=self.callbacks.should_stop,
            deferred=self.callbacks.deferred,
        )
        self.optimizer_state = OptimizerState(self.loop.optimizer, model)
        self.chosen: ChosenAdjoints | None = None
        self.guard = Guard(
            model,
            settings,
            device,
            autocast=self.loop.autocast,
            prepare=self._train_mode,
            on_message=self.callbacks.on_message,
            on_choice=self._chosen,
            state=GuardState(**self.progress.guard),
            beside=0 if teacher is None else teacher.bytes,
        )
        self.guard.start(lambda: choice_batch(train, settings, device))
        if resume is not None:
            resume.restore(self.optimizer_state, self.loop.scaler, device)

    def _chosen(self, chosen: ChosenAdjoints) -> None:
        self.chosen = chosen
        by_piece = {c.piece: {"adjoint": c.adjoint.label, "error": c.error} for c in chosen.choices}
        self.model.record("calibrate", step=self.progress.step, pieces=by_piece, micro_batches=chosen.micro_batches)
        self.callbacks.on_choice(chosen)

    def _train_mode(self) -> None:
        prepare_to_train(self.model, self.settings)

    def run(self) -> FinetuneResult:
        progress, first = self.progress, self.progress.step
        path = run_folder.log_path(self.lock.ensure(), self.fingerprint.get("run"), replacing=bool(self.nothing_of))
        self.log = run_folder.Log(path, self.stage_names, keep_up_to=first)
        began = time.perf_counter()
        try:
            interrupted = self._train() == INTERRUPTED
            if interrupted:
                self._save_state()
        except Exception:
            # The step in progress is lost, the one before is not: between steps the model is as that one left it.
            if not self.loop.halfway and progress.step > first:
                self._save_state()
                self.callbacks.on_message(f"step {progress.step} is saved; --resume goes on from there")
            raise
        finally:
            if progress.step == 0 or self.nothing_of:  # a run that never began, or saved nothing, is none
                self.log.path.unlink(missing_ok=True)
        return FinetuneResult(
            progress.step,
            self.total,
            self.before,
            self.after,
            progress.best_top1,
            time.perf_counter() - began,
            peak_bytes(self.device),
            interrupted,
            progress.skipped,
            {name: self.model.stages[name].adjoint.label for name in self.stage_names},
            progress.switched,
            tuple(self.guard.state.moved_to_anchors),
            self.guard.state.recalibrations,
            self.chosen,
        )

    def _train(self) -> str:
        """What ended it. A signal may do so anywhere but in the blocks that are `undisturbed`."""
        settings, progress = self.settings, self.progress
        if progress.step:  # the state is written first: a run killed after it has an older last model, or none
            self._save_model(run_folder.LAST)
        if self.test is not None and progress.step == 0:
            self.before = self._evaluate()
            self.log.test(0, 0, self.before)
        elif self._evaluation_is_due():  # the run was stopped before it
            self._choose_best()
            self._save_state()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if progress.step == self.total:
            return DONE
        self.last_step_at = time.perf_counter()
        epoch, done = divmod(progress.step, self.per_epoch)
        source = training_batches(
            self.train,
            range(len(self.train)),
            settings.batch_size,
            seed=settings.seed,
            epoch=epoch,
            skip=done,
            workers=settings.workers,
        )
        return self.loop.run(source, self._step, self._stepped, self._between)

    def _stepped(self, taken: Taken) -> None:
        record = self._record(taken)
        self.callbacks.on_step(record)
        self.progress.window.append(record.columns)
        if record.step % self.settings.log_every == 0 or record.step == self.total:
            self._move_log()
            self.log.train(record, self.progress.window)
            self.progress.window.clear()

    def _between(self, _: Taken) -> None:
        if self._evaluation_is_due():
            self._choose_best()
            self.last_step_at = time.perf_counter()
        if self.progress.step == self.total or self.progress.step % self.settings.save_every == 0:
            self._save_state()

    def _evaluation_is_due(self) -> bool:
        step = self.progress.step
        end_of_epoch = step % self.per_epoch == 0 and (step // self.per_epoch) % self.settings.eval_every == 0
        due = step > 0 and (end_of_epoch or step == self.total)
        return self.test is not None and due and self.progress.evaluated < step

    def _choose_best(self) -> None:
        self.after = self._evaluate()
        with self.loop.undisturbed():
            step = self.progress.evaluated = self.progress.step
            self._move_log()
            self.log.test(step, (step - 1) // self.per_epoch + 1, self.after)
            if not math.isfinite(self.after.loss):
                raise ResodeError(f"after step {step} the loss on the test images is {self.after.loss}{self._advice()}")
            if self.after.top1 > self.progress.best_top1:
                self.progress.best_top1 = self.after.top1
                self._save_model(run_folder.BEST)
                self.progress.best_file = loaded_checksum(self.lock.folder / run_folder.BEST)

    def _move_log(self) -> None:
        self.log.path = self.lock.ensure() / self.log.path.name

    def _step(self, batch: Batch) -> Taken:
        """Take a step on a batch, or leave it out where its gradient is no number."""
        if len(batch.labels) == 0:
            raise ResodeError(f"a whole batch of corrupt images: {next(iter(batch.skipped))} and others")
        self._train_mode()
        images, labels = batch.images.to(self.device), batch.labels.to(self.device)
        random = RandomState.now(self.device)
        found = self._forward_backward(images, labels)
        while self.guard.must_redo(found.monitor["drift"], images, labels, self.progress.step + 1):
            # The gradient is thrown away and taken again: same random numbers, and running
            # statistics that have moved once already.
            random.restore()
            self.loop.optimizer.zero_grad(set_to_none=True)
            with fixed_buffers([self.model]):
                found = self._forward_backward(images, labels)
        if not math.isfinite(found.loss + found.steepest):
            self._skip(found)
            nothing: run_folder.Figures = {name: dict.fromkeys(stages) for name, stages in found.monitor.items()}
            return replace(found, monitor=nothing)
        self.in_a_row = 0
        if not self.loop.update():
            self.callbacks.on_message(
                f"step {self.progress.step + 1}: a gradient overflowed in fp16, so the step was skipped and the loss"
                f" scale lowered to {self.loop.scaler.get_scale():g}"
            )
        return found

    def _skip(self, found: Taken) -> None:
        """Leave the weights as they are. Raises ResodeError where that is not wanted, or has been done too often."""
        step, loss = self.progress.step + 1, found.loss
        what = f"a gradient is {found.steepest} (loss {loss:.4g})" if math.isfinite(loss) else f"the loss is {loss}"
        self.in_a_row += 1
        if self.settings.on_nonfinite == "stop" or self.in_a_row > MOST_SKIPPED:
            again = "" if self.in_a_row <= MOST_SKIPPED else f", as in the {MOST_SKIPPED} before"
            raise ResodeError(f"{what} at step {step}{again}{self._advice()}, or --on-nonfinite skip")
        self.progress.skipped += 1
        self.callbacks.on_message(f"step {step} is skipped: {what}")

    def _record(self, taken: Taken) -> StepRecord:
        now = time.perf_counter()
        speed, self.last_step_at = taken.images / (now - self.last_step_at), now
        step, epoch, peak = self.progress.step, (self.progress.step - 1) // self.per_epoch + 1, peak_bytes(self.device)
        lr = self.loop.learning_rate
        return StepRecord(step, self.total, epoch, taken.loss, taken.accuracy, lr, speed, peak, taken.monitor)

    def _forward_backward(self, images: Tensor, labels: Tensor) -> Taken:
        """What a batch gives; and .grad set. Where it is split, the gradients of its parts add up."""
        count = -(-len(labels) // self.guard.state.micro_batches)
        cuts = [slice(a, a + count) for a in range(0, len(labels), count)]
        parts = [self._part(images[cut], labels[cut], len(labels[cut]) / len(labels)) for cut in cuts]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        look = gradients and not self.loop.scaler.is_enabled()
        steepest = torch.nn.utils.get_total_norm(gradients, math.inf) if look else parts[0][0].new_zeros(())
        # One transfer per step: the loss, the accuracy, the gradient's size and every stage's figures together.
        loss = torch.stack([loss for loss, _, _ in parts]).sum()
        right = torch.stack([right for _, right, _ in parts]).sum()
        figures = together([figures for _, _, figures in parts])
        known = (value for stages in figures.values() for value in stages.values() if value is not None)
        values = iter(torch.stack([tensor.float() for tensor in (loss, right, steepest, *known)]).tolist())
        self.guard.check()
        total, accuracy, largest = (next(values) for _ in range(3))
        monitor = {
            figure: {name: None if value is None else next(values) for name, value in stages.items()}
            for figure, stages in figures.items()
        }
        return Taken(len(labels), total, accuracy, largest, monitor)

    def _part(self, images: Tensor, labels: Tensor, share: float) -> tuple[Tensor, Tensor, Figures]:
        """The share of a batch's loss and accuracy that some of its images have, and the monitor's figures."""
        with self.loop.autocast():
            loss, logits = self.objective(images, labels)
        self.loop.backward(loss if share == 1 else loss * share)
        right = (logits.argmax(1) == labels).float().mean()
        return loss.detach() * share, right * share, self.guard.figures()

    def _evaluate(self) -> Evaluation:
        assert self.test is not None
        data = batches(self.test, max(self.settings.batch_size, 100), workers=self.settings.workers)
        return evaluate(self.model, data, device=self.device)

    def _described(self) -> OdeResNet:
        """The model with this run in its history."""
        settings = {k: v for k, v in asdict(self.settings).items() if v is not None}
        info = self.model.info.with_command("finetune", data=self.train.name, steps=self.progress.step, **settings)
        names = self.train.class_names
        return self.model.with_info(info.with_classes(names))

    def _save_model(self, name: str) -> None:
        check_finite(self.model, f"after step {self.progress.step} weights are no numbers ({{}}){self._advice()}")
        model_file.write(self._described(), self.lock.ensure() / name)
        self._replace(name)

    def _save_state(self) -> None:
        """The state first: it alone is enough to go on; the last model is there for the other commands."""
        with self.loop.undisturbed():
            check_finite(self.model, f"after step {self.progress.step} weights are no numbers ({{}}){self._advice()}")
            run_folder.save_state(
                self.lock.ensure() / run_folder.STATE,
                self.model,
                optimizer=self.optimizer_state,
                scaler=self.loop.scaler,
                progress={**asdict(self.progress), "guard": asdict(self.guard.state)},
                settings=asdict(self.settings),
                fingerprint=self.fingerprint,
            )
            self._replace(run_folder.STATE)
            self._save_model(run_folder.LAST)

    def _replace(self, written: str) -> None:
        """What a run before has left goes, now that something of this one stands."""
        folder = self.lock.folder
        for name in self.nothing_of:
            if name != written:
                (folder / name).unlink(missing_ok=True)
        if self.nothing_of:
            self.nothing_of = []
            self.log.path = self.log.path.replace(folder / run_folder.LOG)

    def _advice(self) -> str:
        state = self.lock.folder / run_folder.STATE
        own = state.is_file() and not self.nothing_of
        kept = f"{state} holds the last saved step" if own else "nothing was saved yet"
        return f"; {kept}. Try a lower --lr, --clip-grad, or --adjoint checkpoint"
