"""What a fit lowers: the distance of a network's states, or of its logits, to its teacher's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..data import Batch
from ..errors import ResodeError
from ..network.labels_loss import same_labels
from ..network.model import OdeResNet
from ..surgery.batch_norm import batch_norms
from ..training.teacher import Teacher, distillation_loss
from .penalties import penalty
from .results import HeldOutErrors
from .settings import END_TO_END, TO_STATES, FitSettings
from .states import StateLosses, check_states, recorded

Found = tuple[float, dict[str, list[float]]]  # a loss, and √e_k by stage where states are matched


class Objective:
    """The loss of each phase, on batches, and its figures on held-out images.

    Raises UsageError for a teacher that does not match where states are to be.
    """

    def __init__(self, model: OdeResNet, teacher: Teacher, settings: FitSettings, device: torch.device) -> None:
        self.teacher, self.settings, self.device = teacher, settings, device
        self.several = model.info.multi_label  # labels of an image
        needed = set(TO_STATES) & set(settings.phases) or settings.states or settings.contract
        self.source = check_states(model, teacher) if needed else None

    def train_mode(self, model: OdeResNet) -> None:
        """Dropout stays off: what is fitted is the function that is used."""
        model.eval()
        if self.settings.bn == "batch":
            for norm in batch_norms(model):
                norm.train()

    def backward(self, model: OdeResNet, phase: str, images: Tensor, generator: torch.Generator) -> Found:
        """Gradients of a phase's loss on a batch; the loss. generator: of what a penalty draws."""
        settings = self.settings
        targets, logits = self.targets(images)
        terms: list[Tensor] = []
        errors: dict[str, list[float]] = {}
        loss = 0.0
        if phase in TO_STATES or settings.states:
            cut = phase if phase in TO_STATES else ""
            losses = StateLosses(model, targets, cut=cut, backward=True)
            with losses.watching():
                out = model(images)
            errors = losses.errors
            if losses.total is not None:  # nothing was cut off
                count = sum(len(stage) for stage in errors.values())
                terms.append(losses.total * (settings.states / count))
            mean = [e**2 for stage in errors.values() for e in stage]
            loss += sum(mean) / len(mean) * (1.0 if cut else settings.states)
        else:
            out = model(images)
        if phase in END_TO_END:
            terms.append(self.logits_loss(out, logits))
            loss += terms[-1].item()
        penalised = self._penalty(model, targets, generator)
        if penalised is not None:
            terms.append(penalised)
            loss += penalised.item()
        if terms:
            torch.autograd.backward(torch.stack(terms).sum())
        return loss, errors

    def score(self, phase: str, figures: HeldOutErrors) -> float:
        """What a phase lowers. NaN, which is not below anything, where it diverged."""
        state = figures.state_error
        fitted = state if phase in TO_STATES else figures.logits + self.settings.states * state
        return fitted + figures.penalty

    def check(self, model: OdeResNet, held_out: Iterable[Batch]) -> HeldOutErrors:
        """The figures on held-out images."""
        model.eval()
        images = agreed = 0
        off = penalties = 0.0
        squares: dict[str, Tensor] = {}
        for batch in held_out:
            if not len(batch.labels):
                continue
            x = batch.images.to(self.device)
            with torch.no_grad():
                targets, logits = self.targets(x)
                losses = StateLosses(model, targets, cut="", backward=False)
                with losses.watching():
                    out = model(x)
            # The same draws every time, so that figures can be compared.
            found = self._penalty(model, targets, torch.Generator().manual_seed(self.settings.seed))
            n = len(x)
            penalties += n * (found.item() if found is not None else 0.0)
            off += n * self.logits_loss(out, logits).item()
            agreed += int(same_labels(out, logits, several=self.several).sum())
            for name, errors in losses.losses.items():
                squares[name] = squares.get(name, torch.zeros(())) + n * torch.stack(errors).cpu()
            images += n
        if not images:
            raise ResodeError("no image could be read")
        states = {name: (total / images).sqrt().tolist() for name, total in squares.items()}
        return HeldOutErrors(off / images, agreed / images, states, penalties / images)

    def targets(self, images: Tensor) -> tuple[dict[str, list[Tensor]], Tensor]:
        """The teacher's states, where they are known, and its logits."""
        if self.source is None:
            return {}, self.teacher.logits(images)
        with recorded(self.source) as states:
            logits = self.teacher.logits(images)
        return states, logits

    def logits_loss(self, out: Tensor, logits: Tensor) -> Tensor:
        """The loss of logits against the teacher's."""
        if self.settings.temperature is None:
            return logits_error(out, logits, several=self.several)
        return distillation_loss(out, logits, self.settings.temperature, several=self.several)

    def _penalty(
        self, model: OdeResNet, states: Mapping[str, list[Tensor]], generator: torch.Generator
    ) -> Tensor | None:
        settings = self.settings
        return penalty(model, states, smooth=settings.smooth, contract=settings.contract, generator=generator)


def logits_error(student: Tensor, teacher: Tensor, *, several: bool) -> Tensor:
    """‖z − z_t‖² / ‖z_t‖² over a batch, of logits (B, K) less their mean over classes, which no softmax sees.

    To a constant factor the distillation loss for τ → ∞ (Hinton et al. 2015, section 2.1). several: an image may have
    any number of labels, and no mean is left out.
    """
    z, target = student.float(), teacher.float()
    if not several and target.shape[1] > 1:
        z, target = z - z.mean(1, keepdim=True), target - target.mean(1, keepdim=True)
    return (z - target).square().sum() / target.square().sum().clamp_min(1e-12)
