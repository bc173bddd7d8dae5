"""The settings of a training run: what a user may choose, and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .adjoint_choice import AdjointChoice, choose_adjoint
from .errors import UsageError, unknown
from .memory_budget import parse_bytes

SCHEDULES = ("cosine", "step", "constant")
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ON_DRIFT = ("anchors", "warn", "stop")


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
    compile: run the branches compiled. channels_last: keep images and states in that memory format.
    teacher: a model file or a source; distill: weight of its logits against the labels', which have the rest,
        at a temperature; teacher_states: weight of its stages' outputs. See `Objective`.
    log_every, save_every: steps. eval_every: epochs.
    """

    adjoint: str = "auto"
    anchors: str | None = None
    corrections: int = 0
    snapshots: int | None = None
    grad_tol: float = 0.02
    memory_budget: str | None = None
    epochs: int | None = None
    max_steps: int | None = None
    batch_size: int = 128
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip_grad: float | None = None
    optimizer: str = "momentum"
    schedule: str = "cosine"
    warmup: int = 0
    stages: tuple[str, ...] | None = None
    bn: str = "frozen"
    amp: str = "none"
    augment: bool = True
    seed: int = 0
    drift_tolerance: float = 0.1
    on_drift: str = "anchors"
    log_every: int = 20
    save_every: int = 100
    eval_every: int = 1
    workers: int = 0
    compile: bool = False
    channels_last: bool = False
    teacher: str | None = None
    distill: float = 0.5
    temperature: float = 2.0
    teacher_states: float = 0.0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("schedule", self.schedule, SCHEDULES),
            ("BatchNorm mode", self.bn, ("frozen", "batch")),
            ("amp", self.amp, tuple(AMP)),
            ("on-drift", self.on_drift, ON_DRIFT),
        ):
            if value not in allowed:
                raise unknown(name, value, allowed)
        for name in ("epochs", "max_steps", "batch_size", "log_every", "save_every", "eval_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
        if self.lr <= 0:
            raise UsageError(f"--lr {self.lr}: must be above 0")
        if self.grad_tol <= 0:
            raise UsageError(f"--grad-tol {self.grad_tol:g}: must be above 0")
        if not 0 <= self.distill <= 1:
            raise UsageError(f"--distill {self.distill:g}: must be from 0 (labels alone) to 1 (teacher alone)")
        if self.temperature <= 0:
            raise UsageError(f"--temperature {self.temperature:g}: must be above 0")
        if self.teacher_states < 0:
            raise UsageError(f"--teacher-states {self.teacher_states:g}: must be 0 or more")
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
