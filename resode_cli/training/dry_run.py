"""A training run up to its first step, which is simulated: what it would do, and what that would hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..data import ImageData
from ..data.workers import worker_count
from ..gradients.results import ChosenAdjoints
from ..machine.memory import free_bytes
from ..machine.processes import ALONE, Processes
from ..network.model import OdeResNet
from ..ode import RandomState
from ..simulation.step import Simulation, StepUse, optimizer_bytes, predicted
from .averaging import average_bytes
from .balance import balanced_labels
from .best import check_evaluations, check_tells_apart
from .loop import training_batches
from .optimization import create_optimizer, create_scheduler, optimizer_slots
from .parallel import settings_of_one
from .settings import Settings
from .starting import guard_at_start, make_ready, prepare_to_train, tell_of_warmup
from .synced_norm import check_synchronises
from .unfreezing import Unfreezing

FLOAT = 4  # bytes of a number of an image


@dataclass(frozen=True)
class DryRun:
    """What a run would do. Bytes are predicted for the most that a step has alive at a time.

    batch_size: images of one of the `accumulate` batches of a step.
    beside: a teacher, an average of the weights, and images that wait for their batch.
    free_bytes: of the device, now, weights included. trained: numbers. skipped: what is unreadable in the first batch.
    workers: processes that would read images.
    """

    steps: int
    batch_size: int
    micro_batches: int
    adjoints: dict[str, str]
    accumulate: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    beside: int
    predicted_bytes: int
    free_bytes: int
    skipped: tuple[str, ...]
    workers: int


def dry_run(
    model: OdeResNet,
    train: ImageData,
    settings: Settings,
    device: torch.device,
    *,
    teacher_bytes: int = 0,
    on_message: Callable[[str], None],
    on_choice: Callable[[ChosenAdjoints], None],
    processes: Processes = ALONE,
) -> DryRun:
    """Do all that a run does before its first step, read the first batch, and simulate the step. Nothing is written.

    processes: simulate the step of one of them.
    """
    total = settings.steps(len(train))
    for said in check_evaluations(settings, settings.per_epoch(len(train)), total):
        on_message(said)
    tell_of_warmup(settings, settings.steps(len(train)), on_message)
    check_tells_apart(model, settings)
    if settings.bn == "sync" and not processes.alone:
        check_synchronises(model)
    settings = settings_of_one(settings, processes, train)
    settings = make_ready(model, settings, train, device, on_message)
    if settings.unfreeze_every is not None:  # the plan is for all that will be trained
        for said in Unfreezing(model, settings, total).plan(0):
            on_message(said)
    create_scheduler(create_optimizer(model, settings), settings, total)
    labels = balanced_labels(train, settings)
    source = training_batches(
        train,
        range(len(train)),
        settings.step_images * processes.count,
        seed=settings.seed,
        epoch=0,
        labels=labels,
        accumulate=settings.batches_per_step,
        processes=processes,
    )
    first = next(source)
    source.close()
    found = foreseen(
        model,
        train,
        settings,
        device,
        images=first.images.shape,
        beside=teacher_bytes,
        on_message=on_message,
        on_choice=on_choice,
    )
    weights, gradients, optimizer = _standing(model, settings)
    return DryRun(
        total,
        found.batch,
        found.micro_batches,
        {name: adjoint.label for name, adjoint in model.adjoints.items()},
        settings.batches_of(len(first.labels)),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        weights,
        gradients,
        optimizer,
        max(found.use.peak - weights - gradients - optimizer, 0),
        found.beside,
        found.bytes,
        free_bytes(device) + weights,
        tuple(first.skipped),
        worker_count(settings.workers, len(train), device),
    )


@dataclass(frozen=True)
class Foreseen:
    """A simulated step. batch: images of one of its batches. beside: bytes of a teacher, an average, waiting images."""

    batch: int
    micro_batches: int
    use: StepUse
    beside: int

    @property
    def bytes(self) -> int:
        """The most that is alive at a time, with a reserve."""
        return predicted(self.use) + self.beside


def foreseen(
    model: OdeResNet,
    train: ImageData,
    settings: Settings,
    device: torch.device,
    *,
    images: Sequence[int],
    beside: int,
    on_message: Callable[[str], None] = lambda text: None,
    on_choice: Callable[[ChosenAdjoints], None] = lambda chosen: None,
    of_free: float = 1.0,
) -> Foreseen:
    """Set the adjoints of a model that is `ready`, and simulate a step.

    images: the shape (B, C, H, W) of the images of all of a step's batches. beside: bytes of a teacher. of_free: see
    `Guard`.
    Raises OverBudgetError where no plan fits.
    """
    beside += average_bytes(model, settings)
    random = RandomState.now(device)
    guard = guard_at_start(
        model,
        settings,
        train,
        device,
        beside=beside,
        on_message=on_message,
        on_choice=on_choice,
        of_free=of_free,
    )
    random.restore()
    prepare_to_train(model, settings)
    batches = settings.batches_of(images[0])
    batch = -(-images[0] // batches)
    if device.type == "cpu":  # the images of the step's other batches wait there
        beside += (images[0] - batch) * math.prod(images[1:]) * FLOAT
    use = Simulation(model, device.type).step(
        model.adjoints,
        (batch, *images[1:]),
        amp=settings.precision,
        optimizer_slots=optimizer_slots(settings),
        micro_batches=guard.state.micro_batches,
        accumulates=batches > 1,
    )
    return Foreseen(batch, guard.state.micro_batches, use, beside)


def _standing(model: OdeResNet, settings: Settings) -> tuple[int, int, int]:
    """Bytes of weights and buffers, of the gradients, and of what the optimizer keeps."""
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    trained = [p for p in model.parameters() if p.requires_grad]
    return weights, gradients, optimizer_slots(settings) * sum(map(optimizer_bytes, trained))
