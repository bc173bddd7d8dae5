"""Measuring a stage's gradients on its own: from its true input, with the true adjoint of its output.

One exact pass through the network says what a stage receives from both sides; after that, each adjoint
costs a pass through its stage alone. The exact pass is itself held against plain backprop, on a few images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ResodeError
from ..network.labels_loss import labels_loss
from ..network.model import OdeResNet, transition_of
from ..network.outside import STEM
from ..network.stage import OdeStage
from ..ode import Adjoint, RandomState, fixed_buffers
from ..simulation.step import piece_names

# A power of two changes no relative error, and keeps small adjoints from vanishing in fp16.
LOSS_SCALE = 1024.0
# Images on which the exact pass is held against plain backprop, and the least relative difference that is more than
# rounding; sums over the steps that share a block are rounded otherwise in the two.
COMPARED = 2
DIFFERS = 0.01


@dataclass
class Passage:
    """A stage's input in the reference pass, the adjoint of its output, and the gradient of its input."""

    x: Tensor
    random: RandomState
    adjoint: Tensor | None = None
    input_gradient: Tensor | None = None


class Probe:
    """A batch in a network: what its exact pass gives every stage, and what other adjoints make of it.

    stages: those that gradients pass through, by name.
    The model is in the mode that it trains in. Buffers and generators are left as they were.
    """

    def __init__(self, model: OdeResNet, images: Tensor, labels: Tensor, autocast: Callable[[], Any]) -> None:
        self.model, self.images, self.labels, self.autocast = model, images, labels, autocast
        self.stages = {name: stage for name, stage in model.stages.items() if stage.spec.depth}
        for stage in self.stages.values():
            stage.use_adjoint(reference_adjoint(stage))
        model.use_adjoint({STEM: Adjoint("checkpoint")})
        self.wanted = self._wanted()
        self.passages, self.exact = self._exact_pass()

    def _exact_pass(self) -> tuple[dict[str, Passage], dict[str, tuple[Tensor, ...]]]:
        """Exact gradients of the whole network, and every stage's passage."""
        passages: dict[str, Passage] = {}
        hooks = []
        for name, stage in self.stages.items():

            def before(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                passage = passages[name] = Passage(args[0].detach(), self._random(module))
                if args[0].requires_grad:
                    leaf: Tensor = args[0]
                    leaf.register_hook(  # type: ignore[no-untyped-call]
                        lambda gradient: setattr(passage, "input_gradient", gradient.detach())
                    )

            def after(_: nn.Module, __: tuple[Any, ...], out: Tensor, name: str = name) -> None:
                if out.requires_grad:
                    out.register_hook(  # type: ignore[no-untyped-call]
                        lambda adjoint: setattr(passages[name], "adjoint", adjoint.detach())
                    )

            hooks += [stage.register_forward_pre_hook(before), stage.register_forward_hook(after)]
        try:
            loss = self._loss()
            gradients = self._gradients(loss)
        finally:
            for hook in hooks:
                hook.remove()
        # No gradient passes through a stage in front of everything that is trained.
        self.stages = {name: stage for name, stage in self.stages.items() if passages[name].adjoint is not None}
        kept = {STEM, *self.stages, *(transition_of(name) for name in self.stages)}
        self.wanted = {name: own for name, own in self.wanted.items() if name in kept}
        self._check_reference()
        return passages, gradients

    def _wanted(self) -> dict[str, tuple[nn.Parameter, ...]]:
        """The trained parameters of every piece that a plan has something to say of, in the order of the pieces."""
        groups = self.model.parameter_groups()
        found: dict[str, dict[int, nn.Parameter]] = {name: {} for name in piece_names(self.model)}
        for key, p in self.model.net.named_parameters():
            if p.requires_grad and groups[key] in found:
                found[groups[key]][id(p)] = p
        own = {name: tuple(parameters.values()) for name, parameters in found.items()}
        return {name: parameters for name, parameters in own.items() if parameters or name in self.stages}

    def _check_reference(self) -> None:
        """Raises ResodeError if exact methods do not give backprop's gradients: each evaluates its blocks again."""
        count = min(COMPARED, len(self.images))
        found = self._gradients(self._loss(count))
        adjoints = self.model.adjoints
        try:
            self.model.use_adjoint(Adjoint("backprop"))
            truth = self._gradients(self._loss(count))
        finally:
            self.model.use_adjoint(adjoints)
        for name, stage in self.stages.items():
            if not truth[name]:  # nothing in it is trained; gradients pass through it
                continue
            error = relative_error(truth[name], found[name])
            roundoff = max(torch.finfo(g.dtype).eps for g in truth[name])
            if not all(bool(g.isfinite().all()) for g in truth[name]):
                continue  # backprop itself overflows in this precision, for the training loop's guard to say
            if not error <= max(DIFFERS, math.sqrt(roundoff)):
                raise ResodeError(
                    f"stage {name}: gradients by {stage.adjoint.label}, which are exact for a block that does the same"
                    f" whenever it is evaluated, are off by {error:.2g} from plain backprop's; use --adjoint backprop"
                )

    def _random(self, module: nn.Module) -> RandomState:
        return RandomState.everywhere(self.images.device, module.modules())

    def _loss(self, count: int | None = None) -> Tensor:
        """Of the batch or its first images; random layers draw alike every time."""
        current = self._random(self.model)
        torch.manual_seed(0)
        try:
            with fixed_buffers([self.model]), self.autocast():
                logits = self.model(self.images[:count])
            return labels_loss(logits.float(), self.labels[:count]) * LOSS_SCALE
        finally:
            current.restore()

    def _gradients(self, loss: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """Gradients of each piece: stages' steps, transitions and the stem; so the whole network is passed."""
        wanted = self.wanted
        flat = [p for parameters in wanted.values() for p in parameters]
        first = next(p for p in self.model.parameters() if p.requires_grad)
        found = iter(torch.autograd.grad(loss, [*flat, first], allow_unused=True))
        return {name: tuple(_or_zero(next(found), p) for p in parameters) for name, parameters in wanted.items()}

    def together(self) -> dict[str, float]:
        """Each piece's gradient error in the whole network, under the present adjoints; in the order of the pieces."""
        gradients = self._gradients(self._loss())
        return {name: relative_error(self.exact[name], gradients[name]) for name in self.wanted}

    def alone(self, name: str) -> float:
        """A stage's gradient error under its present adjoint: the largest of its steps', transition's and input's."""
        stage, passage = self.stages[name], self.passages[name]
        steps, transition = self.wanted[name], self.wanted.get(transition_of(name), ())
        parameters = [*steps, *transition]
        leaf = passage.x.clone().requires_grad_()
        current = self._random(stage)
        passage.random.restore()
        try:
            with fixed_buffers([stage]), self.autocast():
                out = stage(leaf, **stage.further)
        finally:
            current.restore()
        *found, input_gradient = torch.autograd.grad(out, [*parameters, leaf], passage.adjoint, allow_unused=True)
        gradients = [_or_zero(g, p) for g, p in zip(found, parameters, strict=True)]
        errors = [relative_error(self.exact[name], gradients[: len(steps)])]
        if transition:
            errors.append(relative_error(self.exact[transition_of(name)], gradients[len(steps) :]))
        if passage.input_gradient is not None:
            errors.append(relative_error([passage.input_gradient], [_or_zero(input_gradient, leaf)]))
        return max(error if math.isfinite(error) else math.inf for error in errors)


def reference_adjoint(stage: OdeStage) -> Adjoint:
    """Exact gradients at the memory of about 2 √N states."""
    return Adjoint("checkpoint", max(math.isqrt(stage.spec.depth), 1))


def relative_error(exact: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """‖g − ĝ‖ / ‖g‖ of several tensors taken as one vector."""
    pairs = [(a.double(), b.double()) for a, b in zip(exact, found, strict=True)]
    error = math.fsum((a - b).square().sum().item() for a, b in pairs)
    norm = math.fsum(a.square().sum().item() for a, _ in pairs)
    return math.sqrt(error / norm) if norm > 0 else (0.0 if error == 0 else math.inf)


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient.detach()
