"""One step of a training run: the gradient on a batch, taken again where it is known to be wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..data import Batch
from ..errors import ResodeError
from ..machine.processes import ALONE, lost_means_ended
from ..network.model import OdeResNet
from ..ode import RandomState, fixed_buffers
from ..surgery.batch_norm import batch_norms
from . import run_log
from .averaging import Average
from .bf16_weights import raised
from .guard import Figures, Guard, together
from .loop import Loop, refuse_empty
from .mixing import mixing_of
from .objective import Objective
from .parallel import Joint, joined
from .results import Progress
from .settings import Settings
from .starting import prepare_to_train
from .unfreezing import Unfreezing, are

MOST_SKIPPED = 10  # steps in a row


@dataclass(frozen=True)
class Taken:
    """A step: its images, their loss and accuracy, the gradient's largest entry, and the monitor's figures.

    accuracy: fraction of images, or where these have several labels of all labels, that are right.
    steepest: 0 with fp16, whose gradients are scaled and may overflow; the scaler looks after them.
    """

    images: int
    loss: float
    accuracy: float
    steepest: float
    monitor: run_log.Figures


class Steps:
    """Takes the steps of a run. advice: what to say behind what went wrong."""

    def __init__(
        self,
        model: OdeResNet,
        settings: Settings,
        device: torch.device,
        progress: Progress,
        *,
        loop: Loop,
        guard: Guard,
        objective: Objective,
        average: Average | None,
        say: Callable[[str], None],
        advice: Callable[[], str],
        joint: Joint | None = None,
        unfreezing: Unfreezing | None = None,
    ) -> None:
        self.joint = joint or Joint(model, ALONE)
        self.processes = self.joint.processes
        self.model, self.settings, self.device, self.progress = model, settings, device, progress
        self.loop, self.guard, self.objective, self.average = loop, guard, objective, average
        self.say, self.advice, self.unfreezing = say, advice, unfreezing
        self.mixing = mixing_of(settings, model.info.num_classes)
        self.several = model.info.multi_label
        self.in_a_row = 0  # steps skipped just now
        self.modes: list[tuple[nn.Module, bool]] = []  # in which modules train, once they have

    def _train_mode(self) -> None:
        """Put every module in the mode that it trains in, where one has left it: a look is cheaper than to set them."""
        if not self.modes or any(module.training is not mode for module, mode in self.modes):
            prepare_to_train(self.model, self.settings)
            self.modes = [(module, module.training) for module in self.model.modules()]

    def _unfreeze(self) -> None:
        """Train what is trained from this step on."""
        if self.unfreezing is not None and (new := self.unfreezing.at(self.progress.step)):
            self.modes = []
            self.joint.renew()
            self.say(f"step {self.progress.step}: {are(new)} trained from here on")

    def take(self, batch: Batch) -> Taken:
        """Take a step on a batch, or leave it out where its gradient is no number."""
        refuse_empty(batch)
        self._unfreeze()
        self._train_mode()
        self.joint.seed(self.settings.seed, self.progress.step)
        # Each part of an accumulated batch comes to the device by itself.
        images, labels = batch.on(self.device) if self.settings.accumulate == 1 else (batch.images, batch.labels)
        if self.mixing is not None:
            images, labels = self.mixing(images, labels, step=self.progress.step)
        random = RandomState.now(self.device)
        whole = batch.whole or len(labels)
        found = self._forward_backward(images, labels, whole)
        while self._must_redo(found, images, labels):
            # The gradient is thrown away and taken again: same random numbers, and running
            # statistics that have moved once already.
            random.restore()
            self.loop.optimizer.zero_grad(set_to_none=True)
            with fixed_buffers([self.model]):
                found = self._forward_backward(images, labels, whole)
        if self.settings.bn == "batch" and not self.processes.alone:
            self.processes.mean_of(self._moving())
        if not math.isfinite(found.loss + found.steepest):
            self._skip(found)
            nothing: run_log.Figures = {name: dict.fromkeys(stages) for name, stages in found.monitor.items()}
            return replace(found, monitor=nothing)
        self.in_a_row = 0
        if not self.loop.update():
            self.say(
                f"step {self.progress.step + 1}: a gradient overflowed in fp16, so the step was skipped and the loss"
                f" scale lowered to {self.loop.scaler.get_scale():g}"
            )
        if self.average is not None:
            with raised(self.loop.optimizer):
                self.average.update(self.progress.step + 1)
        return found

    def _must_redo(self, found: Taken, images: Tensor, labels: Tensor) -> bool:
        first = slice(self.settings.images_per_batch)
        return self.guard.must_redo(
            found.monitor["drift"],
            images[first],
            labels[first] if self.several else classes_of(labels[first]),
            self.progress.step + 1,
        )

    def _skip(self, found: Taken) -> None:
        """Leave the weights as they are. Raises ResodeError where that is not wanted, or has been done too often."""
        step, loss = self.progress.step + 1, found.loss
        what = f"a gradient is {found.steepest} (loss {loss:.4g})" if math.isfinite(loss) else f"the loss is {loss}"
        self.in_a_row += 1
        if self.settings.on_nonfinite == "stop" or self.in_a_row > MOST_SKIPPED:
            again = "" if self.in_a_row <= MOST_SKIPPED else f", as in the {MOST_SKIPPED} before"
            raise self.processes.alike(
                ResodeError(f"{what} at step {step}{again}{self.advice()}, or --on-nonfinite skip")
            )
        self.progress.skipped += 1
        self.say(f"step {step} is skipped: {what}")

    def _moving(self) -> list[Tensor]:
        """The running statistics that a step has moved. One that is shared, once."""
        norms = [norm for norm in batch_norms(self.model) if norm.training]
        tensors = [t for norm in norms for t in (norm.running_mean, norm.running_var) if t is not None]
        return list({id(tensor): tensor for tensor in tensors}.values())

    def _forward_backward(self, images: Tensor, labels: Tensor, whole: int) -> Taken:
        """What a step's images give; and .grad set. Where they are split, the gradients of the parts add up.

        whole: images of the step, of which other processes may have some.
        """
        parts = []
        batches = _cuts(len(labels), self.settings.batches_of(len(labels)))
        with lost_means_ended():
            for batch in batches:
                x, y = images[batch].to(self.device), labels[batch].to(self.device)
                cuts = _cuts(len(y), self.guard.state.micro_batches)
                for cut in cuts:
                    with self.joint.part(last=batch is batches[-1] and cut is cuts[-1]):
                        parts.append(self._part(x[cut], y[cut], len(y[cut]) / whole))
        self.joint.check()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        look = gradients and not self.loop.scaler.is_enabled()
        steepest = torch.nn.utils.get_total_norm(gradients, math.inf) if look else parts[0][0].new_zeros(())
        # One transfer per step: the loss, the accuracy, the gradient's size and every stage's figures together.
        loss = torch.stack([loss for loss, _, _ in parts]).sum()
        right = torch.stack([right for _, right, _ in parts]).sum()
        figures = together([figures for _, _, figures in parts])
        known = (value for stages in figures.values() for value in stages.values() if value is not None)
        own = torch.stack([tensor.float() for tensor in (loss, right, steepest, *known)]).tolist()
        self.guard.check()
        total, accuracy, largest, *others = joined(self.processes.gathered(own), sums=2)
        values = iter(others)
        monitor = {
            figure: {name: None if value is None else next(values) for name, value in stages.items()}
            for figure, stages in figures.items()
        }
        return Taken(whole, total, accuracy, largest, monitor)

    def _part(self, images: Tensor, labels: Tensor, share: float) -> tuple[Tensor, Tensor, Figures]:
        """The share of a batch's loss and accuracy that some of its images have, and the monitor's figures."""
        with self.loop.autocast():
            loss, logits = self.objective(images, labels)
        weight = share * self.processes.count
        self.loop.backward(loss if weight == 1 else loss * weight)
        given = (logits > 0) == labels.bool() if self.several else logits.argmax(1) == classes_of(labels)
        right = given.float().mean()
        return loss.detach() * share, right * share, self.guard.figures()


def _cuts(images: int, parts: int) -> list[slice]:
    """The images in so many parts, all of one size but the last, or in as many as there are images."""
    count = -(-images // parts)
    return [slice(a, a + count) for a in range(0, images, count)]


def classes_of(labels: Tensor) -> Tensor:
    """The classes (B,) of labels; of probabilities (B, K) the most probable."""
    return labels if labels.ndim == 1 else labels.argmax(1)
