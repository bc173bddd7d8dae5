"""The adjoints of a training run, and the watch over them: no step is taken on a gradient known to be wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ResodeError
from ..gradients.choose import choose_adjoints
from ..gradients.results import ChosenAdjoints, OverBudgetError
from ..machine.memory import free_bytes, give_back_freed_memory
from ..machine.processes import ALONE, Processes
from ..network.mixing import check_apart
from ..network.model import OdeResNet
from ..ode import Adjoint
from ..simulation.step import RESERVE, CannotSimulate
from .choices import LEAN
from .optimization import optimizer_slots
from .settings import Settings
from .synced_norm import apart

Value = TypeVar("Value")

# After a choice asked for by the monitor: a stage that drifts again within so many steps gets exact anchors.
PATIENCE = 20
# Drift varies from batch to batch: so many times the one found then is tolerated, whatever error was measured then.
CHANCE = 1.5
# Of the free memory, what a stage that moves to anchors may take: other stages may follow.
SHARE = 0.5
FIGURES = ("drift", "correction", "contraction")
Figures = dict[str, dict[str, Tensor | None]]  # by figure and stage


@dataclass
class GuardState:
    """What a resumed run needs: the stages' adjoints, the drift allowed to each, and what happened to them."""

    adjoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    allowed: dict[str, float] = field(default_factory=dict)
    calibrated_at: dict[str, int] = field(default_factory=dict)
    moved_to_anchors: list[str] = field(default_factory=list)
    recalibrations: int = 0
    warned: list[str] = field(default_factory=list)
    micro_batches: int = 1


def together(parts: Sequence[Figures]) -> Figures:
    """The largest of each figure over the parts of a batch."""
    if len(parts) == 1:
        return parts[0]
    found: Figures = {figure: {} for figure in FIGURES}
    for figure in FIGURES:
        for name in parts[0][figure]:
            values = [value for part in parts if (value := part[figure][name]) is not None]
            found[figure][name] = torch.stack(values).max() if values else None
    return found


