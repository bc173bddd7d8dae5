"""Tie, untie and deepen a stage or a whole model. What is given stays as it is, and shares nothing with the result."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from ..network.model import OdeResNet
from ..network.stage import OdeStage
from .depth_weights import rebuilt
from .steps import deepened, tied, untied

Rewritten = TypeVar("Rewritten", OdeStage, OdeResNet)


def tie(
    whole: Rewritten, *, rule: str = "mean", depth_weights: str = "tied", stages: Sequence[str] | None = None
) -> Rewritten:
    """One block for all steps of a stage: see `surgery.steps.tied`.

    whole: a stage, or a model, of which `stages` names or counts those to change; None: all that have steps.

    >>> import resode_cli as resode
    >>> model = resode.load("net.safetensors")          # doctest: +SKIP
    >>> tied = resode.tie(model, stages=["layer3"])     # doctest: +SKIP
    """
    return _changed(whole, partial(tied, rule=rule, depth_weights=depth_weights), stages)


def untie(whole: Rewritten, *, stages: Sequence[str] | None = None) -> Rewritten:
    """Blocks of its own for every step: see `surgery.steps.untied`. For whole and stages see `tie`."""
    return _changed(whole, untied, stages)


def deepen(
    whole: Rewritten,
    blocks: int,
    *,
    mode: str = "replicate",
    depth_weights: str | None = None,
    stages: Sequence[str] | None = None,
) -> Rewritten:
    """`blocks` steps: see `surgery.steps.deepened`. For whole and stages see `tie`.

    >>> import resode_cli as resode
    >>> model = resode.load("net.safetensors")           # doctest: +SKIP
    >>> deep = resode.deepen(model, 100)                 # doctest: +SKIP
    """
    return _changed(whole, partial(deepened, blocks=blocks, mode=mode, depth_weights=depth_weights), stages)


def _changed(whole: Rewritten, change: Callable[[OdeStage], OdeStage], names: Sequence[str] | None) -> Rewritten:
    if isinstance(whole, OdeResNet):
        model = copy.deepcopy(whole)
        for name, stage in model.pick(names).items():
            if names is not None or stage.spec.depth:
                model.replace_stage(name, change(stage))
        return model
    if names is not None:
        raise ValueError("stages are named in a model; this is one of them")
    transition, blocks = copy.deepcopy((whole.transition, whole.blocks))  # at once: what they share stays shared
    return change(rebuilt(whole, whole.spec, blocks, whole.splits, transition=transition))
