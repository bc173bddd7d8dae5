"""Train a model on labelled images, with the backward pass of one's choice."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import model_file, run_folder
from .calibrate import Calibration
from .data import Batch, ImageData, batches
from .errors import ResodeError, UsageError
from .evaluate import Evaluation, evaluate
from .finetune_results import Callbacks, FinetuneResult, Progress
from .guard import Guard, GuardState
from .locks import FolderLock
from .model import OdeResNet, freeze_batch_norm
from .objective import Objective
from .ode import RandomState, fixed_buffers
from .optimization import create_optimizer, create_scheduler
from .run_folder import StepRecord
from .settings import AMP, Settings
from .signals import Stopped
from .teacher import Teacher

CALIBRATION_IMAGES = 32


def finetune(
    model: OdeResNet,
    train: ImageData,
    test: ImageData | None,
    *,
    out: Path,
    settings: Settings,
    device: torch.device,
    callbacks: Callbacks | None = None,
    resume: run_folder.State | None = None,
    teacher: Teacher | None = None,
    lock: FolderLock | None = None,
) -> FinetuneResult:
    """Minimise the `Objective` on `train`; write best, last, log and state files to the folder `out`.

    The order of images and their augmentation follow from the seed, so a resumed run repeats what
    the uninterrupted one would have done, bit for bit on one device.

    lock: on `out`, where the caller holds it already. An error after a step leaves that step saved.

    Raises ResodeError if the loss stops being finite, on drift past the tolerance with 'stop', and if
    the memory budget is too small.
    """
    callbacks = callbacks or Callbacks()
    with nullcontext(lock) if lock is not None else FolderLock(out, on_message=callbacks.on_message) as held:
        return _Run(model, train, test, held, settings, device, callbacks, resume, teacher).run()


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
    ) -> None:
        self.model, self.train, self.test, self.lock = model.to(device), train, test, lock
        self.before: Evaluation | None = None
        self.after: Evaluation | None = None
        self.halfway = False  # through a step or a save
        self.settings, self.device, self.callbacks = settings, device, callbacks
        self.per_epoch, self.total = settings.per_epoch(len(train)), settings.steps(len(train))
        self.progress = Progress()
        self.last_step_at = 0.0
        self.objective = Objective(model, None if teacher is None else teacher.to(device), settings)
        self.stage_names = [name for name, stage in model.stages.items() if stage.spec.depth]
        self._choose_parameters()
        if resume is None:
            torch.manual_seed(settings.seed)
            self._switch_scheme()
        else:
            self.progress = Progress(**resume.progress)
        if settings.channels_last:
            model.use_channels_last()
        if settings.compile:  # last: the graphs depend on the layout, the forward rule and what is frozen
            model.compile_branches()
        self.calibration: Calibration | None = None
        self.guard = Guard(
            model,
            settings,
            device,
            autocast=self._autocast,
            prepare=self._train_mode,
            on_message=self.callbacks.on_message,
            on_calibration=self._calibrated,
            state=GuardState(**self.progress.guard),
        )
        self.guard.start(self._calibration_batch)
        self.optimizer = create_optimizer(model, settings)
        self.scheduler = create_scheduler(self.optimizer, settings, self.total)
        amp = settings.amp == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp)
        if resume is not None:
            resume.restore(self.optimizer, self.scaler, device)

    def _choose_parameters(self) -> None:
        if self.settings.stages is None:
            return
        chosen = self.model.pick(self.settings.stages)
        self.model.requires_grad_(False)
        for stage in chosen.values():
            stage.requires_grad_(True)

    def _switch_scheme(self) -> None:
        """Switch the forward rule where the method is tied to one, saying so."""
        adjoint = self.settings.adjoint_choice()
        scheme = adjoint.required_scheme
        if scheme is None or all(self.model.stages[n].spec.scheme == scheme for n in self.stage_names):
            return
        batch = self._some_images()
        self.model.eval()
        with torch.no_grad():
            before = self.model(batch)
            self.model.use_scheme(scheme)
            after = self.model(batch)
        self.progress.switched = {
            "max_logit_difference": (before - after).abs().max().item(),
            "top1_agreement": (before.argmax(1) == after.argmax(1)).double().mean().item(),
        }
        self.callbacks.on_message(
            f"adjoint {adjoint.name}: the forward rule is now {scheme}; on {len(batch)} images the logits"
            f" changed by up to {self.progress.switched['max_logit_difference']:.3g}, and"
            f" {self.progress.switched['top1_agreement']:.1%} of the predictions stayed"
        )
        self.model.info = self.model.info.with_command("switch-scheme", scheme=scheme, **self.progress.switched)

    def _some_images(self) -> Tensor:
        data = self.test if self.test is not None else self.train
        return next(batches(data, 32)).images.to(self.device)

    def _calibration_batch(self) -> tuple[Tensor, Tensor]:
        """Training images, evenly spaced: neighbours in a folder are of one class."""
        count = min(CALIBRATION_IMAGES, self.settings.batch_size, len(self.train))
        order = [i * len(self.train) // count for i in range(count)]
        batch = next(batches(self.train, count, order=order))
        return batch.images.to(self.device), batch.labels.to(self.device)

    def _calibrated(self, calibration: Calibration) -> None:
        self.calibration = calibration
        chosen = {c.stage: {"adjoint": c.adjoint.label, "error": c.error} for c in calibration.choices}
        self.model.info = self.model.info.with_command("calibrate", step=self.progress.step, stages=chosen)
        self.callbacks.on_calibration(calibration)

    def _train_mode(self) -> None:
        self.model.train()
        if self.settings.bn == "frozen":
            freeze_batch_norm(self.model)

    def run(self) -> FinetuneResult:
        progress, first = self.progress, self.progress.step
        self.log = run_folder.Log(self.lock.ensure() / "log.csv", self.stage_names, keep_up_to=first)
        began = time.perf_counter()
        try:
            interrupted = self._train()
        except Stopped:
            if progress.step == first:
                raise
            interrupted = True
            self._save_state()
        except Exception:
            # The step in progress is lost, the one before is not: between steps the model is as that one left it.
            if not self.halfway and progress.step > first:
                self._save_state()
                self.callbacks.on_message(f"step {progress.step} is saved; --resume goes on from there")
            raise
        finally:
            if progress.step == 0:  # a run that never began is none
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
            {name: self.model.stages[name].adjoint.label for name in self.stage_names},
            progress.switched,
            tuple(self.guard.state.moved_to_anchors),
            self.guard.state.recalibrations,
            self.calibration,
        )

    def _train(self) -> bool:
        """Whether it was interrupted. A signal may end it anywhere but in the blocks that are `_undisturbed`."""
        settings, progress = self.settings, self.progress
        if self.test is not None and progress.step == 0:
            self.before = self._evaluate()
            self.log.test(0, 0, self.before)
        elif self._evaluation_is_due():  # the run was stopped before it
            self._choose_best()
            self._save_state()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.last_step_at = time.perf_counter()
        for batch in self._batches():
            with self._undisturbed():
                record = self._step(batch)
                self.callbacks.on_step(record)
                figures = (value for stages in record.monitor.values() for value in stages.values())
                progress.window.append([record.loss, record.accuracy, *figures])
                last = progress.step == self.total
                if progress.step % settings.log_every == 0 or last:
                    self._move_log()
                    self.log.train(record, progress.window)
                    progress.window.clear()
            interrupted = self.callbacks.should_stop()
            if self._evaluation_is_due() and not interrupted:
                self._choose_best()
                self.last_step_at = time.perf_counter()
            if interrupted or last or progress.step % settings.save_every == 0:
                self._save_state()
            if interrupted:
                return True
        return False

    def _evaluation_is_due(self) -> bool:
        step = self.progress.step
        end_of_epoch = step % self.per_epoch == 0 and (step // self.per_epoch) % self.settings.eval_every == 0
        due = step > 0 and (end_of_epoch or step == self.total)
        return self.test is not None and due and self.progress.evaluated < step

    def _choose_best(self) -> None:
        self.after = self._evaluate()
        with self._undisturbed():
            step = self.progress.evaluated = self.progress.step
            self._move_log()
            self.log.test(step, (step - 1) // self.per_epoch + 1, self.after)
            if self.after.top1 > self.progress.best_top1:
                self.progress.best_top1 = self.after.top1
                self._save_model("best")

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """A signal waits for the end of the block. `halfway` stays set if it ends badly."""
        with self.callbacks.deferred():
            self.halfway = True
            yield
            self.halfway = False

    def _move_log(self) -> None:
        self.log.path = self.lock.ensure() / self.log.path.name

    def _batches(self) -> Iterator[Batch]:
        """Training batches from where the run stands, epoch after epoch."""
        while self.progress.step < self.total:
            epoch, done = divmod(self.progress.step, self.per_epoch)
            self.train.epoch = epoch
            generator = torch.Generator().manual_seed(self.settings.seed + 7919 * epoch)
            order = torch.randperm(len(self.train), generator=generator).tolist()
            epoch_batches = batches(
                self.train,
                self.settings.batch_size,
                order=order,
                workers=self.settings.workers,
                drop_last=True,
                skip=done,
            )
            for batch in epoch_batches:
                if self.progress.step == self.total:
                    return
                if len(batch.labels) == 0:
                    raise ResodeError(f"a whole batch of corrupt images: {batch.skipped[0]} and others")
                yield batch

    def _step(self, batch: Batch) -> StepRecord:
        settings = self.settings
        self.scheduler.step_update(self.progress.step)
        self._train_mode()
        images, labels = batch.images.to(self.device), batch.labels.to(self.device)
        random = RandomState.now(self.device)
        loss, accuracy, monitor = self._forward_backward(images, labels)
        while self.guard.must_redo(monitor["drift"], images, labels, self.progress.step + 1):
            # The gradient is thrown away and taken again: same random numbers, and running
            # statistics that have moved once already.
            random.restore()
            with fixed_buffers([self.model]):
                loss, accuracy, monitor = self._forward_backward(images, labels)
        if settings.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_grad)
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < scale:
            self.callbacks.on_message(
                f"step {self.progress.step + 1}: a gradient overflowed in fp16, so the step was skipped and the loss"
                f" scale lowered to {self.scaler.get_scale():g}"
            )
        self.progress.step += 1
        now = time.perf_counter()
        speed, self.last_step_at = len(labels) / (now - self.last_step_at), now
        return StepRecord(
            self.progress.step,
            self.total,
            (self.progress.step - 1) // self.per_epoch + 1,
            loss,
            accuracy,
            lr,
            speed,
            peak_bytes(self.device),
            monitor,
        )

    def _forward_backward(self, images: Tensor, labels: Tensor) -> tuple[float, float, dict[str, dict[str, float]]]:
        """Loss and accuracy on a batch, the monitor's figures, and .grad set."""
        with self._autocast():
            loss, logits = self.objective(images, labels)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self.scaler.scale(loss))
        # One transfer per step: the loss, the accuracy and every stage's figures together.
        accuracy = (logits.argmax(1) == labels).float().mean()
        values = torch.stack([loss.detach().float(), accuracy, *self.guard.figures()]).tolist()
        if not math.isfinite(values[0]):
            state = self.lock.folder / run_folder.STATE
            saved = f"{state} holds the last saved step" if state.is_file() else "nothing was saved yet"
            raise ResodeError(
                f"the loss is {values[0]} at step {self.progress.step + 1}; {saved}."
                " Try a lower --lr, --clip-grad, or --adjoint checkpoint"
            )
        return values[0], values[1], self.guard.read(values[2:])

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = AMP[self.settings.amp]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

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
        model_file.save(self._described(), self.lock.ensure() / f"{name}.safetensors")

    def _save_state(self) -> None:
        """The state first: it alone is enough to go on; the last model is there for the other commands."""
        with self._undisturbed():
            run_folder.save_state(
                self.lock.ensure() / run_folder.STATE,
                self.model,
                optimizer=self.optimizer,
                scaler=self.scaler,
                progress={**asdict(self.progress), "guard": asdict(self.guard.state)},
                settings=asdict(self.settings),
                fingerprint=self.fingerprint(self.train, self.settings),
            )
            self._save_model("last")

    @staticmethod
    def fingerprint(train: ImageData, settings: Settings) -> dict[str, Any]:
        """What must not change under a resumed run: its position in the data would mean something else."""
        return {"images": len(train), "batch_size": settings.batch_size, "seed": settings.seed}


def check_resumable(state: run_folder.State, train: ImageData, settings: Settings) -> None:
    """Raises UsageError for a run whose data, batch size or seed are not the ones it began with."""
    now = _Run.fingerprint(train, settings)
    changed = [f"{k} was {state.fingerprint[k]}, is {v}" for k, v in now.items() if state.fingerprint.get(k) != v]
    if changed:
        raise UsageError(f"--resume cannot change the order of images: {'; '.join(changed)}")


def peak_bytes(device: torch.device) -> int:
    """Largest memory so far: allocated on a GPU, resident size of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
