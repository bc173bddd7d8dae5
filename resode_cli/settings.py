"""The settings of a training run: what a user may choose, and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import UsageError, unknown
from .ode import Adjoint

SCHEDULES = ("cosine", "step", "constant")
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ON_DRIFT = ("warn", "anchors", "stop")


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
    drift_tolerance: of ‖x̃ − x‖ / ‖x‖; on_drift: past it warn once per stage, move the stage to
        anchors (exact gradients, more memory), or stop.
    log_every, save_every: steps. eval_every: epochs.
    """

    adjoint: str = "checkpoint"
    anchors: int | None = None
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
    on_drift: str = "warn"
    log_every: int = 20
    save_every: int = 100
    eval_every: int = 1
    workers: int = 0

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
        Adjoint(self.adjoint, self.anchors)

    def per_epoch(self, images: int) -> int:
        """Steps per epoch: full batches only, but one at least."""
        return max(images // self.batch_size, 1)

    def steps(self, images: int) -> int:
        """Steps of the whole run on a training split of so many images."""
        if self.epochs is None:
            return self.max_steps or self.per_epoch(images)
        total = self.per_epoch(images) * self.epochs
        return min(total, self.max_steps or total)
