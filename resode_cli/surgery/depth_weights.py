"""How the steps of a stage share weights: parametrisations of θ_n in depth.

    replicate    a run of steps of one block each
    linear       θ_n on the straight lines between knots: continuous in depth, as theorem 1 of Sander,
                 Ablin, Peyré (NeurIPS 2022) wants the limit's weights to be
    tied         one θ for all steps: an autonomous ODE
    tied+stats   one θ, but every step has BatchNorm statistics of its own
    tied+norms   one θ but for the norms, which every step has of its own: a field aware of time
    free         every step its own

Knot k of K is at the midpoint (k + ½)/K of depth; before the first and past the last θ is constant.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor, nn

from ..errors import ResodeError, UsageError
from ..network.parts import BlockSplit
from ..network.sharing import distinct, norm_names, share_layers, tensors_of
from ..network.specs import BlockSpec, StageSpec
from ..network.stage import OdeStage

TIED = ("tied", "tied+stats", "tied+norms")
DEPTH_WEIGHTS = ("replicate", "linear", *TIED, "free")


def linear_in_depth(stage: OdeStage, blocks: int) -> OdeStage:
    """Weights linear in depth, for `blocks` steps; the knots are the present weights, one per run of equal ones.

    A stage that is linear already keeps its knots. T stays.
    """
    knots = stage if stage.spec.blends or _in_even_runs(stage) else _with_own_blocks(stage)
    spec = knots.spec
    schedule, blends = [], []
    for n in range(blocks):
        # The midpoint of step n of N in units of knots, relative to their midpoints.
        place = Fraction(2 * n + 1, 2 * blocks) * len(spec.blocks) - Fraction(1, 2)
        place = min(max(place, Fraction(0)), Fraction(len(spec.blocks) - 1))
        schedule.append(int(place))
        blends.append(float(place - int(place)))
    if not any(blends):
        blends = []
    return rebuilt(
        stage, replace(spec, schedule=tuple(schedule), blends=tuple(blends)), list(knots.blocks), knots.splits
    )


def check_blends(stage: OdeStage) -> None:
    """Raises UsageError for blended blocks that hold a tensor under two names: a blend would have to write it twice."""
    for spec, block in zip(stage.spec.blocks, stage.blocks, strict=True):
        tensors = tensors_of(block)
        if stage.spec.blends and len(distinct(tensors.items())) < len(tensors):
            raise UsageError(
                f"block {spec.name} of stage {stage.spec.name} holds a tensor under two names, which weights linear in"
                " depth cannot blend; use --depth-weights free, replicate or tied"
            )


def _in_even_runs(stage: OdeStage) -> bool:
    """Whether every block serves one run of steps, as after `deepen`, and none shares with another."""
    spec = stage.spec
    evenly = tuple(n * len(spec.blocks) // spec.depth for n in range(spec.depth))
    return spec.schedule == evenly and not any(block.shares for block in spec.blocks)


def _with_own_blocks(stage: OdeStage) -> OdeStage:
    spec = stage.spec
    modules = [copy.deepcopy(module) for module in step_blocks(stage)]
    blocks = named([spec.blocks[b].origin for b in spec.schedule])
    own = replace(spec, blocks=blocks, schedule=tuple(range(spec.depth)), blends=())
    return rebuilt(stage, own, modules, [stage.splits[b] for b in spec.schedule])


def step_blocks(stage: OdeStage) -> list[nn.Module]:
    """The block of every step; a new one where its weights lie between those of two others."""
    spec = stage.spec
    if not spec.blends:
        return [stage.blocks[b] for b in spec.schedule]
    modules = []
    for b, w in zip(spec.schedule, spec.blends, strict=True):
        module = stage.blocks[b]
        if w:
            module = copy.deepcopy(module)  # in all but tensors the block that its name in a file tells to build
            states = [stage.blocks[k].state_dict() for k in (b, b + 1)]
            module.load_state_dict(_mean(states, [1 - w, w], spec.name))
        modules.append(module)
    return modules


def mean_block(stage: OdeStage, steps: Sequence[nn.Module]) -> nn.Module:
    """A block with the mean of the steps' weights and statistics."""
    module = copy.deepcopy(steps[0])
    states = [step.state_dict() for step in steps]
    module.load_state_dict(_mean(states, [1 / len(steps)] * len(steps), stage.spec.name))
    return module


def tied_but_norms(
    stage: OdeStage, shared: nn.Module, steps: Sequence[nn.Module], *, statistics_only: bool = False
) -> OdeStage:
    """Every step holds the layers of `shared`, and the norms of its own block, or their running statistics alone.

    Raises UsageError for blocks without norms, or without statistics.
    """
    own_names = norm_names(shared)
    if statistics_only:
        own_names -= dict(shared.named_parameters(remove_duplicate=False)).keys()
    if not own_names:
        what = "statistics" if statistics_only else "norms"
        raise UsageError(f"the blocks of stage {stage.spec.name} have no {what} to keep; tie them without")
    spec = stage.spec
    modules = [copy.deepcopy(step) for step in steps]
    modules[0] = _with_all_but(own_names, shared, steps[0])
    for module in modules[1:]:
        share_layers(module, modules[0], norms=statistics_only)
    blocks = named([spec.blocks[b].origin for b in spec.schedule])
    base, *others = blocks
    blocks = (base, *(replace(block, shares=base.name, shares_norms=statistics_only) for block in others))
    own = replace(spec, blocks=blocks, schedule=tuple(range(spec.depth)), blends=())
    return rebuilt(stage, own, modules, [stage.splits[b] for b in spec.schedule])


def _with_all_but(names: set[str], shared: nn.Module, step: nn.Module) -> nn.Module:
    """A copy of the step's block with all tensors of `shared` but those named."""
    module = copy.deepcopy(step)
    module.load_state_dict({n: t for n, t in shared.state_dict().items() if n not in names}, strict=False)
    return module


def _mean(states: Sequence[dict[str, Tensor]], weights: Sequence[float], stage: str) -> dict[str, Tensor]:
    """Weighted mean of state dicts; integer entries (counters) are the first one's."""
    result = {}
    for name, value in states[0].items():
        present = [state[name] for state in states if name in state and state[name].shape == value.shape]
        if len(present) < len(states):
            raise ResodeError(f"stage {stage}: blocks differ in {name!r}, so their weights cannot be averaged")
        if value.is_floating_point():
            terms = torch.stack([v.double() * w for v, w in zip(present, weights, strict=True)])
            result[name] = terms.sum(0).to(value.dtype)
        else:
            result[name] = value
    return result


def named(origins: Sequence[str]) -> tuple[BlockSpec, ...]:
    """Blocks called after the source block they come from: '3', '3+1', '3+2', …"""
    seen: Counter[str] = Counter()
    blocks = []
    for origin in origins:
        copies = seen[origin]
        seen[origin] += 1
        blocks.append(BlockSpec(f"{origin}+{copies}" if copies else origin, origin))
    return tuple(blocks)


def rebuilt(
    stage: OdeStage,
    spec: StageSpec,
    modules: Sequence[nn.Module],
    splits: Sequence[BlockSplit],
    *,
    transition: Sequence[nn.Module] | None = None,
) -> OdeStage:
    """A stage of other steps with the same transition, or another one, and the same adjoint and mode."""
    before = dict(zip(spec.transition, stage.transition if transition is None else transition, strict=True))
    new = OdeStage(spec, transition=before, blocks=modules, splits=splits)
    new.adjoint = stage.adjoint
    return new.train(stage.training)
