"""What the phases of a fit will take, from a step of each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..data import Batch
from ..machine.memory import free_bytes
from ..ode import Adjoint, fixed_buffers, peak_kept_bytes
from .objective import Objective
from .results import PhaseCost
from .rounds import SMALL, TRIAL
from .student import Student

PREDICTED_ON = 8  # images on which time and memory are predicted
WEIGHT_COPIES = 4  # weights, gradients, and Adam's two
SHARE = 0.5  # of the free memory that plain backprop may take before exact checkpoints take its place


def phase_costs(
    student: Student,
    objective: Objective,
    batch: Batch,
    phases: Sequence[str],
    coarse: Mapping[str, int],
    batch_size: int,
) -> list[PhaseCost]:
    """Time and memory of a step of each phase on `batch_size` images, from one on those of `batch`.

    coarse: steps of the stages in all phases but 'refine'.
    """
    student = student.copied()
    images = batch.images[:PREDICTED_ON].to(objective.device)
    scale = batch_size / len(images)
    weights = sum(p.nbytes for p in student.model.parameters())
    costs = []
    for phase in phases:
        student.take_to(student.depths if phase == "refine" else coarse)
        for adjoint in ("backprop", "checkpoint"):
            student.model.use_adjoint(Adjoint(adjoint))
            seconds, kept = _step(student, objective, phase, images)
            total = int(kept * scale) + WEIGHT_COPIES * weights
            if total < SHARE * free_bytes(objective.device):
                break
        steps = objective.settings.steps_of(phase)
        found = objective.settings.lr_of(phase) is not None or (phase == "refine" and "logits" in phases)
        trial = TRIAL if steps and not found and SMALL * steps >= TRIAL else 0
        costs.append(PhaseCost(phase, student.present, steps, seconds * scale, total, adjoint, trial))
    return costs


def _step(student: Student, objective: Objective, phase: str, images: Tensor) -> tuple[float, int]:
    """Seconds of a step, the second one, and the bytes that it keeps at most."""
    model, generator = student.model, torch.Generator()
    with fixed_buffers([model]):
        objective.train_mode(model)
        with peak_kept_bytes(model.parameters()) as count:
            objective.backward(model, phase, images, generator)
        began = time.perf_counter()
        objective.backward(model, phase, images, generator)
        if objective.device.type == "cuda":
            torch.cuda.synchronize(objective.device)
        seconds = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    states = sum(t.nbytes for targets in objective.targets(images)[0].values() for t in targets)
    return seconds, count() + states
