"""Match the states of a deepened network to those of the network it came from, block by block or stage by stage.

t_k: the teacher's state after k of its D steps, k = 0 … D. The student's step b_k = ⌈k N / D⌉ ends the run of
steps that stands for the teacher's step k, and its state there should be t_k. In `pre` form only a(state) is
read downstream, so a(x_{b_k}) is compared with a(t_k); what is negative in the state is free.

    e_k = ‖a(x_{b_k}) − a(t_k)‖² / ‖a(t_k)‖²
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import UsageError
from ..network.model import OdeResNet
from ..network.residual import ACTIVATIONS
from ..network.stage import OdeStage, Tap
from ..training.teacher import Teacher

States = dict[str, list[Tensor]]


def run_ends(depth: int, runs: int) -> tuple[int, ...]:
    """b_0 = 0 … b_D = N: where the runs of N steps end that stand for D steps."""
    return tuple(-(-k * depth // runs) for k in range(runs + 1))


def check_states(student: OdeResNet, teacher: Teacher) -> OdeResNet:
    """The teacher, as a network whose states can be matched.

    Raises UsageError if its stages are not the student's, or have more steps.
    """
    net = teacher.net
    if not isinstance(net, OdeResNet):
        raise UsageError(
            f"the states of teacher {teacher.name} are not known: convert it first,"
            " or fit to its logits (--fit-phases logits)"
        )
    theirs = {name: stage.spec.depth for name, stage in net.stages.items()}
    if beyond := [name for name in theirs if name not in student.stages]:
        raise UsageError(
            f"teacher {teacher.name} has stages beyond the model's ({', '.join(beyond)}): fit to its logits, not to its"
            " states (--fit-phases logits)"
        )
    for name, stage in student.stages.items():
        if (theirs.get(name, 0) > 0) != (stage.spec.depth > 0):
            raise UsageError(f"teacher {teacher.name} has other stages than the model ({', '.join(theirs)})")
        if theirs.get(name, 0) > stage.spec.depth:
            raise UsageError(
                f"stage {name} has {stage.spec.depth} steps, teacher {teacher.name} {theirs[name]}: fit to its logits,"
                " not to its states"
            )
    return net


@contextmanager
def recorded(net: OdeResNet) -> Iterator[States]:
    """Every state of every stage, as the network runs inside the block: x_0 … x_N after the activation, by stage."""
    states: States = {}

    def tap(name: str, stage: OdeStage) -> Tap:
        def see(n: int, x: Tensor) -> Tensor:
            if n == 0:
                states[name] = []
            states[name].append(as_read(stage, x).detach())
            return x

        return Tap(tuple(range(stage.spec.depth + 1)), see)

    with _taps(net, {name: tap(name, stage) for name, stage in net.stages.items() if stage.spec.depth}):
        yield states


def as_read(stage: OdeStage, x: Tensor) -> Tensor:
    """What of a state the network reads: a(x) in `pre` form, else x."""
    if stage.spec.form == "pre" and stage.activation in ACTIVATIONS:
        return ACTIVATIONS[stage.activation](x)
    return x


class StateLosses:
    """The student's e_k on a batch, for use as a context while it runs.

    cut: 'blocks' stops gradients at the end of every run, 'stages' at the end of every stage, '' nowhere.
    backward: take gradients of what is cut off at once, so that its graph is let go of.

    After the run, `errors` has √e_k by stage, and `total` the sum of the e_k whose gradient is still to be taken.
    """

    def __init__(self, model: OdeResNet, targets: Mapping[str, list[Tensor]], *, cut: str, backward: bool) -> None:
        self.model, self.targets, self.cut, self.backward = model, targets, cut, backward
        self.total: Tensor | None = None
        self.losses: dict[str, list[Tensor]] = {}

    @property
    def errors(self) -> dict[str, list[float]]:
        return {name: torch.stack(found).sqrt().tolist() for name, found in self.losses.items()}

    @contextmanager
    def watching(self) -> Iterator[StateLosses]:
        self.total = None
        self.losses = {name: [] for name in self.targets}
        with _taps(self.model, {name: self._tap(name) for name in self.targets}):
            yield self

    def _tap(self, name: str) -> Tap:
        stage, targets = self.model.stages[name], self.targets[name]
        ends = run_ends(stage.spec.depth, len(targets) - 1)
        places = {n: k for k, n in enumerate(ends)}

        def see(n: int, x: Tensor) -> Tensor:
            target = targets[places[n]]
            if target.shape != x.shape:
                raise UsageError(f"stage {name}: the teacher's states are {_size(target)}, the model's {_size(x)}")
            loss = (as_read(stage, x) - target).square().sum() / target.square().sum().clamp_min(1e-12)
            self.losses[name].append(loss.detach())
            if loss.requires_grad:
                self.total = loss if self.total is None else self.total + loss
            if self.cut == "blocks" or (self.cut == "stages" and n == ends[-1]):
                if self.backward and self.total is not None:
                    torch.autograd.backward(self.total)
                    self.total = None
                return x.detach()
            return x

        return Tap(ends, see)


def _size(x: Tensor) -> str:
    return "×".join(str(n) for n in x.shape[1:])


@contextmanager
def _taps(model: OdeResNet, taps: Mapping[str, Tap]) -> Iterator[None]:
    stages = {name: model.stages[name] for name in taps}
    try:
        for name, stage in stages.items():
            stage.tap = taps[name]
        yield
    finally:
        for stage in stages.values():
            stage.tap = None
