"""Rewrite a stage's steps: tie, untie, deepen. All of it is on the schedule and the distinct blocks.

N: depth; T: horizon; h = T/N: step size; σ: schedule.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor, nn

from .errors import ResodeError, UsageError, unknown
from .parts import BlockRule
from .stage import BlockSpec, OdeStage, StageSpec

MODES = ("replicate", "interpolate", "identity")
RULES = ("mean", "first", "middle", "last")


def tie(stage: OdeStage, *, rule: str = "mean") -> OdeStage:
    """One block for all steps: the mean of the steps' weights, or the first, middle or last step's.

    N, T and h stay. A tied stage is returned as it is.
    """
    if rule not in RULES:
        raise unknown("tie rule", rule, RULES)
    spec = stage.spec
    if len(spec.blocks) <= 1:
        return stage
    chosen = {"first": 0, "middle": spec.depth // 2, "last": spec.depth - 1}.get(rule, 0)
    b = spec.schedule[chosen]
    module = copy.deepcopy(stage.blocks[b])
    name = spec.blocks[b].name
    if rule == "mean":
        states = [stage.blocks[k].state_dict() for k in spec.schedule]
        module.load_state_dict(_mean(states, [1 / spec.depth] * spec.depth, spec.name))
        name = "mean"
    blocks = (BlockSpec(name, spec.blocks[b].origin),)
    return _rebuilt(stage, replace(spec, blocks=blocks, schedule=(0,) * spec.depth), [module], [stage.rules[b]])


def untie(stage: OdeStage) -> OdeStage:
    """Copy blocks until every step has its own. The function stays the same."""
    spec = stage.spec
    modules, rules, origins, used = [], [], [], set()
    for b in spec.schedule:
        modules.append(copy.deepcopy(stage.blocks[b]) if b in used else stage.blocks[b])
        rules.append(stage.rules[b])
        origins.append(spec.blocks[b].origin)
        used.add(b)
    spec = replace(spec, blocks=_named(origins), schedule=tuple(range(spec.depth)))
    return _rebuilt(stage, spec, modules, rules)


def deepen(stage: OdeStage, blocks: int, *, mode: str = "replicate") -> OdeStage:
    """Take a stage to `blocks` steps.

    replicate: each step becomes a run of steps of its block; T stays, so h shrinks: a finer
        discretisation of the same ODE. Steps are spread evenly: σ'(n) = σ(⌊n N / N'⌋).
    interpolate: every step gets weights of its own, linear in depth between the steps' weights at
        their midpoints (n + ½)/N; T stays.
    identity: steps whose last norm (or last convolution) is zero are inserted; h stays, so T grows
        with N and the function stays exactly the same.

    Raises UsageError for fewer steps than there are, or where a mode cannot do what it says.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    spec = stage.spec
    if blocks < 1:
        raise UsageError(f"--blocks {blocks}: must be 1 or more")
    if spec.depth == 0:
        raise UsageError(f"stage {spec.name} has no steps to deepen; pick others with --stage")
    if blocks < spec.depth:
        raise UsageError(f"stage {spec.name} has {spec.depth} steps already, more than --blocks {blocks}")
    if blocks == spec.depth:
        return stage
    if mode == "replicate":
        schedule = tuple(spec.schedule[n * spec.depth // blocks] for n in range(blocks))
        return _rebuilt(stage, replace(spec, schedule=schedule), list(stage.blocks), stage.rules)
    return _interpolated(stage, blocks) if mode == "interpolate" else _with_identities(stage, blocks)


def _interpolated(stage: OdeStage, blocks: int) -> OdeStage:
    spec = stage.spec
    modules, rules, origins = [], [], []
    for n in range(blocks):
        # The midpoint of step n of N' in units of the old steps, relative to the old midpoints.
        place = Fraction(2 * n + 1, 2 * blocks) * spec.depth - Fraction(1, 2)
        place = min(max(place, Fraction(0)), Fraction(spec.depth - 1))
        below = int(place)
        above = min(below + 1, spec.depth - 1)
        weight = float(place - below)
        b = spec.schedule[below if weight < 0.5 else above]
        module = copy.deepcopy(stage.blocks[b])
        states = [stage.blocks[spec.schedule[k]].state_dict() for k in (below, above)]
        module.load_state_dict(_mean(states, [1 - weight, weight], spec.name))
        modules.append(module)
        rules.append(stage.rules[b])
        origins.append(spec.blocks[b].origin)
    spec = replace(spec, blocks=_named(origins), schedule=tuple(range(blocks)))
    return _rebuilt(stage, spec, modules, rules)


def _with_identities(stage: OdeStage, blocks: int) -> OdeStage:
    spec = stage.spec
    if spec.scheme != "euler":
        raise UsageError(
            f"--mode identity keeps the function under the Euler rule only; stage {spec.name} uses {spec.scheme}"
        )
    modules, rules, specs, schedule = list(stage.blocks), list(stage.rules), list(spec.blocks), []
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
        rules.append(stage.rules[b])
        specs.append(BlockSpec(name, origin))
    horizon = spec.horizon * blocks / spec.depth
    spec = replace(spec, blocks=tuple(specs), schedule=tuple(schedule), horizon=horizon)
    return _rebuilt(stage, spec, modules, rules)


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


def _named(origins: Sequence[str]) -> tuple[BlockSpec, ...]:
    """Blocks called after the source block they come from: '3', '3+1', '3+2', …"""
    seen: Counter[str] = Counter()
    blocks = []
    for origin in origins:
        copies = seen[origin]
        seen[origin] += 1
        blocks.append(BlockSpec(f"{origin}+{copies}" if copies else origin, origin))
    return tuple(blocks)


def _rebuilt(stage: OdeStage, spec: StageSpec, modules: Sequence[nn.Module], rules: Sequence[BlockRule]) -> OdeStage:
    transition = dict(zip(spec.transition, stage.transition, strict=True))
    rebuilt = OdeStage(spec, transition=transition, blocks=modules, rules=rules)
    rebuilt.adjoint = stage.adjoint
    return rebuilt.train(stage.training)
