"""Fit a deepened or tied network to the one it came from, on images without labels.

    blocks   every run of steps alone: its end state should be the teacher's, from where the student's own run starts
    stages   the same states, with gradients through the whole stage
    logits   end to end: the teacher's logits at a temperature (Hinton et al. 2015)
    refine   the same at full depth, where the others ran at a smaller one

A run of steps of one block integrates an ODE for the time of that block, and its weights do not depend on
the number of steps. So what is learned with a few steps per run carries over to many, and only the last
phase pays for depth.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..data import Batch, ImageData, batches
from ..data.workers import WorkerDied, WorkersStuck
from ..errors import ResodeError
from ..machine.memory import free_bytes
from ..machine.signals import Stopped
from ..network.labels_loss import same_labels
from ..network.model import OdeResNet
from ..ode import Adjoint, fixed_buffers, peak_kept_bytes
from ..surgery.batch_norm import batch_norms, recalibrate
from ..surgery.steps import deepened
from ..training.loop import INTERRUPTED, SEEDS_APART, Loop, epoch_generator, shuffled, training_batches
from ..training.results import Progress
from ..training.settings import Settings
from ..training.teacher import Teacher, distillation_loss
from .early_stop import Patience
from .images import FitData, held_out
from .penalties import penalty
from .results import FitCallbacks, FitResult, FitStep, HeldOutErrors, PhaseCost, PhaseResult
from .settings import TO_STATES, FitSettings
from .states import StateLosses, check_states, recorded

RECALIBRATED = 1000  # images over which BatchNorm statistics are averaged
PREDICTED_ON = 8  # images on which time and memory are predicted
WEIGHT_COPIES = 4  # weights, gradients, and Adam's two
SHARE = 0.5  # of the free memory that plain backprop may take before exact checkpoints take its place
SETTLED = 1e-3  # of √e_k: states that need no fit
AGREED = 1e-6  # of the distillation loss
SEEDS_APART_IN_A_FIT = 1_000_003  # of two fits, so that no epoch of one is an epoch of another


def fit(
    model: OdeResNet,
    teacher: Teacher,
    data: FitData,
    *,
    settings: FitSettings,
    device: torch.device,
    coarse: Mapping[str, int] | None = None,
    depths: Mapping[str, int] | None = None,
    depth_weights: str | None = None,
    callbacks: FitCallbacks | None = None,
) -> FitResult:
    """Fit `model` to `teacher`, in place. Labels are not looked at.

    coarse, depths: steps of each stage in all phases but the last, and at the end; None: as they are.
    depth_weights: as for `deepen`, which brings the stages to these depths.

    Every phase is judged on images held out of it, and undone if it made things worse. At the end the
    model has its final depth, however far the fit came. Raises UsageError for a teacher that does not match.
    """
    return _Fit(model, teacher, data, settings, device, coarse, depths, depth_weights, callbacks).run()


class _Fit:
    def __init__(
        self,
        model: OdeResNet,
        teacher: Teacher,
        data: FitData,
        settings: FitSettings,
        device: torch.device,
        coarse: Mapping[str, int] | None,
        depths: Mapping[str, int] | None,
        depth_weights: str | None,
        callbacks: FitCallbacks | None,
    ) -> None:
        self.model, self.teacher, self.data = model.to(device), teacher.to(device), data
        self.settings, self.device, self.callbacks = settings, device, callbacks or FitCallbacks()
        self.depths = dict(depths or {})
        self.coarse = dict(coarse or self.depths)
        self.depth_weights = depth_weights
        self.interrupted = self.recalibrated = False
        self.stepped = False  # whether there is anything to keep
        self.died: WorkerDied | None = None  # what ended a phase before its time
        self.results: list[PhaseResult] = []
        self.seen = 0  # batches drawn so far
        needed = set(TO_STATES) & set(settings.phases) or settings.states or settings.contract
        self.source = check_states(model, teacher) if needed else None
        self.seed = settings.seed * SEEDS_APART_IN_A_FIT + SEEDS_APART  # epoch -1 is the statistics' own
        count = len(data.plain)
        self.held_out = held_out(count)
        kept = set(self.held_out)
        self.trained = [i for i in range(count) if i not in kept]
        self.batch_size = min(settings.batch_size, len(self.trained))

    def run(self) -> FitResult:
        began = time.perf_counter()
        self.model.eval()
        try:
            self._phases()
        except Stopped as stopped:
            if not self.stepped:
                raise
            stopped.heeded = self.interrupted = True
        with self.callbacks.deferred():
            self._deepen(self.depths)
            self.model.eval()
        return FitResult(tuple(self.results), self.recalibrated, time.perf_counter() - began, self.interrupted)

    def _phases(self) -> None:
        """A signal may end it anywhere but in the blocks that are `deferred`."""
        phases = [phase for phase in self.settings.phases if self.settings.steps_of(phase)]
        if not phases:
            return
        self._deepen(self.coarse)
        costs = self._costs(phases)
        self.callbacks.on_costs(costs)
        self.recalibrated = self._recalibrate()
        for cost in costs:
            self.interrupted = self.interrupted or self.callbacks.should_stop()
            if self.interrupted:
                return
            with self.callbacks.deferred():
                self._deepen(cost.depths)
            self.model.use_adjoint(Adjoint(cost.adjoint))
            self._phase(cost.phase)

    def _deepen(self, depths: Mapping[str, int]) -> None:
        for name, blocks in depths.items():
            stage = self.model.stages[name]
            self.model.replace_stage(name, deepened(stage, blocks, depth_weights=self.depth_weights))

    def _finished(self) -> OdeResNet:
        """A copy of final depth."""
        mine, self.model = self.model, copy.deepcopy(self.model)
        try:
            self._deepen(self.depths)
            return self.model.eval()
        finally:
            self.model = mine

    def _costs(self, phases: Sequence[str]) -> list[PhaseCost]:
        """Predicted from one step of each phase on a few images."""
        mine, costs = self.model, []
        few = min(PREDICTED_ON, self.batch_size, len(self.held_out))
        batch = next(self._batches(self.data.plain, self.held_out[:few]))
        if not len(batch.labels):
            raise ResodeError("no image could be read")
        scale = self.batch_size / len(batch.labels)
        weights = sum(p.nbytes for p in self.model.parameters())
        try:
            self.model = copy.deepcopy(mine)
            for phase in phases:
                self._deepen(self.depths if phase == "refine" else self.coarse)
                depths = {name: stage.spec.depth for name, stage in self.model.stages.items() if stage.spec.depth}
                for adjoint in ("backprop", "checkpoint"):
                    self.model.use_adjoint(Adjoint(adjoint))
                    seconds, kept = self._probe(phase, batch.images.to(self.device))
                    total = int(kept * scale) + WEIGHT_COPIES * weights
                    if total < SHARE * free_bytes(self.device):
                        break
                steps = self.settings.steps_of(phase)
                costs.append(PhaseCost(phase, depths, steps, seconds * scale * steps, total, adjoint))
        finally:
            self.model = mine
        return costs

    def _probe(self, phase: str, images: Tensor) -> tuple[float, int]:
        """Seconds of a step, the second one, and the bytes that it keeps at most."""
        with fixed_buffers([self.model]):
            self._train_mode()
            with peak_kept_bytes(self.model.parameters()) as count:
                self._backward(phase, images)
            began = time.perf_counter()
            self._backward(phase, images)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self.model.zero_grad(set_to_none=True)
        states = sum(t.nbytes for targets in self._targets(images)[0].values() for t in targets)
        return time.perf_counter() - began, count() + states

    def _recalibrate(self) -> bool:
        if self.settings.bn == "keep" or not any(True for _ in batch_norms(self.model)):
            return False
        before, backup = self._check(), self._backup()
        order = shuffled(self.trained, seed=self.seed, epoch=-1)[:RECALIBRATED]
        recalibrate(self.model, self._batches(self.data.plain, order), device=self.device)
        after = self._check()
        kept = after.distillation < before.distillation or self.settings.bn == "batch"
        if not kept:
            self._restore(backup)
        self.callbacks.on_message(
            f"BatchNorm statistics, estimated again: distillation loss {before.distillation:.3g} →"
            f" {after.distillation:.3g}" + ("" if kept else " (undone: it made things worse)")
        )
        return kept

    def _phase(self, phase: str) -> None:
        began = time.perf_counter()
        depths = {name: stage.spec.depth for name, stage in self.model.stages.items() if stage.spec.depth}
        before, backup = self._check(), self._backup()
        after, steps, ended = before, 0, "settled"
        if not self._settled(phase, before):
            steps, ended = self._optimise(phase)
        with self.callbacks.deferred():
            if steps:
                after = self._check()
                if not self._score(phase, after) < self._score(phase, before):
                    self._restore(backup)
                    after, ended = before, ended if ended == INTERRUPTED else "reverted"
            result = PhaseResult(phase, depths, steps, time.perf_counter() - began, before, after, ended)
            self.results.append(result)
            self.callbacks.on_phase(result, self._finished())
        if self.died is not None:
            raise self.died

    def _settled(self, phase: str, figures: HeldOutErrors) -> bool:
        if self.settings.smooth or self.settings.contract:
            return False
        if phase in ("blocks", "stages"):
            return max(e for errors in figures.states.values() for e in errors) < SETTLED
        return figures.distillation < AGREED

    def _score(self, phase: str, figures: HeldOutErrors) -> float:
        """What a phase lowers. NaN, which is not below anything, where it diverged."""
        state = figures.state_error
        fitted = state if phase in TO_STATES else figures.distillation + self.settings.states * state
        return fitted + figures.penalty

    def _optimise(self, phase: str) -> tuple[int, str]:
        settings, total = self.settings, self.settings.steps_of(phase)
        training = Settings(
            optimizer="adam",
            lr=settings.lr_of(phase),
            weight_decay=0.0,
            schedule="cosine",
            warmup=max(total // 10, 1),
            clip_grad=settings.clip_grad,
            adjoint="backprop",
        )
        progress, patience = Progress(), Patience()
        loop = Loop(
            self.model,
            training,
            self.device,
            progress,
            total=total,
            should_stop=self.callbacks.should_stop,
            deferred=self.callbacks.deferred,
        )

        def take(batch: Batch) -> tuple[float, dict[str, list[float]]]:
            self._train_mode()
            found = self._backward(phase, batch.images.to(self.device))
            loop.update()
            return found

        def stepped(found: tuple[float, dict[str, list[float]]]) -> None:
            self.stepped = True
            self.callbacks.on_step(FitStep(phase, progress.step, total, *found))

        def between(found: tuple[float, dict[str, list[float]]]) -> str | None:
            # Before, the rate is high, and a loss that stays where it is says nothing.
            return "early" if progress.step > total // 2 and patience.exhausted(found[0]) else None

        try:
            ended = loop.run(self._stream(), take, stepped, between)
        except WorkersStuck:  # the phase cannot be judged: this process would wait for the same file
            raise
        except WorkerDied as died:  # its steps are kept as a signal's are; what follows reads images in this process
            self.died, self.settings = died, replace(settings, workers=0)
            return progress.step, INTERRUPTED
        self.interrupted = ended == INTERRUPTED
        return progress.step, ended

    def _train_mode(self) -> None:
        """Dropout stays off: what is fitted is the function that is used."""
        self.model.eval()
        if self.settings.bn == "batch":
            for norm in batch_norms(self.model):
                norm.train()

    def _backward(self, phase: str, images: Tensor) -> tuple[float, dict[str, list[float]]]:
        """Gradients of a phase's loss on a batch; the loss, and the states' errors where they are matched."""
        settings = self.settings
        targets, logits = self._targets(images)
        terms: list[Tensor] = []
        errors: dict[str, list[float]] = {}
        loss = 0.0
        if phase in TO_STATES or settings.states:
            cut = phase if phase in ("blocks", "stages") else ""
            losses = StateLosses(self.model, targets, cut=cut, backward=True)
            with losses.watching():
                out = self.model(images)
            errors = losses.errors
            if losses.total is not None:  # nothing was cut off
                count = sum(len(stage) for stage in errors.values())
                terms.append(losses.total * (settings.states / count))
            mean = [e**2 for stage in errors.values() for e in stage]
            loss += sum(mean) / len(mean) * (1.0 if cut else settings.states)
        else:
            out = self.model(images)
        if phase in ("logits", "refine"):
            terms.append(self._distillation(out, logits))
            loss += terms[-1].item()
        penalised = self._penalty(targets, epoch_generator(self.seed, self.seen))
        if penalised is not None:
            terms.append(penalised)
            loss += penalised.item()
        if terms:
            torch.autograd.backward(torch.stack(terms).sum())
        return loss, errors

    def _distillation(self, out: Tensor, logits: Tensor) -> Tensor:
        several = self.model.info.multi_label
        return distillation_loss(out, logits, self.settings.temperature, several=several)

    def _targets(self, images: Tensor) -> tuple[dict[str, list[Tensor]], Tensor]:
        if self.source is None:
            return {}, self.teacher.logits(images)
        with recorded(self.source) as states:
            logits = self.teacher.logits(images)
        return states, logits

    def _penalty(self, states: Mapping[str, list[Tensor]], generator: torch.Generator) -> Tensor | None:
        settings = self.settings
        return penalty(self.model, states, smooth=settings.smooth, contract=settings.contract, generator=generator)

    def _check(self) -> HeldOutErrors:
        """The figures on the held-out images."""
        self.model.eval()
        images = agreed = 0
        distillation = penalties = 0.0
        squares: dict[str, Tensor] = {}
        for batch in self._batches(self.data.plain, self.held_out):
            if not len(batch.labels):
                continue
            x = batch.images.to(self.device)
            with torch.no_grad():
                targets, logits = self._targets(x)
                losses = StateLosses(self.model, targets, cut="", backward=False)
                with losses.watching():
                    out = self.model(x)
            # The same draws every time, so that figures can be compared.
            found = self._penalty(targets, torch.Generator().manual_seed(self.settings.seed))
            n = len(x)
            penalties += n * (found.item() if found is not None else 0.0)
            distillation += n * self._distillation(out, logits).item()
            agreed += int(same_labels(out, logits, several=self.model.info.multi_label).sum())
            for name, errors in losses.losses.items():
                squares[name] = squares.get(name, torch.zeros(())) + n * torch.stack(errors).cpu()
            images += n
        if not images:
            raise ResodeError("no image could be read")
        states = {name: (total / images).sqrt().tolist() for name, total in squares.items()}
        return HeldOutErrors(distillation / images, agreed / images, states, penalties / images)

    def _stream(self) -> Generator[Batch, None, None]:
        """Training batches without end, from where the last phase stopped; those that hold no image are left out."""
        source = training_batches(
            self.data.train,
            self.trained,
            self.batch_size,
            seed=self.seed,
            epoch=self.seen // (len(self.trained) // self.batch_size),
            workers=self.settings.workers,
            device=self.device,
        )
        for batch in source:
            self.seen += 1
            if len(batch.labels):
                yield batch

    def _batches(self, data: ImageData, order: Sequence[int]) -> Iterator[Batch]:
        return batches(data, self.batch_size, order=order, workers=self.settings.workers, device=self.device)

    def _backup(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def _restore(self, backup: dict[str, Tensor]) -> None:
        self.model.load_state_dict(backup)
