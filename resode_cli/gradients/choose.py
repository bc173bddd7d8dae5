"""`auto`: the fastest backward plan within a memory budget whose gradients are within a tolerance, piece by piece.

What a plan holds and how long it takes is known from simulated steps. What it does to gradients is measured on a real
batch, stage by stage: the stage is run from its true input, its output is given its true adjoint, and the gradients
that come back are compared with those of exact checkpoints. What was chosen is then verified on the whole network,
where errors add up. A plan that is exact, or plain backprop, needs no measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ResodeError
from ..network.mixing import differs_in_parts, mixes_images
from ..network.model import OdeResNet
from ..ode import Adjoint, RandomState, fixed_buffers
from ..simulation.step import RESERVE, REST, Simulation, StepUse, predicted
from .menu import HOLD, Menu, stage_of
from .planner import EXACT_WORTH, Option, Plan, fastest, lean, least, peak_of, seconds_of
from .results import Alternative, ChosenAdjoints, OverBudgetError, PieceChoice
from .trials import FIRST_WIDTH, Trials, Tried

# Another batch has another error: what is chosen has this much of the tolerance on the batch at hand.
MARGIN = 0.7
# Of a forward pass: what is given away for memory where no budget says how much of that there is.
SLACK = 0.2
ROUNDS = 16
FASTER = 0.95  # of a time: what is worth being told
# Of a piece that was not to be chosen, by whether its gradient is exact.
AS_ASKED = (
    "as asked for; the gradient error from here, which the pieces before inherit, was not measured",
    "as asked for",
)


def choose_adjoints(
    model: OdeResNet,
    images: Tensor,
    labels: Tensor,
    *,
    tolerance: float,
    budget: int | None,
    batch_size: int,
    optimizer_slots: int = 2,
    methods: Sequence[str] | None = None,
    amp: str = "none",
    micro_batches: bool = False,
    fixed: Mapping[str, Adjoint] | None = None,
    autocast: Callable[[], Any] | None = None,
    on_stage: Callable[[str, str], None] = lambda stage, adjoint: None,
) -> ChosenAdjoints:
    """Choose an adjoint for every piece of the network and set it.

    images: (B, 3, H, W), labels: (B,): a real batch, of which as many are used as the budget allows. The model is in
    the mode that it trains in; its buffers and the generators are left as they were.
    tolerance: of ‖g − ĝ‖ / ‖g‖ of each stage's parameters in the whole network.
    budget: bytes for a training step with `batch_size` images: weights, gradients, `optimizer_slots`
    numbers per parameter of optimizer state (Adam's 2), activations. None: no activations are kept for speed alone.
    methods: of the steps, to choose from; None: all. micro_batches: whether the batch may be split.
    fixed: adjoints of stages and of the 'stem' that are not to be chosen; the tolerance is not theirs, and the errors
    of the others are measured as if they were exact.

    Raises ResodeError if the budget is too small for any plan.
    """
    random = RandomState.now(images.device)
    shape = (batch_size, *images.shape[1:])
    simulation = Simulation(model, images.device.type)
    menu = Menu(model, simulation, shape, amp=amp, optimizer_slots=optimizer_slots, fixed=fixed)
    try:
        chooser = _Chooser(menu, images, labels, tolerance, budget, methods, autocast or torch.enable_grad, on_stage)
        return chooser.choose(micro_batches=micro_batches)
    finally:
        random.restore()


class _Chooser:
    def __init__(
        self,
        menu: Menu,
        images: Tensor,
        labels: Tensor,
        tolerance: float,
        budget: int | None,
        methods: Sequence[str] | None,
        autocast: Callable[[], Any],
        on_stage: Callable[[str, str], None],
    ) -> None:
        self.menu, self.model, self.images = menu, menu.model, images
        self.tolerance, self.methods, self.autocast, self.on_stage = tolerance, methods, autocast, on_stage
        # Errors of several stages add up like independent ones, nearly; the whole network is verified in the end.
        share = MARGIN * tolerance / math.sqrt(max(len(self.model.stages), 1))
        self.budget = math.inf if budget is None else budget
        self.trials = Trials(
            menu, images, labels, budget=self.budget, share=share, autocast=autocast, on_stage=on_stage
        )
        self.trials.widths = {name: [] for name in menu.fixed}
        self.mixes = True
        self.parts = [1]

    def choose(self, *, micro_batches: bool) -> ChosenAdjoints:
        held, free = self.menu.held(), math.isinf(self.budget)
        given = self.menu.as_given()
        if not free and self.methods is None and predicted(given) <= self.budget:
            plan = {name: Option(HOLD, use, True) for name, use in held.pieces.items()}
            return self._chosen(plan | {name: self.menu.of_fixed(name) for name in self.menu.fixed}, 1, given, {})
        if not free:
            self._look_for_mixing(micro_batches=micro_batches)
        allowed = self.budget
        for _ in range(ROUNDS):
            found = self._plan(allowed, lean_first=free or self.methods is not None)
            plan, parts = found if found is not None else self._least()
            whole = self.menu.whole(_adjoints(plan), parts)
            if found is None and predicted(whole) > self.budget:
                raise self._refusal(predicted(whole))
            if predicted(whole) > self.budget:  # the sum of the pieces is an estimate
                allowed = self._peak(plan, parts) - max((predicted(whole) - self.budget) / 2, 1)
                continue
            inexact_somewhere = not all(self._is_settled(name, option) for name, option in plan.items())
            errors = self.trials.together(_adjoints(plan)) if inexact_somewhere else {}
            bad = [name for name, error in errors.items() if not error <= MARGIN * self.tolerance]
            inexact = [name for name in self.trials.stages if not self._is_exact(name, plan)] if bad else []
            if not inexact:
                return self._chosen(plan, parts, whole, errors)
            # What is too far off inherits its error from the stages above it too: tighten the worst of them.
            names = list(plan)
            below = names.index(bad[0])
            blamed = [name for name in inexact if names.index(name) >= below] or inexact
            alone = {name: self.trials.on(name, self._inexact_of(name, plan)).error for name in blamed}
            worst = max(alone, key=lambda name: alone[name])
            self.trials.shares[worst] = alone[worst] / 2
            self.trials.widths.pop(worst, None)
        plan, parts = self._least()
        whole = self.menu.whole(_adjoints(plan), parts)
        if predicted(whole) <= self.budget and all(self._is_settled(*own) for own in plan.items()):
            return self._chosen(plan, parts, whole, {})
        raise self._refusal(predicted(whole) if predicted(whole) > self.budget else None)

    # Planning

    def _plan(self, allowed: float, *, lean_first: bool) -> tuple[Plan, int] | None:
        """The fastest plan within a budget, and in how many micro-batches. None if there is none."""
        if lean_first:
            plan = self._lean()
            if self._peak(plan, 1) <= allowed:
                return plan, 1
        found = self._fastest(allowed, exact=self.methods is None)
        if self.methods is None:
            hoped = self._fastest(allowed, exact=False, hoping=True)
            if hoped is not None and not _worth(hoped, found) and self.trials.affordable:
                measured = self._fastest(allowed, exact=False)
                found = found if measured is None or _worth(measured, found) else measured
        return found

    def _least(self) -> tuple[Plan, int]:
        """The plan that holds least, of what may be done, and in how many micro-batches."""
        measuring = self.methods is not None or self.trials.affordable
        if self.methods is None and self.menu.coded and measuring:
            self.trials.calibrate_widths()
        options = self._options(exact=not measuring)
        plans = []
        for parts in self.parts:
            own = options if parts == 1 else self.menu.in_micro_batches(options, parts)
            own = {name: [o for o in found if self._is_known(name, o)] for name, found in own.items()}
            if all(own.values()):
                plans.append((least(own), parts))
        if not plans:
            raise self._refusal(None)
        return min(plans, key=lambda found: self._peak(*found))

    def _is_known(self, name: str, option: Option) -> bool:
        """Whether an option is exact, or was measured to be within its share, as those that are left of them are."""
        coded = option.adjoint.bits is not None
        return coded or self._is_settled(name, option) or self.trials.knows(name, option.adjoint)

    def _options(self, *, exact: bool, hoping: bool = False) -> dict[str, list[Option]]:
        """What there is to choose from. hoping: with codes and reversals that were not tried yet."""
        widths = {name: [FIRST_WIDTH] for name in self.model.stages} if hoping else {}
        options = self.menu.options(
            self.methods, {} if exact else {**widths, **self.trials.widths}, reversals=not exact
        )
        return {
            name: [o for o in found if self._is_settled(name, o) or (not exact and self.trials.may_do(name, o.adjoint))]
            for name, found in options.items()
        }

    def _fastest(self, allowed: float, *, exact: bool, hoping: bool = False) -> tuple[Plan, int] | None:
        """The fastest plan; unless exact or hoping, of options that were measured to be within the tolerance."""
        if not exact and not hoping and self.methods is None and self.menu.coded:
            self.trials.calibrate_widths()
        while True:
            options = self._options(exact=exact, hoping=hoping)
            best: tuple[Plan, int] | None = None
            for parts in self.parts:
                own = options if parts == 1 else self.menu.in_micro_batches(options, parts)
                room = (allowed - self._fixed) / (1 + RESERVE) - (self._gradients if parts > 1 else 0)
                plan = fastest(own, room)
                if plan is not None and (best is None or _seconds(plan) < _seconds(best[0])):
                    best = plan, parts
            if best is None or exact or hoping or self._measured(best[0]):
                return best

    def _lean(self) -> Plan:
        """Without a budget: little memory at little time, and nothing held for speed alone."""
        while True:
            options = self._options(exact=False)
            plan = lean(
                {
                    name: [o for o in found if name in (REST, *self.menu.fixed) or o.adjoint != HOLD]
                    for name, found in options.items()
                },
                SLACK,
            )
            if self._measured(plan):
                return plan

    def _measured(self, plan: Plan) -> bool:
        """Whether every inexact choice is within its share; those not tried yet are tried, and may cost more then."""
        good = True
        for name, option in plan.items():
            if not self._is_settled(name, option) and option.adjoint.bits is None:
                good &= self.trials.knows(name, option.adjoint)
                good &= self.trials.on(name, option.adjoint).error <= self.trials.shares[name]
        return good

    # Measuring

    def _look_for_mixing(self, *, micro_batches: bool) -> None:
        """Find out whether images of the network see each other, and with it what may be split."""
        self.on_stage("all stages", "do images mix?")
        further = any(stage.spec.further for stage in self.model.stages.values())
        few = self.images[:2]
        self.model.use_adjoint(HOLD)
        before = RandomState.everywhere(few.device, self.model.modules())
        with self.autocast():
            self.mixes = mixes_images(self.model.net, self.model, few)
            with fixed_buffers([self.model]), torch.no_grad():
                self.model(few)
        draws = not before.equals(RandomState.now(few.device, [g for g, _ in before.held]))
        few = self.images[: max(len(self.images) // 4 * 4, 1)]
        with self.autocast():
            self.mixes = self.mixes or differs_in_parts(self.model, few)
        self.menu.sliced = not (self.mixes or further or draws)
        self.menu.coded = all(stage.compilation is None for stage in self.model.stages.values())
        if micro_batches and not (self.mixes or draws):  # or every part would draw other numbers
            batch = self.menu.images[0]
            self.parts = [2**k for k in range(batch.bit_length()) if 2**k <= batch]

    # Results

    def _is_exact(self, stage: str, plan: Plan) -> bool:
        return all(self._is_settled(name, option) for name, option in plan.items() if stage_of(name) == stage)

    def _is_settled(self, name: str, option: Option) -> bool:
        """Whether there is nothing to measure: an option is exact, or it was not to be chosen."""
        return option.exact or name in self.menu.fixed

    def _inexact_of(self, stage: str, plan: Plan) -> Adjoint:
        """The inexact adjoint of a stage's steps, or of its transition."""
        own = [o.adjoint for name, o in plan.items() if stage_of(name) == stage and not o.exact]
        return own[-1]

    @property
    def _fixed(self) -> int:
        return self.menu.held().fixed

    @property
    def _gradients(self) -> int:
        return sum(self.menu.trained.values())

    def _peak(self, plan: Plan, parts: int) -> float:
        further = self._gradients if parts > 1 else 0
        return self._fixed + (1 + RESERVE) * (peak_of(plan.values()) + further)

    def _chosen(self, plan: Plan, parts: int, whole: StepUse, errors: Mapping[str, float]) -> ChosenAdjoints:
        """The plan, set, with the figures that it rests on."""
        adjoints = _adjoints(plan)
        self.model.use_adjoint(adjoints)
        held = self.menu.held()
        choices = tuple(self._describe(name, option, errors) for name, option in plan.items() if name != REST)
        return ChosenAdjoints(
            choices,
            self.tolerance,
            self.trials.count,
            self.menu.images[0],
            parts,
            predicted(whole),
            predicted(held),
            None if math.isinf(self.budget) else int(self.budget),
            whole.seconds / held.seconds,
            self._alternatives(predicted(whole), whole.seconds, held),
        )

    def _alternatives(self, bytes_now: int, seconds_now: float, held: StepUse) -> tuple[Alternative, ...]:
        """The nearest plan that holds clearly less, and the nearest that is clearly faster, of what is known to do."""
        if self.methods is not None:
            return ()
        room, found = bytes_now - held.fixed, []
        for share in (0.75, 0.6, 0.45, 0.3):
            other = self._fastest(held.fixed + share * room, exact=True)
            if other is not None:
                found.append(self._alternative(*other, seconds_now, bytes_now))
                break
        for share in (1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0):
            other = self._fastest(held.fixed + share * room, exact=True)
            if other is None or _seconds(other[0]) >= FASTER * seconds_now:
                continue
            if self._peak(*other) > self.budget:
                found.append(self._alternative(*other, seconds_now, bytes_now))
            break
        return tuple(found)

    def _alternative(self, plan: Plan, parts: int, seconds_now: float, bytes_now: int) -> Alternative:
        needed = round(self._peak(plan, parts))
        return Alternative(needed, needed / bytes_now, _seconds(plan) / seconds_now)

    def _describe(self, name: str, chosen: Option, errors: Mapping[str, float]) -> PieceChoice:
        stage = self.model.stages.get(name)
        tried = self.trials.tried.get(name, {})
        planned = self.menu.evaluations(name, chosen.adjoint) if stage is not None else float(chosen.adjoint.replays)
        own = tried.get(replace(chosen.adjoint, slices=1), Tried(0.0, planned, None, None))
        unmeasured = name in self.menu.fixed and not chosen.exact
        free = [
            t
            for adjoint, t in tried.items()
            if adjoint.anchors is None and not adjoint.corrections and adjoint.method != "checkpoint"
        ]
        best = min(free, key=lambda t: t.error, default=None)
        return PieceChoice(
            name,
            0 if stage is None else stage.spec.depth,
            chosen.adjoint,
            None if unmeasured else errors.get(name, 0.0),
            None if unmeasured else own.error,
            own.evaluations,
            own.drift,
            None if best is None else best.drift,
            own.contraction if best is None else best.contraction,
            tuple((adjoint.label, t.error) for adjoint, t in tried.items()),
            max(chosen.use.kept, 0),
            max(self.menu.held().pieces[name].kept, 0),
            AS_ASKED[chosen.exact]
            if name in self.menu.fixed
            else _reason(chosen, best, self.trials.shares.get(name, 0)),
        )

    def _refusal(self, needed: int | None) -> ResodeError:
        """Name the least that can be had, and what would lower it."""
        advice = "raise --memory-budget or lower --batch-size"
        if self.mixes and self.methods is None:
            advice += ", or split it (--accumulate auto, or --bn frozen, with which parts are as good as the whole)"
        if needed is None:
            return ResodeError(f"no adjoint of {', '.join(self.methods or ['all'])} is within --grad-tol; raise it")
        return OverBudgetError(needed, int(self.budget), advice)


def _adjoints(plan: Plan) -> dict[str, Adjoint]:
    return {name: option.adjoint for name, option in plan.items() if name != REST}


def _seconds(plan: Plan) -> float:
    return seconds_of(plan.values())


def _worth(inexact: tuple[Plan, int], exact: tuple[Plan, int] | None) -> bool:
    """Whether there is an exact plan that is not much slower."""
    return exact is not None and _seconds(exact[0]) <= (1 + EXACT_WORTH) * _seconds(inexact[0])


def _reason(chosen: Option, free: Tried | None, share: float) -> str:
    adjoint = chosen.adjoint
    if adjoint == HOLD:
        return "nothing is faster"
    if adjoint.bits is not None:
        return "codes that are fine enough"
    if adjoint.anchors is None and not chosen.exact:
        return "reversal alone is accurate enough"
    if free is None:
        return "exact"
    if free.error <= share:
        return (
            f"reversal alone is accurate enough (off by {free.error:.2g}), but takes {free.evaluations:.2g} evaluations"
            " per step"
        )
    why = f"reversal alone is off by {free.error:.2g}"
    if free.contraction is not None and not free.contraction < 1:
        why += f": it cannot converge (contraction {free.contraction:.2g})"
    return why + ("; exact anchors" if chosen.exact else "; anchors bring it below the tolerance")
