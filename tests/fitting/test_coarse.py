"""A network of few steps in place of a deep one, while it is fitted."""

from __future__ import annotations

import copy

import pytest
import torch

from resode_cli.fitting.coarse import coarse_depths, stand_for, take_to
from resode_cli.network.model import OdeResNet


def distance(one: OdeResNet, other: OdeResNet, images: torch.Tensor) -> float:
    with torch.no_grad():
        return float((one.eval()(images) - other.eval()(images)).norm())


def weakened(model: OdeResNet, factor: float) -> OdeResNet:
    """A copy in float64 whose residual functions are so much smaller, and have a derivative everywhere."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for stage in model.stages.values():
            stage.use_form("pre")
            for block in stage.blocks:
                block.bn2.weight.mul_(factor)
                block.bn2.bias.zero_()
    return model


@pytest.mark.parametrize("depth_weights, share", [(None, 0.1), ("tied", 0.1), ("linear", 0.9)])
def test_few_steps_stand_for_many(tiny: OdeResNet, images: torch.Tensor, depth_weights: str | None, share: float):
    """Three and two blocks a stage at 13 steps, so that runs differ in length; tied ones, whose mean weighs blocks by
    the lengths of their runs, at 12. That linear weights change within a run, few steps do not see.
    """
    depths = dict.fromkeys(tiny.stages, 12 if depth_weights == "tied" else 13)
    own = {name: stage.spec.depth for name, stage in tiny.stages.items()}
    source = weakened(tiny, 0.1)
    full, coarse, plain = (copy.deepcopy(source) for _ in range(3))
    take_to(full, depths, depth_weights=depth_weights, standing_for=depths)
    take_to(coarse, own, depth_weights=depth_weights, standing_for=depths)
    take_to(plain, own, depth_weights=depth_weights, standing_for=own)
    assert {stage.spec.depth for stage in coarse.stages.values()} == set(own.values())
    assert distance(coarse, full, images.double()) < share * distance(plain, full, images.double())


def test_a_stage_at_its_depth_stands_for_itself(tiny: OdeResNet):
    stage = tiny.stages["layer1"]
    stand_for(stage, 40)
    assert stage.rule is not None and stage.rule.evaluations == 2
    stand_for(stage, stage.spec.depth)
    assert stage.rule is None
    stage.use_scheme("heun")
    stand_for(stage, 40)
    assert stage.rule is None, "two evaluations are Euler's alone"


def test_a_stand_in_that_saves_nothing_is_not_used():
    assert coarse_depths({"a": 3, "b": 9}, {"a": 36, "b": 36}, 1) == {"a": 3, "b": 9}
    assert coarse_depths({"a": 3, "b": 9}, {"a": 36, "b": 36}, 2) == {"a": 6, "b": 36}
