"""A training run up to its first step, which is simulated: what it would do, and what that would hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..data import ImageData
from ..data.workers import worker_count
from ..gradients.results import ChosenAdjoints
from ..machine.memory import free_bytes
from ..machine.processes import ALONE, Processes
from ..network.model import OdeResNet
from ..ode import RandomState
from ..simulation.step import Simulation, predicted
from .averaging import average_bytes
from .balance import balanced_labels
from .best import check_evaluations, check_tells_apart
from .loop import training_batches
from .optimization import create_optimizer, create_scheduler, optimizer_slots
from .parallel import settings_of_one
from .settings import Settings
from .starting import guard_at_start, make_ready, prepare_to_train
from .unfreezing import Unfreezing


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
    check_tells_apart(model, settings)
    settings = settings_of_one(settings, processes, train)
    settings = make_ready(model, settings, train, device, on_message)
    if settings.unfreeze_every is not None:  # the plan is for all that will be trained
        for said in Unfreezing(model, settings, total).plan(0):
            on_message(said)
    create_scheduler(create_optimizer(model, settings), settings, total)
    beside = teacher_bytes + average_bytes(model, settings)
    random = RandomState.now(device)
    guard = guard_at_start(model, settings, train, device, beside=beside, on_message=on_message, on_choice=on_choice)
    random.restore()
    labels = balanced_labels(train, settings)
    source = training_batches(
        train,
        range(len(train)),
        settings.step_images * processes.count,
        seed=settings.seed,
        epoch=0,
        labels=labels,
        accumulate=settings.accumulate,
        processes=processes,
    )
    first = next(source)
    source.close()
    prepare_to_train(model, settings)
    slots, parts = optimizer_slots(settings), guard.state.micro_batches
    batches = settings.batches_of(len(first.labels))
    batch = -(-len(first.labels) // batches)
    if device.type == "cpu":  # the images of the step's other batches wait there
        beside += first.images.nbytes - first.images[:batch].nbytes
    found = Simulation(model, device.type).step(
        model.adjoints,
        (batch, *first.images.shape[1:]),
        amp=settings.amp,
        optimizer_slots=slots,
        micro_batches=parts,
        accumulates=batches > 1,
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return DryRun(
        total,
        batch,
        parts,
        {name: adjoint.label for name, adjoint in model.adjoints.items()},
        batches,
        sum(p.numel() for p in trained),
        weights,
        gradients,
        slots * gradients,
        max(found.peak - weights - (1 + slots) * gradients, 0),
        beside,
        predicted(found) + beside,
        free_bytes(device) + weights,
        tuple(first.skipped),
        worker_count(settings.workers, len(train), device),
    )
