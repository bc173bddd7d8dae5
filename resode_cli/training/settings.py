"""The settings of a training run: what a user may choose, and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import unknown
from ..gradients.adjoint_choice import AdjointChoice, choose_adjoint
from ..quantities import (
    COUNT,
    COUNT_OR_NONE,
    DECAYING,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    WORKERS,
    check_ranges,
    parse_bytes,
    ranged,
)

SCHEDULES = ("cosine", "step", "constant")
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ON_DRIFT = ("anchors", "warn", "stop")
ON_NONFINITE = ("stop", "skip")


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run does, but model, data and device.

    epochs, max_steps: the run ends at whichever comes first, after one epoch if neither is given; the
        learning-rate schedule ends there too.
    lr: of the largest; schedule: cosine to 0, step (a tenth at one half and at three quarters) or constant.
    warmup: steps of linear increase from 0. clip_grad: largest norm of the gradient; None: no clipping.
    optimizer: any name that timm knows; 'momentum' is classical SGD with momentum.
    stages: train only these stages' parameters, transitions included; None: everything.
    bn: 'frozen' uses the running statistics and keeps them, 'batch' normalises by the batch.
    adjoint, anchors ('auto', 'none' or a number), corrections, snapshots: see `adjoint_choice`.
    grad_tol: of the relative gradient error of a stage, where 'auto' chooses; memory_budget: of a
        training step, such as '8GiB'; None: what the device has free.
    drift_tolerance: of ‖x̃ − x‖ / ‖x‖, where 'auto' does not know better; on_drift: past it move the stage
        to anchors (exact gradients, more memory) and take the step again, warn once per stage, or stop.
    on_nonfinite: with a loss or gradient that is no number, stop, or skip the step; too many in a row stop a run.
    compile: run the branches compiled. channels_last: keep images and states in that memory format.
    teacher: a model file or a source; distill: weight of its logits against the labels', which have the rest,
        at a temperature; teacher_states: weight of its stages' outputs. See `Objective`.
    log_every, save_every: steps. eval_every: epochs.
    """

    adjoint: str = "auto"
    anchors: str | None = None
    corrections: int = ranged(0, COUNT_OR_NONE)
    snapshots: int | None = ranged(None, COUNT)
    grad_tol: float = ranged(0.02, POSITIVE)
    memory_budget: str | None = None
    epochs: int | None = ranged(None, COUNT)
    max_steps: int | None = ranged(None, COUNT)
    batch_size: int = ranged(128, COUNT)
    lr: float = ranged(1e-3, POSITIVE)
    momentum: float = ranged(0.9, DECAYING)
    weight_decay: float = ranged(5e-4, NOT_NEGATIVE)
    clip_grad: float | None = ranged(None, POSITIVE)
    optimizer: str = "momentum"
    schedule: str = "cosine"
    warmup: int = ranged(0, COUNT_OR_NONE)
    stages: tuple[str, ...] | None = None
    bn: str = "frozen"
    amp: str = "none"
    augment: bool = True
    seed: int = ranged(0, SEED)
    drift_tolerance: float = ranged(0.1, POSITIVE, flag="--drift-tol")
    on_drift: str = "anchors"
    on_nonfinite: str = "stop"
    log_every: int = ranged(20, COUNT)
    save_every: int = ranged(100, COUNT)
    eval_every: int = ranged(1, COUNT)
    workers: int = ranged(0, WORKERS)
    compile: bool = False
    channels_last: bool = False
    teacher: str | None = None
    distill: float = ranged(0.5, FRACTION)
    temperature: float = ranged(2.0, POSITIVE)
    teacher_states: float = ranged(0.0, NOT_NEGATIVE)

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("schedule", self.schedule, SCHEDULES),
            ("BatchNorm mode", self.bn, ("frozen", "batch")),
            ("amp", self.amp, tuple(AMP)),
            ("on-drift", self.on_drift, ON_DRIFT),
            ("on-nonfinite", self.on_nonfinite, ON_NONFINITE),
        ):
            if value not in allowed:
                raise unknown(name, value, allowed)
        check_ranges(self)
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)
        self.adjoint_choice()

    def adjoint_choice(self) -> AdjointChoice:
        return choose_adjoint(
            self.adjoint, anchors=self.anchors, corrections=self.corrections, snapshots=self.snapshots
        )

    def per_epoch(self, images: int) -> int:
        """Steps per epoch: full batches only, but one at least."""
        return max(images // self.batch_size, 1)

    def steps(self, images: int) -> int:
        """Steps of the whole run on a training split of so many images."""
        if self.epochs is None:
            return self.max_steps or self.per_epoch(images)
        total = self.per_epoch(images) * self.epochs
        return min(total, self.max_steps or total)
