"""A run of several processes: what each of them takes of it, and how their gradients become one.

Every process holds all parameters; they are not sharded (FSDP). Of 216 networks of timm's convolutional families the
largest, regnety_2560, takes 16 bytes times 1.28 billion parameters with gradients and Adam's averages, 19.1 GiB; what
does not fit are activations, and each evaluation of a block by an adjoint would gather its shards again.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.parallel import DistributedDataParallel

from ..data import ImageData
from ..errors import ResodeError, UsageError, first_few
from ..machine.processes import Processes, lost_means_ended
from ..network.model import OdeResNet
from .settings import Settings

# torch 2.14 gave it another name.
NO_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)
APART = 1_000_003  # between the seeds of two processes


def settings_of_one(settings: Settings, processes: Processes, train: ImageData) -> Settings:
    """The settings by which one process computes: its batch is its part of the run's.

    Raises UsageError for a batch that cannot be parted evenly, and for what would keep the processes from meeting.
    """
    count = processes.count
    if count == 1:
        return settings
    if settings.images_per_batch % count:
        raise UsageError(
            f"--batch-size {settings.images_per_batch} is the whole batch, and {count} processes cannot have equal"
            f" parts of it; give a multiple of {count}, or start a number of processes that divides it"
        )
    if settings.micro_batches * count > settings.images_per_batch:
        raise UsageError(
            f"--micro-batches {settings.micro_batches}: each of {count} processes has"
            f" {settings.images_per_batch // count} images of a batch"
        )
    if (settings.mixup or settings.cutmix) and settings.step_images == count:
        raise UsageError(
            f"{'--mixup' if settings.mixup else '--cutmix'} mixes the images that a process has of a step, which is"
            f" one; give a larger --batch-size than {settings.images_per_batch}"
        )
    if len(train) < count:
        raise UsageError(f"{len(train)} images for {count} processes: start fewer")
    if settings.bn == "sync":
        if settings.compile:
            raise UsageError("--bn sync is not for --compile, which knows one process: leave out one")
        if train.skip_corrupt:
            raise UsageError(
                "--bn sync: all processes meet in every BatchNorm, and with --skip-corrupt one may lack a batch; remove"
                " the corrupt files, or take --bn batch"
            )
        if len(train) < settings.step_images:
            raise UsageError(f"--bn sync needs whole batches, and {len(train)} images are fewer than one")
    return replace(settings, batch_size=settings.images_per_batch // count)


class Joint:
    """A model whose gradients are summed over the processes as they come (torch's DistributedDataParallel).

    Alone, it is the model. DistributedDataParallel takes the mean over the processes, so that each one's loss is to be
    weighted by `count` times its share of the batch.
    """

    def __init__(self, model: OdeResNet, processes: Processes) -> None:
        self.model, self.processes = model, processes
        self.parallel: DistributedDataParallel | None = None
        self.renew()

    def renew(self) -> None:
        """Know which parameters are trained now."""
        self.checked, self.parallel = False, None
        self.watched: list[tuple[nn.Parameter, Node]] = []
        if not self.processes.alone:
            # BatchNorm's statistics are synchronised, or averaged, elsewhere; gradients are not kept twice.
            buffers: dict[str, Any] = {NO_BUFFERS: False}
            with lost_means_ended():
                self.parallel = DistributedDataParallel(self.model, gradient_as_bucket_view=True, **buffers)
            # Where DistributedDataParallel hears of gradients; torch forgets it where weights have had another type.
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.watched = [(p, get_gradient_edge(p).node) for p in trained]

    def __call__(self, images: Tensor) -> Tensor:
        """The model's outputs."""
        if self.parallel is not None and any(get_gradient_edge(p).node is not node for p, node in self.watched):
            self.renew()
        found: Tensor = (self.parallel or self.model)(images)
        return found

    def part(self, *, last: bool) -> AbstractContextManager[None]:
        """For one part of a batch: the gradients of all parts are exchanged with those of the last."""
        return nullcontext() if self.parallel is None or last else self.parallel.no_sync()

    def check(self) -> None:
        """Raises ResodeError where a parameter gets no gradient, which the others would wait for without end."""
        if self.parallel is None or self.checked:
            return
        self.checked = True
        idle = [name for name, p in self.model.net.named_parameters() if p.requires_grad and p.grad is None]
        if idle:
            raise self.processes.alike(
                ResodeError(
                    f"{first_few(idle)} have no part in the loss, which several processes cannot train with; add"
                    f" --freeze {','.join(idle[:3])}"
                )
            )

    def seed(self, seed: int, step: int) -> None:
        """Let this process draw other random numbers than the others, which follow from (seed, step, place).

        The first one draws as it would alone, and only its generators are saved.
        """
        if not self.processes.leads:
            torch.manual_seed((seed + APART * self.processes.place) * APART + step)


def joined(values: list[list[float]], *, sums: int) -> list[float]:
    """Figures of one step over the processes: of the first so many the sum, of the others the largest, or no number."""
    of_all = zip(*values, strict=True)
    return [sum(row) if place < sums else _largest(row) for place, row in enumerate(of_all)]


def _largest(row: tuple[float, ...]) -> float:
    return next((value for value in row if value != value), max(row))
