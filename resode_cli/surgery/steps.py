"""Stages of other steps: tied, untied, deepened. All of it is on the schedule and the distinct blocks.

What comes of a stage may hold its modules, or be the stage itself where nothing is to do: it is to take its place.

N: depth; T: horizon; h = T/N: step size; σ: schedule; θ_n: weights of step n.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from ..errors import UsageError, unknown
from ..network.specs import BlockSpec
from ..network.stage import OdeStage
from .depth_weights import (
    DEPTH_WEIGHTS,
    TIED,
    check_blends,
    linear_in_depth,
    mean_block,
    named,
    rebuilt,
    step_blocks,
    tied_but_norms,
)

MODES = ("replicate", "interpolate", "identity")
RULES = ("mean", "first", "middle", "last")


def tied(stage: OdeStage, *, rule: str = "mean", depth_weights: str = "tied") -> OdeStage:
    """One block for all steps: the mean of the steps' weights, or the first, middle or last step's.

    depth_weights: 'tied'; 'tied+norms' lets every step keep the norms it had, statistics included; 'tied+stats' lets it
        keep their running statistics alone. Those of one BatchNorm for all steps are an average over states that may
        be far apart; then the network is another one in eval mode than the one that was trained.

    N, T and h stay. A stage that is tied so already is returned as it is.
    """
    if rule not in RULES:
        raise unknown("tie rule", rule, RULES)
    if depth_weights not in TIED:
        raise unknown("depth weights", depth_weights, TIED)
    spec = stage.spec
    if spec.depth <= 1 or spec.kind == depth_weights:
        return stage
    chosen = {"first": 0, "middle": spec.depth // 2, "last": spec.depth - 1}.get(rule)
    steps = step_blocks(stage)
    module = copy.deepcopy(steps[chosen]) if chosen is not None else mean_block(stage, steps)
    if depth_weights != "tied":
        return tied_but_norms(stage, module, steps, statistics_only=depth_weights == "tied+stats")
    b = spec.schedule[chosen or 0]
    name = "mean" if chosen is None else spec.blocks[b].name
    blocks = (BlockSpec(name, spec.blocks[b].origin),)
    one = replace(spec, blocks=blocks, schedule=(0,) * spec.depth, blends=())
    return rebuilt(stage, one, [module], [stage.splits[b]])


def untied(stage: OdeStage) -> OdeStage:
    """Copy blocks until every step has its own. The function stays the same."""
    spec = stage.spec
    if spec.kind == "untied":
        return stage
    if spec.blends or any(block.shares for block in spec.blocks):
        modules = [copy.deepcopy(module) for module in step_blocks(stage)]  # one by one: nothing stays shared
    else:
        used: set[int] = set()
        modules = []
        for b in spec.schedule:
            modules.append(copy.deepcopy(stage.blocks[b]) if b in used else stage.blocks[b])
            used.add(b)
    splits = [stage.splits[b] for b in spec.schedule]
    blocks = named([spec.blocks[b].origin for b in spec.schedule])
    own = replace(spec, blocks=blocks, schedule=tuple(range(spec.depth)), blends=())
    return rebuilt(stage, own, modules, splits)


def deepened(stage: OdeStage, blocks: int, *, mode: str = "replicate", depth_weights: str | None = None) -> OdeStage:
    """Take a stage to `blocks` steps.

    replicate: each step becomes a run of steps of its block; T stays, so h shrinks: a finer
        discretisation of the same ODE. Steps are spread evenly: σ'(n) = σ(⌊n N / N'⌋). Where N' is no multiple of N,
        some blocks have a step more than others, and the error against that ODE is O(h) whatever the forward rule.
    interpolate: every step gets weights of its own, linear in depth between the steps' weights at
        their midpoints (n + ½)/N; T stays.
    identity: steps whose last norm (or last convolution) is zero are inserted; h stays, so T grows
        with N and the function stays exactly the same; after a block that ends in a ReLU, for states that are not
        negative, as the stem and the transitions of a ResNet give them.

    depth_weights: how the steps share weights afterwards, with the first two modes; None: as they
    come out of the mode, but linear in depth stays linear.

    replicate: one block per run. linear: the weights that 'interpolate' gives, of which only those at the
    midpoints (the knots) are held and trained. tied, tied+stats, tied+norms: their mean, see `tied`. free: each step
    its own.

    Raises UsageError for fewer steps than there are, or where a mode cannot do what it says.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if depth_weights is not None and depth_weights not in DEPTH_WEIGHTS:
        raise unknown("depth weights", depth_weights, DEPTH_WEIGHTS)
    spec = stage.spec
    if blocks < 1:
        raise UsageError(f"--blocks {blocks}: must be 1 or more")
    if spec.depth == 0:
        raise UsageError(f"stage {spec.name} has no steps to deepen; pick others with --stage")
    if blocks < spec.depth:
        raise UsageError(f"stage {spec.name} has {spec.depth} steps already, more than --blocks {blocks}")
    if mode == "identity":
        if depth_weights not in (None, "free"):
            raise UsageError(
                f"--mode identity inserts blocks of their own; --depth-weights {depth_weights} shares them"
            )
        return stage if blocks == spec.depth else _with_identities(stage, blocks)
    if mode == "interpolate" and depth_weights == "replicate":
        raise UsageError("--mode interpolate gives every step other weights; --depth-weights replicate shares them")
    linear = mode == "interpolate" or depth_weights == "linear" or (depth_weights is None and bool(spec.blends))
    deep = linear_in_depth(stage, blocks) if linear else _replicated(stage, blocks)
    if depth_weights in TIED:
        return tied(deep, depth_weights=depth_weights)
    if depth_weights == "free" or (mode == "interpolate" and depth_weights is None and blocks > spec.depth):
        return untied(deep)
    check_blends(deep)
    return deep


