"""A deepened network at a smaller depth, where a fit takes most of its steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ..network.model import OdeResNet
from ..network.stage import OdeStage
from ..ode import composed_euler
from ..surgery.steps import deepened

MOST_SUBSTEPS = 4  # steps per source block, of two evaluations each


def take_to(
    model: OdeResNet, depths: Mapping[str, int], *, depth_weights: str | None, standing_for: Mapping[str, int]
) -> None:
    """Bring stages to these depths, where each stands for as many Euler steps as `standing_for` says.

    Under another forward rule than Euler's a stage stands for itself.
    """
    for name, blocks in depths.items():
        stage = deepened(model.stages[name], blocks, depth_weights=depth_weights)
        model.replace_stage(name, stage)
        stand_for(stage, standing_for.get(name, blocks))


def stand_for(stage: OdeStage, steps: int) -> None:
    """Let a stage stand for one of so many Euler steps, or for itself."""
    stage.rule = None
    if steps <= stage.spec.depth or stage.spec.scheme != "euler":
        return
    # As the stage's schedule is spread over the steps, see `deepened`; the counts of a block's own steps are averaged.
    depth = stage.spec.depth
    schedule = stage.field().schedule
    taken = Counter(schedule[n * depth // steps] for n in range(steps))
    counts = {block: taken[block] / held for block, held in Counter(schedule).items()}
    stage.rule = composed_euler(counts, steps / depth)


def coarse_depths(own: Mapping[str, int], depths: Mapping[str, int], substeps: int) -> dict[str, int]:
    """Steps of each stage, so many for each of its own; the full depth where that is evaluated no more often."""
    return {name: own[name] * substeps if 2 * own[name] * substeps < full else full for name, full in depths.items()}
