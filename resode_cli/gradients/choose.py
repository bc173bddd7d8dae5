"""`auto`: for each stage the cheapest backward plan that meets a gradient tolerance within a memory budget.

A plan is judged by what it does to gradients on a real batch, stage by stage: the stage is run from its
true input, its output is given its true adjoint, and the gradients that come back are compared with those
of exact checkpoints. What was chosen is then verified on the whole network, where errors add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ResodeError
from ..network.model import OdeResNet
from ..network.stage import OdeStage
from ..ode import Adjoint, RandomState
from ..quantities import size
from .candidates import Candidate, by_preference, candidates, rule_factor
from .probe import Probe, StageBytes

# Another batch has another error: what is chosen has this much of the tolerance on the batch at hand.
MARGIN = 0.7


@dataclass(frozen=True)
class StageChoice:
    """What was chosen for one stage, and the figures that it rests on.

    error: relative error of the gradient of the stage's steps, in the whole network, on the batch used.
    own_error: relative error of the stage alone, given its output's exact adjoint: the larger one of parameters and
        input.
    own_drift: drift of what was chosen; None if it is exact.
    free_drift, contraction: of the best reversal without anchors; None if none was tried.
    tried: the adjoints measured, with their own errors.
    bytes_held: by the stage at a time at most, for the batch size planned for.
    backprop_bytes: that plain backprop would hold.
    """

    stage: str
    steps: int
    adjoint: Adjoint
    error: float
    own_error: float
    evaluations_per_step: float
    own_drift: float | None
    free_drift: float | None
    contraction: float | None
    tried: tuple[tuple[str, float], ...]
    bytes_held: int
    backprop_bytes: int
    reason: str


@dataclass(frozen=True)
class ChosenAdjoints:
    """The choices, and the memory of a training step that they lead to: predicted bytes, and the budget."""

    choices: tuple[StageChoice, ...]
    tolerance: float
    images: int
    batch_size: int
    predicted_bytes: int
    backprop_bytes: int
    budget: int

    @property
    def backprop_fits(self) -> bool:
        return self.backprop_bytes <= self.budget

    @property
    def adjoints(self) -> dict[str, Adjoint]:
        return {choice.stage: choice.adjoint for choice in self.choices}


@dataclass
class _Tried:
    """One adjoint on one stage alone."""

    error: float
    evaluations: float
    drift: float | None
    contraction: float | None


def choose_adjoints(
    model: OdeResNet,
    images: Tensor,
    labels: Tensor,
    *,
    tolerance: float,
    budget: int,
    batch_size: int,
    optimizer_slots: int = 2,
    methods: Sequence[str] | None = None,
    autocast: Callable[[], Any] | None = None,
    on_stage: Callable[[str, str], None] = lambda stage, adjoint: None,
) -> ChosenAdjoints:
    """Choose an adjoint for every stage and set it.

    images: (B, 3, H, W), labels: (B,): a real batch. The model is in the mode that it trains in; its
    buffers and the generators are left as they were.
    tolerance: of ‖g − ĝ‖ / ‖g‖ of each stage's parameters in the whole network.
    budget: bytes for a training step with `batch_size` images: weights, gradients, `optimizer_slots`
    numbers per parameter of optimizer state (Adam's 2), activations.
    methods: to choose from; None: all but backprop.

    Raises ResodeError if the budget is too small for any plan.
    """
    random = RandomState.now(images.device)
    try:
        on_stage("all stages", "exact")
        probe = Probe(model, images, labels, autocast or torch.enable_grad)
        return _Chooser(probe, tolerance, methods, on_stage).choose(budget, batch_size, optimizer_slots)
    finally:
        random.restore()


class _Chooser:
    def __init__(
        self, probe: Probe, tolerance: float, methods: Sequence[str] | None, on_stage: Callable[[str, str], None]
    ) -> None:
        self.probe, self.model, self.stages = probe, probe.model, probe.stages
        self.tolerance, self.methods, self.on_stage = tolerance, methods, on_stage
        self.tried: dict[str, dict[Adjoint, _Tried]] = {name: {} for name in self.stages}

    def choose(self, budget: int, batch_size: int, optimizer_slots: int) -> ChosenAdjoints:
        images = len(self.probe.images)
        scale = batch_size / images
        sizes = {
            name: StageBytes.of(stage, self.probe.passages[name].x, scale, self.probe.autocast)
            for name, stage in self.stages.items()
        }
        weights = sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))
        trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        working = max((size.working for size in sizes.values()), default=0)
        fixed = int(weights + (1 + optimizer_slots) * trained + self.probe.outside * scale + working)
        ordered = {name: self._candidates(name) for name in self.stages}
        # Errors of several stages add up like independent ones, nearly; the whole network is verified below.
        share = MARGIN * self.tolerance / math.sqrt(max(len(self.stages), 1))
        caps = dict.fromkeys(self.stages, math.inf)
        shares = dict.fromkeys(self.stages, share)
        while True:
            picked = {name: self._pick(name, ordered[name], caps[name], shares[name]) for name in self.stages}
            total = fixed + sum(sizes[name].state * picked[name].states for name in picked)
            if total > budget:
                self._shrink(picked, ordered, caps, sizes, budget, total)
                continue
            errors = self._verify(picked)
            bad = [name for name, error in errors.items() if not error <= MARGIN * self.tolerance]
            inexact = [name for name in picked if not picked[name].exact]
            if not bad or not inexact:
                break
            # What is too far off inherits its error from the stages above it too: tighten the worst of them.
            below = list(self.stages).index(bad[0])
            blamed = [name for name in inexact if list(self.stages).index(name) >= below] or inexact
            worst = max(blamed, key=lambda name: self.tried[name][picked[name].adjoint].error)
            shares[worst] = self.tried[worst][picked[worst].adjoint].error / 2
        choices = tuple(self._describe(name, picked[name], errors[name], sizes[name], shares[name]) for name in picked)
        backprop = fixed + sum(size.backprop for size in sizes.values())
        return ChosenAdjoints(choices, self.tolerance, images, batch_size, total, backprop, budget)

    def _candidates(self, name: str) -> list[Candidate]:
        stage = self.stages[name]
        return by_preference(
            candidates(stage, self.methods, measured=lambda adjoint: self._try(name, adjoint).evaluations)
        )

    def _try(self, name: str, adjoint: Adjoint) -> _Tried:
        """Measure an adjoint on a stage alone, once."""
        if adjoint not in self.tried[name]:
            self.on_stage(name, adjoint.label)
            stage = self.stages[name]
            stage.use_adjoint(adjoint)
            error = self.probe.alone(name)
            monitor = stage.monitor
            self.tried[name][adjoint] = _Tried(
                error,
                monitor.evaluations / rule_factor(stage) / stage.spec.depth,
                None if monitor.drift is None else monitor.drift.item(),
                None if monitor.contraction is None else monitor.contraction.item(),
            )
        return self.tried[name][adjoint]

    def _pick(self, name: str, ordered: Sequence[Candidate], cap: float, share: float) -> Candidate:
        """The first candidate in order of preference that meets the stage's share of the tolerance."""
        for candidate in ordered:
            if candidate.states > cap:
                continue
            if candidate.exact:
                return candidate
            if self._promising(name, candidate, share) and self._try(name, candidate.adjoint).error <= share:
                return candidate
        raise ResodeError(
            f"stage {name}: no adjoint of {', '.join(self.methods or ['all'])} with up to {cap:g} states held has a"
            f" gradient error below {share:.2g}; raise --memory-budget or --grad-tol, or lower --batch-size"
        )

    def _promising(self, name: str, candidate: Candidate, share: float) -> bool:
        """Whether trying a candidate is worth a pass, going by what was tried of its kind.

        The error falls with the distance between anchors like a power, at most the second; which one,
        the last two tries tell.
        """
        depth, distance = self.stages[name].spec.depth, candidate.adjoint.anchors
        points = sorted(
            ((other.anchors or depth) / depth, tried.error)
            for other, tried in self.tried[name].items()
            if replace(other, anchors=distance) == candidate.adjoint
        )
        points = [(spacing, error) for spacing, error in points if math.isfinite(error) and error > 0]
        if not points or distance is None:
            return True
        (spacing, error), power = points[0], 2.0
        if len(points) > 1 and points[1][1] > error:
            power = min(2.0, math.log(points[1][1] / error) / math.log(points[1][0] / spacing))
        return error * (distance / depth / spacing) ** power <= 1.5 * share

    def _shrink(
        self,
        picked: Mapping[str, Candidate],
        ordered: Mapping[str, Sequence[Candidate]],
        caps: dict[str, float],
        sizes: Mapping[str, StageBytes],
        budget: int,
        total: int,
    ) -> None:
        """Lower the cap of the stage that holds most and can hold less."""
        for name in sorted(picked, key=lambda name: -sizes[name].state * picked[name].states):
            least = min(c.states for c in ordered[name])
            if least < picked[name].states:
                # Towards a half at a time, so that no stage is starved while another feasts.
                excess = math.ceil((total - budget) / sizes[name].state)
                caps[name] = max(picked[name].states - excess, picked[name].states // 2, least)
                return
        raise ResodeError(
            f"memory budget of {size(budget)}: a training step takes at least {size(total)};"
            " raise --memory-budget or lower --batch-size"
        )

    def _verify(self, picked: Mapping[str, Candidate]) -> dict[str, float]:
        """Set what was picked; each stage's error in the whole network."""
        self.on_stage("all stages", "together")
        for name, candidate in picked.items():
            self.stages[name].use_adjoint(candidate.adjoint)
        return self.probe.together()

    def _describe(self, name: str, chosen: Candidate, error: float, size: StageBytes, share: float) -> StageChoice:
        tried = self.tried[name]
        own = tried.get(chosen.adjoint, _Tried(0.0, chosen.evaluations, None, None))
        free = [t for adjoint, t in tried.items() if adjoint.anchors is None and not adjoint.corrections]
        best = min(free, key=lambda t: t.error, default=None)
        return StageChoice(
            name,
            self.stages[name].spec.depth,
            chosen.adjoint,
            error,
            own.error,
            own.evaluations,
            own.drift,
            None if best is None else best.drift,
            own.contraction if best is None else best.contraction,
            tuple((adjoint.label, t.error) for adjoint, t in tried.items()),
            size.state * chosen.states,
            size.backprop,
            _reason(chosen, best, share),
        )


def _reason(chosen: Candidate, free: _Tried | None, share: float) -> str:
    if chosen.adjoint.anchors is None and not chosen.exact:
        return "reversal alone is accurate enough"
    if free is None:
        return "exact"
    if free.error <= share:
        return (
            f"reversal alone is accurate enough (off by {free.error:.2g}), but takes {free.evaluations:.2g} evaluations"
            f" per step where this takes {chosen.evaluations:.2g}"
        )
    why = f"reversal alone is off by {free.error:.2g}"
    if free.contraction is not None and not free.contraction < 1:
        why += f": it cannot converge (contraction {free.contraction:.2g})"
    return why + ("; exact anchors" if chosen.exact else "; anchors bring it below the tolerance")


def exact_adjoint(stage: OdeStage, state_bytes: int, available: int) -> Adjoint:
    """Exact checkpoints: all states if they fit, else as many as do, but two at least."""
    fit = available // max(state_bytes, 1)
    return Adjoint("checkpoint") if fit >= stage.spec.depth else Adjoint("checkpoint", snapshots=max(int(fit), 2))
