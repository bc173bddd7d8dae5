"""The loop over training steps, which `finetune` and every phase of a fit share."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from itertools import count
from typing import Any, TypeVar

import torch
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from ..data import Batch, ImageData, Key, read
from ..errors import ResodeError, first_few
from ..machine.processes import ALONE, EndedElsewhere, Processes
from ..machine.signals import Stopped
from .balance import balanced_order
from .optimization import clipped_parameters, create_optimizer, create_scheduler
from .plateau import plateau_of
from .results import Progress
from .settings import Settings
from .starting import autocast_of

Taken = TypeVar("Taken")

DONE, INTERRUPTED = "done", "interrupted"
SEEDS_APART = 7919  # between the seeds of two epochs


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The random numbers of an epoch, whatever was drawn before it."""
    return torch.Generator().manual_seed(seed + SEEDS_APART * epoch)


def shuffled(items: Sequence[int], *, seed: int, epoch: int) -> list[int]:
    """The items in the random order of an epoch."""
    order = torch.randperm(len(items), generator=epoch_generator(seed, epoch)).tolist()
    return [items[i] for i in order]


def training_batches(
    data: ImageData,
    chosen: Sequence[int],
    size: int,
    *,
    seed: int,
    epoch: int,
    skip: int = 0,
    workers: int | str = 0,
    device: torch.device | str = "cpu",
    labels: Sequence[int] | None = None,
    accumulate: int = 1,
    processes: Processes = ALONE,
) -> Generator[Batch, None, None]:
    """Full batches of the chosen images without end, from an epoch on, each epoch in an order of its own.

    skip: batches of the first epoch that are left out. One loader reads them all, so that its workers go on into the
    next epoch while the model is evaluated after this one. workers, device: see `read`. labels: draw each of these
    classes equally often. processes: give this one's part of each; where a batch is to be taken in so many pieces
    (accumulate), its part of each piece.
    """

    piece = -(-size // accumulate)

    def keys() -> Iterator[list[Key]]:
        for number in count(epoch):
            if labels is None:
                order = shuffled(chosen, seed=seed, epoch=number)
            else:
                order = balanced_order(chosen, labels, epoch_generator(seed, number))
            full = max(len(order) // size, 1)  # all there are, where they are no batch
            for batch in range(skip if number == epoch else 0, full):
                whole = order[batch * size : (batch + 1) * size]
                pieces = [whole[a : a + piece] for a in range(0, len(whole), piece)]
                yield [(number, i) for part in pieces for i in processes.share(part)]

    return read(data, keys(), workers=workers, device=device)


def refuse_empty(batch: Batch, processes: Processes = ALONE) -> None:
    """Raises ResodeError for a batch, or this process's part of one, of which no image could be read."""
    if len(batch.labels) == 0:
        names = first_few(list(batch.skipped))
        if processes.alone:
            raise ResodeError(f"a whole batch of corrupt images: {names}")
        raise ResodeError(
            f"one process's whole part of a batch is corrupt images: {names}; remove them, or start fewer processes"
        )


class Loop:
    """The steps of one optimizer over batches of images.

    A step sets the learning rate, lets the caller compute a gradient, and counts. The caller calls `update` where the
    gradient is one to follow. progress: counts the steps, up to `total`; a resumed run has counted some.

    Signals (`deferred`, `should_stop`): a step is never cut in two. A signal that comes while a batch is waited for,
    or between steps, ends the loop at once. Of several processes all end before the next step.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        device: torch.device,
        progress: Progress,
        *,
        total: int,
        should_stop: Callable[[], bool],
        deferred: Callable[[], AbstractContextManager[None]],
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        self.model, self.settings, self.device = model, settings, device
        self.progress, self.total = progress, total
        self.should_stop, self.deferred = should_stop, deferred
        self.halfway = False  # through a step or a save
        self.optimizer = create_optimizer(model, settings)
        self.scheduler = create_scheduler(self.optimizer, settings, total)
        self.plateau = plateau_of(settings, progress.plateau)
        self.clipped = clipped_parameters(model, settings)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")

    def run(
        self,
        source: Generator[Batch, None, None],
        take: Callable[[Batch], Taken],
        stepped: Callable[[Taken], None],
        between: Callable[[Taken], str | None] = lambda taken: None,
    ) -> str:
        """Take steps until something ends them: 'done', 'interrupted', or what `between` answers.

        take: computes the gradient on a batch, and calls `update`. stepped: hears of it, before a signal may come.
        between: what is to be done before the next step; it may be cut short by a signal.
        """
        first = self.progress.step
        with closing(source) as stream:
            try:
                for batch in self._agreed(stream):
                    with self.undisturbed():
                        self.scheduler.step_update(self.progress.step)
                        if self.plateau is not None:
                            self.plateau.lower(self.optimizer)
                        self.optimizer.zero_grad(set_to_none=True)
                        taken = take(batch)
                        self.progress.step += 1
                        self.halfway = False  # the step is taken, even where its row cannot be written
                        stepped(taken)
                    if self.processes.alone and self.should_stop():
                        return INTERRUPTED
                    if ended := between(taken):
                        return ended
                    if self.progress.step == self.total:
                        return DONE
            except Stopped as stopped:
                if self.progress.step == first:
                    raise
                stopped.heeded = True  # or it would come again while the run ends
                return INTERRUPTED
        raise AssertionError("the batches have no end")

    def _agreed(self, stream: Generator[Batch, None, None]) -> Iterator[Batch]:
        """The batches. Of several processes, each has its part of a batch, or all of them end, at the same step.

        Raises the error that reading met in this process, EndedElsewhere for one of another's, and Stopped where a
        signal came to any.
        """
        if self.processes.alone:
            yield from stream
            return
        while True:
            batch, failure = None, None
            try:
                batch = next(stream)
                refuse_empty(batch, self.processes)
            except Exception as error:  # which is raised once the others know
                failure = error
            images = 0 if batch is None else len(batch.labels)
            told = self.processes.gathered([images, failure is not None, self.should_stop()])
            if failure is not None:
                raise failure
            if any(failed for _, failed, _ in told):
                raise EndedElsewhere("another process of this run could not read its images; see what it said")
            if any(stopped for *_, stopped in told):
                raise Stopped(signal.SIGINT)
            assert batch is not None
            yield replace(batch, whole=int(sum(count for count, *_ in told)))

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """A signal waits for the end of the block. `halfway` stays set if it ends badly."""
        with self.deferred():
            self.halfway = True
            yield
            self.halfway = False

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the forward pass."""
        return autocast_of(self.settings, self.device)

    def backward(self, loss: Tensor) -> None:
        """Set the gradients of the loss; in fp16 they are scaled."""
        torch.autograd.backward(self.scaler.scale(loss))

    def update(self) -> bool:
        """Clip the gradient and take the step; whether it was taken: in fp16 an overflow leaves it out."""
        if self.settings.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.clipped, self.settings.clip_grad, mode=self.settings.clip_mode)
        scale = self.scaler.get_scale()
        try:
            self.scaler.step(self.optimizer)
        except RuntimeError as error:
            if "without overflow" not in str(error):
                raise
            too_large = ResodeError("a step of the optimizer is larger than its weights can hold; lower the rate")
            raise self.processes.alike(too_large) from error
        self.scaler.update()
        return self.scaler.get_scale() >= scale

    @property
    def learning_rate(self) -> float:
        """The largest of the parameter groups'."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)
