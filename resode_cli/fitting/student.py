"""A network that is fitted, at the depth of its end or at a smaller one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..data import Batch
from ..network.model import OdeResNet
from ..surgery.batch_norm import batch_norms, recalibrate
from .coarse import MOST_SUBSTEPS, coarse_depths, take_to
from .objective import Objective, logits_error

NEAR = 0.02  # of the logits' relative squared distance between the network and its stand-in of few steps


@dataclass(frozen=True)
class Student:
    """depths: steps of the stages at the end; own: before; depth_weights: as for `deepened`."""

    model: OdeResNet
    own: Mapping[str, int]
    depths: Mapping[str, int]
    depth_weights: str | None

    @property
    def present(self) -> dict[str, int]:
        """Steps of each stage that has any."""
        return {name: stage.spec.depth for name, stage in self.model.stages.items() if stage.spec.depth}

    def take_to(self, depths: Mapping[str, int]) -> None:
        """Bring stages to these depths, where they stand for what they are at the end."""
        own = {name: blocks for name, blocks in depths.items() if name in self.depths}  # the others stay as they are
        take_to(self.model, own, depth_weights=self.depth_weights, standing_for=self.depths)

    def copied(self) -> Student:
        """The same with weights of its own."""
        return replace(self, model=copy.deepcopy(self.model))

    def finished(self) -> OdeResNet:
        """A copy of final depth."""
        other = self.copied()
        other.take_to(self.depths)
        return other.model.eval()

    def backup(self) -> dict[str, Tensor]:
        """Its weights and statistics, for `restore`."""
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def restore(self, backup: dict[str, Tensor]) -> None:
        self.model.load_state_dict(backup)

    def has_statistics(self) -> bool:
        """Whether any BatchNorm keeps some."""
        return any(True for _ in batch_norms(self.model))


def coarse(student: Student, objective: Objective, batch: Batch) -> Mapping[str, int]:
    """Steps of each stage in all phases but the last: the fewest that do nearly what the full depth does.

    That is looked at on a batch, with statistics of its own: those of the source belong to other states.
    """
    settings = objective.settings
    if not student.depths or settings.substeps == 0:
        return student.depths
    if settings.substeps is not None:
        return coarse_depths(student.own, student.depths, settings.substeps)
    start = student.copied()
    start.take_to(coarse_depths(student.own, student.depths, 1))
    if settings.bn != "keep" and student.has_statistics() and len(batch.labels) > 1:
        recalibrate(start.model, [batch], device=objective.device)
    truth = _logits(start, student.depths, batch.images, objective.device)
    candidates: Sequence[Mapping[str, int]] = [
        coarse_depths(student.own, student.depths, substeps) for substeps in range(1, MOST_SUBSTEPS + 1)
    ]
    for depths in candidates[:-1]:
        found = _logits(start, depths, batch.images, objective.device)
        if logits_error(found, truth, several=objective.several).item() < NEAR:
            return depths
    return candidates[-1]


def _logits(start: Student, depths: Mapping[str, int], images: Tensor, device: torch.device) -> Tensor:
    student = start.copied()
    student.take_to(depths)
    with torch.no_grad():
        found: Tensor = student.model.eval()(images.to(device))
    return found
