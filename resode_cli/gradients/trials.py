"""What adjoints do to the gradients of a network's stages, each measured when it is first asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..network.outside import STEM
from ..ode import SCHEMES, Adjoint
from ..ode.codec import WIDTHS
from ..simulation.step import predicted
from .menu import AGAIN, Menu
from .probe import Probe, reference_adjoint

FIRST_WIDTH = 4  # bits, of the codes that are tried first
FEWEST = 2  # images to calibrate on


@dataclass
class Tried:
    """One adjoint on one stage alone."""

    error: float
    evaluations: float
    drift: float | None
    contraction: float | None


class Trials:
    """Adjoints on the stages of a network, on a real batch: of it as many images as the budget allows.

    shares: of the tolerance, each stage's own.
    """

    def __init__(
        self,
        menu: Menu,
        images: Tensor,
        labels: Tensor,
        *,
        budget: float,
        share: float,
        autocast: Callable[[], Any],
        on_stage: Callable[[str, str], None],
    ) -> None:
        self.menu, self.model, self.images, self.labels = menu, menu.model, images, labels
        self.budget, self.autocast, self.on_stage = budget, autocast, on_stage
        self.probe: Probe | None = None
        self.tried: dict[str, dict[Adjoint, Tried]] = {name: {} for name in self.model.stages}
        self.shares = dict.fromkeys(self.model.stages, share)
        self.widths: dict[str, Sequence[int]] = {}

    @property
    def count(self) -> int:
        """Images that were calibrated on: none where nothing had to be measured."""
        return 0 if self.probe is None else len(self.probe.images)

    @property
    def affordable(self) -> bool:
        """Whether gradients of a few images can be compared within the budget: three of each are held at a time."""
        return self._bytes(min(FEWEST, len(self.images))) + 2 * sum(self.menu.trained.values()) <= self.budget

    @property
    def stages(self) -> list[str]:
        """Those that gradients pass through."""
        return list(self.opened().stages)

    def opened(self) -> Probe:
        """The network's exact pass."""
        if self.probe is None:
            self.on_stage("all stages", "exact")
            count = len(self.images)
            while count > FEWEST and self._bytes(count) > self.budget:
                count = max(count // 2, FEWEST)
            self.probe = Probe(self.model, self.images[:count], self.labels[:count], self.autocast)
        return self.probe

    def _bytes(self, count: int) -> float:
        """Bytes of an exact pass on some images, and of the three states of each stage that it leaves."""
        adjoints = {name: reference_adjoint(stage) for name, stage in self.model.stages.items()}
        use = self.menu.simulation.step({**adjoints, STEM: AGAIN}, (count, *self.menu.images[1:]), amp=self.menu.amp)
        return predicted(use) + 3 * sum(piece.state for piece in use.pieces.values())

    def on(self, name: str, adjoint: Adjoint) -> Tried:
        """An adjoint on a stage and its transition alone."""
        probe = self.opened()
        if name not in probe.stages:  # no gradient passes it
            return Tried(0.0, 0.0, None, None)
        alone = replace(adjoint, slices=1)
        if alone not in self.tried[name]:
            self.on_stage(name, alone.label)
            stage = self.model.stages[name]
            stage.use_adjoint(alone)
            error = probe.alone(name)
            monitor = stage.monitor
            evaluations = monitor.evaluations / SCHEMES[stage.spec.scheme].evaluations / stage.spec.depth
            self.menu.measured[name, alone] = evaluations
            self.tried[name][alone] = Tried(
                error,
                evaluations,
                None if monitor.drift is None else monitor.drift.item(),
                None if monitor.contraction is None else monitor.contraction.item(),
            )
        return self.tried[name][alone]

    def knows(self, name: str, adjoint: Adjoint) -> bool:
        """Whether an adjoint was tried already, or cannot be."""
        return replace(adjoint, slices=1) in self.tried[name] or name not in self.opened().stages

    def may_do(self, name: str, adjoint: Adjoint) -> bool:
        """Whether an inexact adjoint has not been found, and is not expected, to be too far off."""
        if adjoint.bits is not None:
            return True  # widths are tried by themselves
        if adjoint in self.tried[name]:
            return self.tried[name][adjoint].error <= self.shares[name]
        return self._promising(name, adjoint)

    def _promising(self, name: str, adjoint: Adjoint) -> bool:
        """Whether trying an adjoint is worth a pass, going by what was tried of its kind.

        The error falls with the distance between anchors like a power, at most the second; which one,
        the last two tries tell.
        """
        depth, distance, share = self.model.stages[name].spec.depth, adjoint.anchors, self.shares[name]
        points = sorted(
            ((other.anchors or depth) / depth, tried.error)
            for other, tried in self.tried[name].items()
            if other.method == adjoint.method and replace(other, anchors=distance) == adjoint
        )
        points = [(spacing, error) for spacing, error in points if math.isfinite(error) and error > 0]
        if not points or distance is None:
            return True
        (spacing, error), power = points[0], 2.0
        if len(points) > 1 and points[1][1] > error:
            power = min(2.0, math.log(points[1][1] / error) / math.log(points[1][0] / spacing))
        return error * (distance / depth / spacing) ** power <= 1.5 * share

    def calibrate_widths(self) -> None:
        """For each stage the fewest bits whose error is within its share; none where no width does."""
        for name in self.opened().stages:
            if name not in self.widths:
                self.widths[name] = self._fewest_bits(name)

    def _fewest_bits(self, name: str) -> list[int]:
        share, width, found = self.shares[name], FIRST_WIDTH, None
        seen: set[int] = set()
        while width in WIDTHS and width not in seen:
            seen.add(width)
            error = self.on(name, replace(AGAIN, bits=width)).error
            if not math.isfinite(error):
                break
            # A bit more halves it.
            if error <= share:
                found = width if found is None else min(found, width)
                width -= max(math.floor(math.log2(share / max(error, 1e-9))), 0)
            elif found is None:
                width += max(math.ceil(math.log2(error / share)), 1)
        return [] if found is None else [found]

    def together(self, adjoints: Mapping[str, Adjoint]) -> dict[str, float]:
        """Each stage's error in the whole network by these adjoints, which are set.

        What was not to be chosen runs exactly, so that what was is not blamed for its error.
        """
        probe = self.opened()
        self.on_stage("all stages", "together")
        self.model.use_adjoint({name: replace(adjoint, slices=1) for name, adjoint in adjoints.items()})
        stages = self.model.stages
        exact = {name: reference_adjoint(stages[name]) if name in stages else AGAIN for name in self.menu.fixed}
        self.model.use_adjoint(exact)
        return probe.together()
