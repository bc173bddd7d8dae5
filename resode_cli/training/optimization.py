"""Optimizer and learning-rate schedule of a run: timm's, by the run's settings."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from ..errors import unknown
from .settings import Settings

MOST_SLOTS = 2  # Adam's


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


def optimizer_slots(settings: Settings) -> int:
    """Numbers that the optimizer keeps for each trained one, as a step on a small layer shows."""
    random = torch.get_rng_state()
    layer = nn.Linear(64, 64)
    torch.set_rng_state(random)
    try:
        optimizer = create_optimizer(layer, settings)
    except AssertionError:  # one for another device
        return MOST_SLOTS

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found: torch.Tensor = layer(torch.ones(2, 64)).square().sum()
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimizer.step(loss)  # type: ignore[arg-type]
    kept = sum(t.numel() for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    return math.ceil(kept / sum(p.numel() for p in layer.parameters()) - 0.1)


def create_scheduler(optimizer: torch.optim.Optimizer, settings: Settings, total: int) -> Any:
    """timm's scheduler, in steps. It is a function of the step alone, so it has no state to save."""
    # timm's multistep takes a milestone as the first step, counted from 1, of the lower rate.
    milestones = [int(total * share) + 1 for share in settings.milestone_shares]
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
