"""How many images a step of a new run has, where the user leaves that to resode."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..training.lengths import AUTO
from .output import Output
from .start_of_run import for_few_images

if TYPE_CHECKING:
    import torch

    from ..data import ImageData
    from ..network.model import OdeResNet
    from ..training.settings import Settings
    from ..training.teacher import Teacher


def sized(
    settings: Settings,
    given: frozenset[str],
    model: OdeResNet,
    train: ImageData,
    device: torch.device,
    teacher: Teacher | None,
    output: Output,
) -> Settings:
    """Settings of which nothing about the batches is 'auto', with what few images need; what was found is said.

    given: parameters that the user set. The model stays as it is.
    Raises ResodeError where no batch fits into memory.
    """
    splits = settings.accumulate == AUTO
    if settings.batch_size == AUTO:
        settings = _found(settings, model, train, device, teacher, output)
    if splits:
        settings = replace(settings, accumulate=1)
    settings = for_few_images(settings, given, len(train), output)
    if splits:
        settings = _found(replace(settings, accumulate=AUTO), model, train, device, teacher, output)
    return settings


def _found(
    settings: Settings,
    model: OdeResNet,
    train: ImageData,
    device: torch.device,
    teacher: Teacher | None,
    output: Output,
) -> Settings:
    from ..training.batching import Search

    splits = settings.accumulate == AUTO
    with output.aside.status("looking for a batch that fits"):
        search = Search(model, train, settings, device, teacher_bytes=0 if teacher is None else teacher.bytes)
        found = search.fewest_parts() if splits else search.largest_batch()
    output.note(f"{'--accumulate' if splits else '--batch-size'} auto: {found.line}")
    return found.settings
