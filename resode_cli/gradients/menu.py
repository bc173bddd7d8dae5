"""The ways to run each piece of a network, and what each takes, from a few simulated steps.

A step is simulated in which every piece is run one way; what lies between two ways follows from those: a state held
less, a slice more. What is chosen in the end is simulated as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..network.model import OdeResNet, transition_of
from ..network.outside import STEM
from ..network.stage import OdeStage
from ..ode import REVERSALS, Adjoint, required_scheme
from ..simulation.shallow import pieces_of
from ..simulation.step import REST, PieceUse, Simulation, StepUse, piece_names
from .candidates import planned_evaluations, snapshot_counts, spacings
from .planner import Option

HOLD, AGAIN = Adjoint("backprop"), Adjoint("checkpoint")
SLICED = 2  # slices that are simulated: each takes the time of a step
MOST_CORRECTIONS = 2
# Reverse Euler's prediction alone takes what `pc` takes, and is less accurate.
_WORTH_TRYING = tuple(method for method in REVERSALS if method != "euler")


class Menu:
    """What pieces of a network can be run by, at a batch of images of some shape (B, C, H, W).

    sliced: whether nothing in the network mixes images, so that it can be run in slices of the batch.
    coded: whether states may be held as codes.
    fixed: the adjoints of the parts, stages or 'stem', that are not to be chosen.
    measured: evaluations of Φ per step of a stage by an adjoint, where they were counted. What they are where states
        are extrapolated depends on the weights, and until it is known the least is hoped for.
    """

    def __init__(
        self,
        model: OdeResNet,
        simulation: Simulation,
        images: tuple[int, ...],
        *,
        amp: str,
        optimizer_slots: int,
        fixed: Mapping[str, Adjoint] | None = None,
    ) -> None:
        self.model, self.simulation, self.images = model, simulation, images
        self.amp, self.slots = amp, optimizer_slots
        self.sliced, self.coded = False, True
        self.measured: dict[tuple[str, Adjoint], float] = {}
        self.names = piece_names(model)
        self.steps: dict[tuple[Adjoint, int], dict[str, PieceUse]] = {}
        self._held: StepUse | None = None
        self._as_given: StepUse | None = None
        self.fixed = _by_piece(fixed or {}, self.names)
        self.trained = _trained_bytes(model, self.names)

    def held(self) -> StepUse:
        """A step in which every piece keeps its activations."""
        if self._held is None:
            self._held = self.whole(HOLD)
        return self._held

    def as_given(self) -> StepUse:
        """A step in which every piece keeps its activations but those whose adjoint is fixed."""
        if not self.fixed:
            return self.held()
        if self._as_given is None:
            self._as_given = self.whole({**dict.fromkeys((STEM, *self.model.stages), HOLD), **self.fixed})
        return self._as_given

    def pieces(self, adjoint: Adjoint, batch: int | None = None) -> dict[str, PieceUse]:
        """What each piece takes in a step in which every one is run by this adjoint."""
        shape = (batch or self.images[0], *self.images[1:])
        if (adjoint, shape) == (HOLD, self.images):
            return self.held().pieces
        key = adjoint, shape[0]
        if key not in self.steps:
            needed = required_scheme(adjoint.method)
            stages = self.model.stages.items()
            suited = {name: adjoint if needed in (None, stage.spec.scheme) else HOLD for name, stage in stages}
            self.steps[key] = pieces_of(
                self.simulation, {**suited, STEM: adjoint}, shape, amp=self.amp, optimizer_slots=self.slots
            )
        return self.steps[key]

    def whole(self, adjoints: Adjoint | Mapping[str, Adjoint], micro_batches: int = 1) -> StepUse:
        """A step by the adjoints of a plan."""
        return self.simulation.step(
            adjoints, self.images, amp=self.amp, optimizer_slots=self.slots, micro_batches=micro_batches
        )

    def options(
        self, methods: Sequence[str] | None, bits: Mapping[str, Sequence[int]], *, reversals: bool = True
    ) -> dict[str, list[Option]]:
        """Every piece's options. methods: of the steps, None for all. bits: of the codes to consider, by stage.

        reversals: whether they are among all methods; each takes a simulated step.
        """
        found: dict[str, list[Option]] = {}
        for name in self.names:
            stage = self.model.stages.get(name)
            widths = bits.get(stage_of(name), ()) if self.coded and name != STEM else ()
            if name == REST:
                found[name] = [Option(HOLD, self.pieces(HOLD)[REST], True)]
            elif name in self.fixed:
                found[name] = [self.of_fixed(name)]
            elif stage is not None:
                found[name] = self._of_steps(name, stage, methods, widths, reversals=reversals)
            elif methods is None:
                found[name] = self._of_part(name, widths)
            else:
                found[name] = self._ways(name, AGAIN)
        return found

    def of_fixed(self, name: str) -> Option:
        """All that there is to choose from for a piece whose adjoint is fixed."""
        adjoint, stage = self.fixed[name], self.model.stages.get(name)
        plan = None if stage is None else adjoint.plan(stage.spec.depth, stage.spec.scheme)
        exact = adjoint.bits is None and (plan is None or plan.exact)
        return Option(adjoint, self.as_given().pieces[name], exact)

    def _of_part(self, name: str, widths: Sequence[int]) -> list[Option]:
        """Of a piece that is no steps."""
        found = [Option(HOLD, self._use(name, HOLD), True), *self._ways(name, AGAIN)]
        for width in widths:
            found += self._ways(name, replace(AGAIN, bits=width))
        return found

    def _of_steps(
        self, name: str, stage: OdeStage, methods: Sequence[str] | None, widths: Sequence[int], *, reversals: bool
    ) -> list[Option]:
        found: list[Option] = []
        every = ("backprop", "checkpoint", *(_WORTH_TRYING if reversals else ()))
        for method in methods if methods is not None else every:
            if required_scheme(method) not in (None, stage.spec.scheme):
                continue
            if method == "backprop":
                found.append(Option(HOLD, self._use(name, HOLD), True))
            elif method == "checkpoint":
                found += self._ways(name, AGAIN)
                found += [self._with_snapshots(name, stage, s) for s in snapshot_counts(stage.spec.depth)]
                if methods is None:
                    for width in widths:
                        found += self._ways(name, replace(AGAIN, bits=width))
            else:
                most = MOST_CORRECTIONS if methods is None and REVERSALS[method].modified else 0
                for corrections in range(most + 1):
                    free = Adjoint(method, corrections=corrections)
                    # With every state held it is a checkpoint.
                    found += [
                        option
                        for option in self._reversals(name, stage, free)
                        if option.adjoint.anchors != 1 or (methods is not None and set(methods) <= REVERSALS.keys())
                    ]
        return found

    def _use(self, name: str, adjoint: Adjoint) -> PieceUse:
        return self.pieces(adjoint)[name]

    def _ways(self, name: str, adjoint: Adjoint) -> list[Option]:
        """An adjoint that evaluates again, and the same in slices of the batch: a part of it is divided by them."""
        exact = adjoint.bits is None
        whole = self._use(name, adjoint)
        found = [Option(adjoint, whole, exact)]
        batch = self.images[0]
        if not self.sliced or batch < SLICED:
            return found
        sliced = self._use(name, replace(adjoint, slices=SLICED))
        count = 2
        while count <= batch:
            share = (1 - 1 / count) / (1 - 1 / SLICED)
            slower = (count - 1) / (SLICED - 1)
            use = PieceUse(
                **{field: round(a + (getattr(sliced, field) - a) * share) for field, a in _bytes(whole).items()},
                seconds=whole.seconds + max(sliced.seconds - whole.seconds, 0) * slower,
                once=whole.once + max(sliced.once - whole.once, 0) * slower,
                state=whole.state,
            )
            found.append(Option(replace(adjoint, slices=count), use, exact))
            count *= 2
        return found

    def _with_snapshots(self, name: str, stage: OdeStage, snapshots: int) -> Option:
        """Checkpoints of fewer states, of which a segment's are held while it is run again."""
        adjoint, use, depth = Adjoint("checkpoint", snapshots=snapshots), self._use(name, AGAIN), stage.spec.depth
        plan = adjoint.plan(depth, stage.spec.scheme)
        assert plan is not None
        further = planned_evaluations(plan) - 1
        fewer = (depth - plan.states_kept) * use.state
        grown = max(plan.most_states_held - plan.states_kept, 0) * use.state
        return Option(
            adjoint,
            replace(
                use,
                kept=use.kept - fewer,
                left=use.left + fewer,
                backward=use.backward + grown,
                seconds=use.seconds + further * use.once,
            ),
            True,
        )

    def _reversals(self, name: str, stage: OdeStage, free: Adjoint) -> list[Option]:
        """A reversal without anchors and with ever more of them."""
        depth, use = stage.spec.depth, self._use(name, replace(free, corrections=0))
        if free.corrections:  # evaluations more
            more = free.corrections
            use = replace(use, seconds=use.seconds + more * use.once, evaluations=use.evaluations + more)
        alone = free.plan(depth, stage.spec.scheme)
        assert alone is not None
        # What extrapolation takes is much the same with anchors; without a measurement the least is hoped for.
        extra = self.measured.get((name, free), 0.0)
        found = []
        for every in spacings(depth):
            adjoint = replace(free, anchors=every)
            plan = adjoint.plan(depth, stage.spec.scheme)
            assert plan is not None
            more = (plan.states_kept - alone.states_kept) * use.state
            least = self.measured.get((name, adjoint), planned_evaluations(plan))
            fewer = use.evaluations - (max(least, extra) if alone.extrapolates else least)
            found.append(
                Option(
                    adjoint,
                    replace(
                        use,
                        kept=use.kept + more,
                        left=use.left - more,
                        seconds=use.seconds - fewer * use.once,
                    ),
                    plan.exact,
                )
            )
        return found

    def in_micro_batches(self, options: Mapping[str, list[Option]], count: int) -> dict[str, list[Option]]:
        """The options where the batch is split in `count`, one part after the other; gradients add up."""
        batch = self.images[0]
        small = max(batch // SLICED, 1)
        at_whole, at_small = self.pieces(HOLD), self.pieces(HOLD, small)
        share = -(-batch // count) / batch
        found = {}
        for name, own in options.items():
            # Of a piece's time, what does not shrink with the batch.
            ratio = small / batch
            start = max(at_small[name].seconds - ratio * at_whole[name].seconds, 0) / max(1 - ratio, 1e-9)
            gradients = self.trained[name]
            found[name] = [replace(option, use=_shrunk(option.use, share, gradients, count, start)) for option in own]
        return found

    def evaluations(self, name: str, adjoint: Adjoint) -> float:
        """Of Φ per step in the backward pass, as planned."""
        stage = self.model.stages[name]
        plan = adjoint.plan(stage.spec.depth, stage.spec.scheme)
        return 0.0 if plan is None else planned_evaluations(plan)


def _by_piece(fixed: Mapping[str, Adjoint], names: Sequence[str]) -> dict[str, Adjoint]:
    """The adjoints of parts, stages or 'stem', for each of the pieces called `names` that belongs to them."""
    found: dict[str, Adjoint] = {}
    for part, adjoint in fixed.items():
        own = {STEM: adjoint.stem} if part == STEM else {transition_of(part): adjoint.outside, part: adjoint}
        found |= {name: what for name, what in own.items() if name in names}
    return found


def stage_of(piece: str) -> str:
    """The stage that a piece belongs to, its steps or its transition."""
    return piece.removesuffix(transition_of(""))


def _bytes(use: PieceUse) -> dict[str, int]:
    return {field: getattr(use, field) for field in ("kept", "left", "forward", "backward")}


def _shrunk(use: PieceUse, share: float, gradients: int, count: int, start: float) -> PieceUse:
    """A piece's use with a share of the batch, all of the gradients, and `count` times the start of its operations."""
    return PieceUse(
        kept=round(use.kept * share),
        left=round((use.left - gradients) * share) + gradients,
        forward=round(use.forward * share),
        backward=round(max(use.backward - gradients, 0) * share) + gradients,
        seconds=use.seconds + (count - 1) * start,
        once=use.once,
        state=round(use.state * share),
    )


def _trained_bytes(model: OdeResNet, names: Sequence[str]) -> dict[str, int]:
    """Bytes of the gradients of each piece."""
    found = dict.fromkeys(names, 0)
    groups = model.parameter_groups()
    for key, parameter in model.net.named_parameters():
        group = groups[key] if groups[key] in found else REST
        found[group] += parameter.nbytes if parameter.requires_grad else 0
    return found
