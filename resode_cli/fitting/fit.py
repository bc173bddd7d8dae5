"""Fit a deepened or tied network to the one it came from, on images without labels.

    blocks   every run of steps alone: its end state should be the teacher's, from where the student's own run starts
    stages   the same states, with gradients through the whole stage
    logits   end to end: the teacher's logits
    refine   the same at full depth, where the others ran at a smaller one

A run of steps of one block integrates an ODE for the time of that block. A few steps of another rule do nearly what its
many Euler steps do (`ode.composed_euler`), with the same weights: all phases but the last take those, and only the last
pays for depth.

Where nobody says how many training steps a phase takes, it goes on in rounds, each twice as long as the one before,
while a round still gains on images held out of it and time allows. A round that made things worse is undone, and the
next has a lower rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from ..data import Batch, ImageData, batches
from ..data.workers import WorkerDied, WorkersStuck
from ..errors import ResodeError
from ..machine.signals import Stopped
from ..network.model import OdeResNet
from ..ode import Adjoint
from ..surgery.batch_norm import recalibrate
from ..training.loop import INTERRUPTED, SEEDS_APART, Loop, epoch_generator, shuffled, training_batches
from ..training.results import Progress
from ..training.settings import Settings
from ..training.teacher import Teacher
from .costs import phase_costs
from .early_stop import Patience
from .images import FitData, held_out
from .objective import Found, Objective
from .results import FitCallbacks, FitResult, FitStep, HeldOutErrors, PhaseResult
from .rounds import FEWEST, PROBED_OVER, RATES, Rounds, largest
from .settings import TO_STATES, FitSettings
from .student import Student, coarse

RECALIBRATED = 1000  # images over which BatchNorm statistics are averaged
SETTLED = 1e-3  # of √e_k: states that need no fit
AGREED = 1e-6  # of the logits' loss
SEEDS_APART_IN_A_FIT = 1_000_003  # of two fits, so that no epoch of one is an epoch of another


def fit(
    model: OdeResNet,
    teacher: Teacher,
    data: FitData,
    *,
    settings: FitSettings,
    device: torch.device,
    depths: Mapping[str, int] | None = None,
    depth_weights: str | None = None,
    callbacks: FitCallbacks | None = None,
) -> FitResult:
    """Fit `model` to `teacher`, in place. Labels are not looked at.

    depths: steps of each stage at the end; None: as they are. depth_weights: as for `deepen`, which brings the stages
    to these depths.

    Every round of a phase is judged on images held out of it, and undone if it made things worse. At the end the
    model has its final depth, however far the fit came. Raises UsageError for a teacher that does not match.
    """
    return _Fit(model, teacher, data, settings, device, depths, depth_weights, callbacks).run()


class _Fit:
    def __init__(
        self,
        model: OdeResNet,
        teacher: Teacher,
        data: FitData,
        settings: FitSettings,
        device: torch.device,
        depths: Mapping[str, int] | None,
        depth_weights: str | None,
        callbacks: FitCallbacks | None,
    ) -> None:
        self.model, self.data = model.to(device), data
        self.objective = Objective(self.model, teacher.to(device), settings, device)
        self.settings, self.device, self.callbacks = settings, device, callbacks or FitCallbacks()
        depths = dict(depths or {})
        own = {name: self.model.stages[name].spec.depth for name in depths}
        self.student = Student(self.model, own, depths, depth_weights)
        self.interrupted = self.recalibrated = self.out_of_time = False
        self.stepped = False  # whether there is anything to keep
        self.died: WorkerDied | None = None  # what ended a phase before its time
        self.results: list[PhaseResult] = []
        self.agreement = 0.0  # with the teacher, when it was last looked at
        self.rate: float | None = None  # that the last phase end to end came to
        self.seen = 0  # batches drawn so far
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
            self.student.take_to(self.student.depths)
            self.model.eval()
        seconds = time.perf_counter() - began
        return FitResult(tuple(self.results), self.recalibrated, seconds, self.interrupted, self.out_of_time)

    def _phases(self) -> None:
        """A signal may end it anywhere but in the blocks that are `deferred`."""
        phases = [phase for phase in self.settings.phases if self.settings.steps_of(phase) != 0]
        if not phases:
            return
        began = time.perf_counter()
        batch = next(self._batches(self.data.plain, shuffled(self.trained, seed=self.seed, epoch=-1)))
        if not len(batch.labels):
            raise ResodeError("no image could be read")
        fewer = coarse(self.student, self.objective, batch)
        self.student.take_to(fewer)
        self.recalibrated = self._recalibrate()
        costs = phase_costs(self.student, self.objective, batch, phases, fewer, self.batch_size)
        self.callbacks.on_costs(costs)
        rounds = Rounds(costs, self.settings.minutes * 60, began=began)
        to_states = False  # was the phase before
        for cost in costs:
            self.interrupted = self.interrupted or self.callbacks.should_stop()
            if self.interrupted:
                return
            if to_states and cost.phase not in TO_STATES:  # the norms that follow a stage were left as they were
                self.recalibrated = self._recalibrate() or self.recalibrated
            to_states = cost.phase in TO_STATES
            with self.callbacks.deferred():
                self.student.take_to(cost.depths)
            self.model.use_adjoint(Adjoint(cost.adjoint))
            self._phase(cost.phase, cost.steps, rounds)

    def _phase(self, phase: str, steps: int | None, rounds: Rounds) -> None:
        """So many training steps; None: round by round, while a round gains and time allows."""
        rounds.begin(phase)
        figures = self._check()
        if self._settled(phase, figures):
            self._round(phase, 0, 0.0, figures)
            return
        rate = self._rate(phase, steps, rounds)
        if steps is not None and not self.interrupted:
            self._round(phase, steps, rate, figures)
        while steps is None and not self.interrupted and (planned := rounds.steps()):
            result = self._round(phase, planned, rate, figures, number=rounds.number, overdue=rounds.overdue)
            before, after = (self.objective.score(phase, found) for found in (figures, result.after))
            rounds.ended(result, before, after)
            figures = result.after
            rate *= rounds.slower
            self.interrupted = self.interrupted or self.callbacks.should_stop()
        self.out_of_time = self.out_of_time or rounds.out_of_time
        if phase not in TO_STATES:
            self.rate = rate

    def _rate(self, phase: str, steps: int | None, rounds: Rounds) -> float:
        """The peak learning rate: as asked for, as the phase before it found, or as found by a probe.

        A probe is a phase of few steps, and is judged as one. It tells how long a step takes, too. A phase that is
        hardly longer than that takes the lowest rate.
        """
        if (asked := self.settings.lr_of(phase)) is not None:
            return asked
        if phase == "refine" and self.rate is not None:
            return self.rate / 2
        if not rounds.bears_a_probe(phase, steps):
            return min(RATES)
        few = list(islice(self._stream(), PROBED_OVER))
        backup, scores, seconds = self.student.backup(), dict[float, float](), 0.0
        try:
            for rate in RATES:
                began = time.perf_counter()
                self._optimise(phase, len(few), rate, (batch for batch in few), probe=True)
                seconds += time.perf_counter() - began
                if self.interrupted:
                    return rate
                scores[rate] = self.objective.score(phase, self._check())
                self.student.restore(backup)
        finally:
            with self.callbacks.deferred():
                self.student.restore(backup)
        rounds.measured(phase, seconds / (len(RATES) * len(few)))
        found = largest(scores)
        tried = ", ".join(f"{score:.3g} at {rate:g}" for rate, score in scores.items())
        self.callbacks.on_message(f"{phase}: learning rate {found:g}; loss after {len(few)} steps: {tried}")
        return found

    def _recalibrate(self) -> bool:
        if self.settings.bn == "keep" or not self.student.has_statistics():
            return False
        before, backup, kept = self._check(), self.student.backup(), False
        order = shuffled(self.trained, seed=self.seed, epoch=-1)[:RECALIBRATED]
        try:
            recalibrate(self.model, self._batches(self.data.plain, order), device=self.device)
            after = self._check()
            kept = after.logits < before.logits or self.settings.bn == "batch"
        finally:
            if not kept:
                with self.callbacks.deferred():
                    self.student.restore(backup)
        self.callbacks.on_message(
            f"BatchNorm statistics, estimated again: loss of the logits {before.logits:.3g} →"
            f" {after.logits:.3g}" + ("" if kept else " (undone: it made things worse)")
        )
        return kept

    def _round(
        self,
        phase: str,
        steps: int,
        rate: float,
        before: HeldOutErrors,
        *,
        number: int = 1,
        overdue: Callable[[], bool] = lambda: False,
    ) -> PhaseResult:
        """So many training steps, which are undone where they made things worse."""
        began, backup = time.perf_counter(), self.student.backup()
        self.agreement = before.agreement
        after, taken, ended, training = before, 0, "settled", 0.0
        if steps and not self._settled(phase, before):
            taken, ended = self._optimise(phase, steps, rate, self._stream(), number=number, overdue=overdue)
            training = time.perf_counter() - began
        with self.callbacks.deferred():
            if taken:
                after = self._check()
                if not self.objective.score(phase, after) < self.objective.score(phase, before):
                    self.student.restore(backup)
                    after, ended = before, ended if ended == INTERRUPTED else "reverted"
            seconds = time.perf_counter() - began
            depths = self.student.present
            result = PhaseResult(phase, depths, taken, seconds, before, after, ended, number, rate, training)
            self.results.append(result)
            self.callbacks.on_phase(result, self.student.finished())
        if self.died is not None:
            raise self.died
        return result

    def _settled(self, phase: str, figures: HeldOutErrors) -> bool:
        if self.settings.smooth or self.settings.contract:
            return False
        if phase in TO_STATES:
            return max(e for errors in figures.states.values() for e in errors) < SETTLED
        return figures.logits < AGREED

    def _optimise(
        self,
        phase: str,
        total: int,
        rate: float,
        stream: Generator[Batch, None, None],
        *,
        number: int = 1,
        probe: bool = False,
        overdue: Callable[[], bool] = lambda: False,
    ) -> tuple[int, str]:
        """Take so many steps; how many were taken, and what ended them.

        probe: no one hears of them. overdue: whether they take too long.
        """
        settings = self.settings
        training = Settings(
            optimizer="adam",
            lr=rate,
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

        def take(batch: Batch) -> Found:
            self.objective.train_mode(self.model)
            found = self._backward(phase, batch.images.to(self.device))
            loop.update()
            return found

        def stepped(found: Found) -> None:
            if probe:
                return
            self.stepped = True
            self.callbacks.on_step(FitStep(phase, progress.step, total, *found, number, self.agreement))

        def between(found: Found) -> str | None:
            # Before, the rate is high, and a loss that stays where it is says nothing.
            if progress.step > total // 2 and patience.exhausted(found[0]):
                return "early"
            return "late" if progress.step >= FEWEST and overdue() else None

        try:
            ended = loop.run(stream, take, stepped, between)
        except WorkersStuck:  # the phase cannot be judged: this process would wait for the same file
            raise
        except WorkerDied as died:  # its steps are kept as a signal's are; what follows reads images in this process
            self.died, self.settings = died, replace(settings, workers=0)
            return progress.step, INTERRUPTED
        self.interrupted = ended == INTERRUPTED
        return progress.step, ended

    def _backward(self, phase: str, images: Tensor) -> Found:
        return self.objective.backward(self.model, phase, images, epoch_generator(self.seed, self.seen))

    def _check(self) -> HeldOutErrors:
        return self.objective.check(self.model, self._batches(self.data.plain, self.held_out))

    def _stream(self) -> Generator[Batch, None, None]:
        """Training batches without end, from where the last phase stopped; those that hold no image are left out."""
        per_epoch = len(self.trained) // self.batch_size
        source = training_batches(
            self.data.train,
            self.trained,
            self.batch_size,
            seed=self.seed,
            epoch=self.seen // per_epoch,
            skip=self.seen % per_epoch,
            workers=self.settings.workers,
            device=self.device,
        )
        empty = 0
        for batch in source:
            self.seen += 1
            if len(batch.labels):
                empty = 0
                yield batch
            elif (empty := empty + 1) > per_epoch:
                raise ResodeError("no image of those that are trained on could be read")

    def _batches(self, data: ImageData, order: Sequence[int]) -> Iterator[Batch]:
        return batches(data, self.batch_size, order=order, workers=self.settings.workers, device=self.device)