class Guard:
    """Sets the adjoints of a run, chosen on a batch if the settings say so, and acts on the monitor.

    batch: gives a batch to choose on. prepare: puts the model in the mode that it trains in. beside: bytes of a
    teacher and of an average of the weights, which a budget has to hold too. all_trained: inside it, what is trained
    later is trained too. of_free: the share of the free memory that is a budget where there is none.
    """

    def __init__(
        self,
        model: OdeResNet,
        settings: Settings,
        device: torch.device,
        *,
        autocast: Callable[[], AbstractContextManager[Any]],
        prepare: Callable[[], None],
        on_message: Callable[[str], None],
        on_choice: Callable[[ChosenAdjoints], None],
        state: GuardState | None,
        beside: int = 0,
        processes: Processes = ALONE,
        all_trained: Callable[[], AbstractContextManager[None]] = nullcontext,
        of_free: float = 1.0,
    ) -> None:
        self.processes = processes
        self.model, self.settings, self.device = model, settings, device
        self.of_free = of_free
        self.autocast, self.prepare = autocast, prepare
        self.on_message, self.on_choice = on_message, on_choice
        self.asked = settings.adjoint_choice().with_names(model)
        self.beside, self.all_trained = beside, all_trained
        self.told: set[str] = set()  # parts whose activations are kept
        self.state = state or GuardState()
        self.stage_names = [name for name, stage in model.stages.items() if stage.spec.depth]

    def start(self, batch: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Set every stage's adjoint: as it was, as given, or chosen on a batch; by one process for all."""
        self._together(lambda: self._start(batch))

    def _together(self, decide: Callable[[], Value]) -> Value:
        """What the first process decides about the adjoints, which all of them follow."""
        self.least_free = self.processes.least(free_bytes(self.device))

        def decided() -> tuple[Value, dict[str, Any]]:
            with apart():
                return decide(), asdict(self.state)

        value, state = self.processes.decided(decided)
        if not self.processes.leads:
            self.state = GuardState(**state)
            self.model.use_adjoint({name: Adjoint(**values) for name, values in self.state.adjoints.items()})
        return value

    def _start(self, batch: Callable[[], tuple[Tensor, Tensor]]) -> None:
        if not self.state.adjoints and self.settings.micro_batches > 1:
            self._check_apart(batch)
            self.state.micro_batches = self.settings.micro_batches
        if self.state.adjoints:
            self.model.use_adjoint({name: Adjoint(**values) for name, values in self.state.adjoints.items()})
            return
        self.model.use_adjoint(self.asked.fixed(self.model))
        if self.asked.chooses:
            self._choose(*batch(), step=0)
        else:
            self._remember()

    def _check_apart(self, batch: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Raises ResodeError for micro-batches of a network that mixes the images of a batch."""
        self.prepare()
        with self.autocast():
            check_apart("the network", self.model.net, self.model, batch()[0], into="micro-batches")

    def figures(self) -> Figures:
        """What the monitors tell of the last pass, on the device, by figure and stage; None where that is nothing."""
        monitors = {name: self.model.stages[name].monitor for name in self.stage_names}
        return {figure: {name: getattr(m, figure) for name, m in monitors.items()} for figure in FIGURES}

    def check(self) -> None:
        """Raises ResodeError where a block, evaluated again, was not what it was in the forward pass.

        Says once which parts keep their activations although their adjoint says otherwise.
        """
        for monitor in self.model.monitors:
            monitor.check()
        for part, why in self.model.kept_parts.items():
            if part not in self.told:
                self.told.add(part)
                self.on_message(f"note: {part} keeps its activations, since it cannot be evaluated again: {why}")

    def must_redo(self, drift: Mapping[str, float | None], images: Tensor, labels: Tensor, step: int) -> bool:
        """Act on drift past what is allowed; whether the adjoints have changed, so that the step must be redone.

        Raises ResodeError where the run is to stop.
        """
        drifted = {n: value for n, value in drift.items() if value is not None and not value <= self._allowed(n)}
        return bool(drifted) and self._together(lambda: self._act(drifted, images, labels, step))

    def _act(self, drifted: Mapping[str, float], images: Tensor, labels: Tensor, step: int) -> bool:
        what = {
            name: f"step {step}: the reconstructed states of stage {name} are off by {value:.2g} of their size"
            f" (allowed {self._allowed(name):.2g})"
            for name, value in drifted.items()
        }
        finite = all(map(math.isfinite, drifted.values()))
        if self.settings.on_drift == "stop" or (self.settings.on_drift == "warn" and not finite):
            raise ResodeError(
                f"{next(iter(what.values()))}, so the gradient is not backprop's; stopped"
                " (--on-drift anchors would go on with an exact one)"
            )
        if self.settings.on_drift == "warn":
            for name in drifted:
                if name not in self.state.warned:
                    self.state.warned.append(name)
                    self.on_message(
                        f"{what[name]}, so its gradient is not backprop's; --on-drift anchors would mend it"
                    )
            return False
        chosen = [name for name in drifted if self.asked.of(name).fixed is None]
        again = [name for name in chosen if step - self.state.calibrated_at.get(name, -PATIENCE) < PATIENCE]
        if again or not finite:
            chosen = []
        for name in drifted:
            if name not in chosen:
                self._anchor(name, what[name])
        if chosen:
            found = "; ".join(what[name] for name in chosen)
            self.on_message(f"{found}; calibrating again, and the step is taken again")
            self.state.recalibrations += 1
            self._choose(images, labels, step=step)
        return True

    def _allowed(self, name: str) -> float:
        return min(self.state.allowed.get(name, math.inf), self.settings.drift_tolerance)

    def _anchor(self, name: str, what: str) -> None:
        """Move a stage to exact checkpoints: every state if they fit, else as many snapshots as do."""
        stage = self.model.stages[name]
        available = self.least_free
        if (budget := self.settings.budget_bytes) is not None:
            available = min(available, budget)
        fit = int(SHARE * available / max(stage.monitor.state_bytes, 1))
        adjoint = Adjoint("checkpoint", snapshots=None if fit >= stage.spec.depth else max(fit, 2))
        stage.use_adjoint(adjoint)
        self.state.moved_to_anchors.append(name)
        self._remember()
        self.on_message(f"{what}; stage {name} is moved to anchors ({adjoint.label}) and the step taken again")

    def _choose(self, images: Tensor, labels: Tensor, *, step: int) -> None:
        """Choose what is to be chosen; what has an adjoint of its own, or was moved to anchors from that, keeps it."""
        with self.all_trained():
            self._choose_for_all(images, labels, step=step)
        self.prepare()  # which is for what is trained now

    def _choose_for_all(self, images: Tensor, labels: Tensor, *, step: int) -> None:
        self.prepare()
        adjoints = self.model.adjoints
        fixed = {part: adjoints[part] for part in self.asked.fixed(self.model)}
        settings, given = self.settings, self.settings.micro_batches
        images, labels = images.to(self.device), labels.to(self.device)
        part = -(-settings.images_per_batch // given)
        whole = settings.budget_bytes or self._free()
        budget = whole - self.beside
        if given * settings.batches_per_step > 1:  # the gradients of the parts before, and the images of the others
            gradients = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
            budget -= round((1 + RESERVE) * gradients)
            waiting = settings.step_images if self.device.type == "cpu" else settings.images_per_batch
            budget -= images[0].nbytes * (waiting - part)
        if settings.budget_bytes is not None and self.device.type == "cpu":
            give_back_freed_memory()
        try:
            chosen = self._chosen_on(images, labels, part, max(budget, 1), fixed)
        except OverBudgetError as error:
            raise OverBudgetError(error.needed + whole - budget, whole, error.advice) from None
        except CannotSimulate as reason:
            if settings.budget_bytes is not None or self._methods is not None:
                raise ResodeError(f"{reason}; leave out the budget, or give --adjoint checkpoint") from reason
            self.on_message(f"note: {reason}; so 'auto' evaluates every part again (checkpoint), which is exact")
            self.state.micro_batches = given
            self.model.use_adjoint({**dict.fromkeys(adjoints, Adjoint("checkpoint")), **fixed})
            self._remember()
            return
        self.model.use_adjoint(fixed)  # of a stage without steps, the plan knows but the transition
        self.on_choice(chosen)
        self.state.micro_batches = given * chosen.micro_batches
        self.state.allowed = {}
        for choice in chosen.stages:
            if choice.own_drift is not None and choice.error is not None:
                room = max(self.settings.grad_tol / max(choice.error, 1e-12), CHANCE)
                self.state.allowed[choice.piece] = room * choice.own_drift
            self.state.calibrated_at[choice.piece] = step
        self._remember()

    @property
    def _methods(self) -> tuple[str, ...] | None:
        """Those to choose from for the steps; None for all."""
        return None if self.asked.to_choose is None else self.asked.to_choose.methods

    def _chosen_on(
        self, images: Tensor, labels: Tensor, part: int, budget: int, fixed: Mapping[str, Adjoint]
    ) -> ChosenAdjoints:
        settings = self.settings
        return choose_adjoints(
            self.model,
            images,
            labels,
            tolerance=settings.grad_tol,
            budget=None if settings.memory_budget == LEAN else budget,
            batch_size=part,
            optimizer_slots=optimizer_slots(settings),
            methods=self._methods,
            fixed=fixed,
            amp=settings.precision,
            micro_batches=settings.micro_batches == 1 and not settings.teacher_states,
            autocast=self.autocast,
        )

    def _free(self) -> int:
        """What the device has free, counting the weights, which are there already."""
        weights = sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))
        return int(self.of_free * (self.least_free + weights))

    def _remember(self) -> None:
        self.state.adjoints = {name: asdict(adjoint) for name, adjoint in self.model.adjoints.items()}
