"""Optimizer and learning-rate schedule of a run: timm's, by the run's settings."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_class,
    list_optimizers,
    param_groups_layer_decay,
)
from timm.scheduler import create_scheduler_v2
from torch import nn

from ..errors import UsageError, unknown
from ..network.head import head_parameters
from ..network.model import OdeResNet
from ..network.outside import STEM
from .bf16_weights import BF16, MASTER, Bf16Optimizer, steps_part_by_part
from .contradictions import PLATEAU
from .settings import Settings

MOST_SLOTS = 2  # Adam's


def create_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """timm's optimizer of the name: no weight decay on norms and biases. With `weights_dtype`, it lowers the model's.

    Raises UsageError for a name that is none, and for settings that the optimizer does not have.
    """
    inner = _timms_optimizer(model, settings)
    if settings.weights_dtype is None:
        return inner
    return Bf16Optimizer(inner, model, masters=settings.weights_dtype == MASTER, seed=settings.seed)


def check_steps_part_by_part(settings: Settings) -> None:
    """Raises UsageError for an optimizer that needs all gradients together, where they are to be stepped in parts."""
    if settings.weights_dtype == BF16 and not steps_part_by_part(lambda net: _timms_optimizer(net, settings)):
        raise UsageError(
            f"--weights-dtype bf16 steps some of the weights at a time, and the optimizer {settings.optimizer} needs"
            " all of them at once; use --weights-dtype bf16-master, or another optimizer"
        )


def _timms_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    if settings.optimizer not in list_optimizers():
        raise unknown("optimizer", settings.optimizer, list_optimizers())
    asked = {"betas": settings.betas, "eps": settings.opt_eps}
    further = {name: value for name, value in asked.items() if value is not None}
    known = inspect.signature(get_optimizer_class(settings.optimizer, bind_defaults=False)).parameters
    for name in further:
        if name not in known:
            raise UsageError(f"--opt-{name}: the optimizer {settings.optimizer} has no {name}")
    given: Any = model
    if settings.layer_decay is not None and isinstance(model, OdeResNet):
        by_stage: Any = _ByStage(model)
        given = param_groups_layer_decay(by_stage, weight_decay=settings.weight_decay, layer_decay=settings.layer_decay)
    return create_optimizer_v2(
        given,
        opt=settings.optimizer,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        **further,
    )


class _ByStage:
    """A model as timm's layer decay takes it: the stem is its first layer, then each stage, and the head the last."""

    def __init__(self, model: OdeResNet) -> None:
        self.named_parameters = model.net.named_parameters
        places = {STEM: 0, **{name: i for i, name in enumerate(model.stages, start=1)}}
        last = len(places)
        self.layers = {
            name: places.get(part.removesuffix(" transition"), last) for name, part in model.parameter_groups().items()
        }

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:  # noqa: ARG002
        return lambda name: self.layers[name]


def clipped_parameters(model: nn.Module, settings: Settings) -> list[nn.Parameter]:
    """The parameters whose gradients are bounded: all; but the head's where each unit is bounded by itself."""
    net = model.net if isinstance(model, OdeResNet) else model
    left_out = head_parameters(net) if settings.clip_mode == "agc" else ()
    return [parameter for name, parameter in net.named_parameters() if name not in left_out]


def optimizer_slots(settings: Settings) -> int:
    """Numbers that the optimizer keeps for each trained one, as a step on a small layer shows, and masters."""
    random, masters = torch.get_rng_state(), int(settings.weights_dtype == MASTER)
    layer = nn.Linear(64, 64)
    torch.set_rng_state(random)
    try:
        optimizer = _timms_optimizer(layer, settings)
    except AssertionError:  # one for another device
        return MOST_SLOTS + masters

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found: torch.Tensor = layer(torch.ones(2, 64)).square().sum()
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimizer.step(loss)  # type: ignore[arg-type]
    kept = sum(t.numel() for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    return math.ceil(kept / sum(p.numel() for p in layer.parameters()) - 0.1) + masters


def create_scheduler(optimizer: torch.optim.Optimizer, settings: Settings, total: int) -> Any:
    """timm's scheduler, in steps. It is a function of the step alone, so it has no state to save.

    Of --schedule plateau it is the rate that the `Plateau` lowers.
    """
    # timm's multistep takes a milestone as the first step, counted from 1, of the lower rate.
    milestones = [int(total * share) + 1 for share in settings.milestone_shares]
    kinds: dict[str, dict[str, Any]] = {
        "cosine": {"sched": "cosine"},
        "linear": {"sched": "poly", "decay_rate": 1.0},  # which is the power there
        "poly": {"sched": "poly", "decay_rate": 2.0},
        "tanh": {"sched": "tanh"},
        "step": {"sched": "multistep", "decay_milestones": milestones, "decay_rate": 0.1},
        **dict.fromkeys(("constant", PLATEAU), {"sched": "step", "decay_epochs": 1, "decay_rate": 1.0}),
    }
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=total,
        warmup_epochs=settings.warmup,
        warmup_lr=0.0,
        min_lr=settings.min_lr,
        step_on_epochs=False,
        updates_per_epoch=1,
        **kinds[settings.schedule],
    )
    return scheduler
