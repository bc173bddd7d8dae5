"""Optimizer and learning-rate schedule of a run: timm's, by the run's settings."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from ..errors import unknown
from .settings import Settings


def create_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """timm's optimizer of the name: no weight decay on norms and biases."""
    if settings.optimizer not in list_optimizers():
        raise unknown("optimizer", settings.optimizer, list_optimizers())
    return create_optimizer_v2(
        model,
        opt=settings.optimizer,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
    )


def create_scheduler(optimizer: torch.optim.Optimizer, settings: Settings, total: int) -> Any:
    """timm's scheduler, in steps. It is a function of the step alone, so it has no state to save."""
    # timm's multistep takes a milestone as the first step, counted from 1, of the lower rate.
    milestones = [total // 2 + 1, total * 3 // 4 + 1]
    kinds: dict[str, dict[str, Any]] = {
        "cosine": {"sched": "cosine"},
        "step": {"sched": "multistep", "decay_milestones": milestones, "decay_rate": 0.1},
        "constant": {"sched": "step", "decay_epochs": 1, "decay_rate": 1.0},
    }
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=total,
        warmup_epochs=settings.warmup,
        warmup_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=1,
        **kinds[settings.schedule],
    )
    return scheduler