def _replicated(stage: OdeStage, blocks: int) -> OdeStage:
    spec = stage.spec
    if blocks == spec.depth:
        return stage
    if spec.blends:  # a run needs one block
        stage = untied(stage)
        spec = stage.spec
    schedule = tuple(spec.schedule[n * spec.depth // blocks] for n in range(blocks))
    return rebuilt(stage, replace(spec, schedule=schedule), list(stage.blocks), stage.splits)


def _with_identities(stage: OdeStage, blocks: int) -> OdeStage:
    spec = stage.spec
    if spec.scheme != "euler":
        raise UsageError(
            f"--mode identity keeps the function under the Euler rule only; stage {spec.name} uses {spec.scheme}"
        )
    if spec.blends:  # a step is repeated as a block of its own
        stage = untied(stage)
        spec = stage.spec
    modules, splits, specs, schedule = list(stage.blocks), list(stage.splits), list(spec.blocks), []
    previous = -1
    taken = {block.name for block in spec.blocks} | set(spec.transition)
    for n in range(blocks):
        step = n * spec.depth // blocks
        b = spec.schedule[step]
        if step != previous:
            schedule.append(b)
            previous = step
            continue
        origin = spec.blocks[b].origin
        name = next(f"{origin}+{k}" for k in range(1, blocks + 1) if f"{origin}+{k}" not in taken)
        taken.add(name)
        schedule.append(len(modules))
        modules.append(_zeroed(stage, b))
        splits.append(stage.splits[b])
        specs.append(BlockSpec(name, origin))
    horizon = spec.horizon * blocks / spec.depth
    spec = replace(spec, blocks=tuple(specs), schedule=tuple(schedule), horizon=horizon)
    return rebuilt(stage, spec, modules, splits)


def _zeroed(stage: OdeStage, b: int) -> nn.Module:
    """A copy of block b whose residual function is zero, by its last norm or else its last convolution.

    Which module is last cannot be read off a block of any class, so it is tried out.
    """
    norms: list[str] = []
    layers: list[str] = []
    for name, module in stage.blocks[b].named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            (norms if weight.ndim == 1 else layers).append(name)
    for name in [*reversed(norms), *reversed(layers)]:
        candidate = copy.deepcopy(stage.blocks[b])
        last = candidate.get_submodule(name)
        with torch.no_grad():
            for parameter in last.parameters(recurse=False):
                parameter.zero_()
        if _is_zero(stage, b, candidate):
            return candidate
    raise UsageError(
        f"--mode identity: block {stage.spec.blocks[b].name} of stage {stage.spec.name} has no last norm or"
        " convolution that makes it the identity when zero (its activation changes the state anyway)"
    )


def _is_zero(stage: OdeStage, b: int, module: nn.Module) -> bool:
    residual = replace(stage.residuals()[b], module=module)
    channels = next((p.shape[1] for p in module.parameters() if p.ndim == 4), 8)
    groups = next((m.groups for m in module.modules() if isinstance(m, nn.Conv2d)), 1)
    reference = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    state = torch.rand(2, channels * groups, 8, 8, generator=generator).to(reference)
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            # States after a ReLU are not negative, and there max(g, -x) = 0 for g = 0.
            return bool((residual(state) == 0).all())
    except RuntimeError:
        return False
    finally:
        module.train(training)
