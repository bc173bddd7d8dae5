"""What a training run minimises: the distance from the labels, and from a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from ..errors import UsageError
from ..machine.processes import ALONE, Processes
from ..network.model import OdeResNet
from .balance import cross_entropy
from .settings import Settings
from .teacher import Teacher, distillation_loss


class Objective:
    """(1 − λ) L(z, labels) + λ D(z, z_teacher) + μ mean over stages of ‖x − t‖² / ‖t‖²

    L: the cross-entropy, or with `settings.bce_loss`, and of images with several labels always, the mean over the
    classes of each one's binary cross-entropy,
    with labels of which all classes have a share of `settings.label_smoothing` alike, and with the weights of the
    classes if there are any (see `balance`). λ, D: `settings.distill` and the distillation loss at
    `settings.temperature`; x, t: outputs of a stage of the model and of the teacher; μ: `settings.teacher_states`.
    Without a teacher, L.

    forward: what gives the logits; the model, or what exchanges its gradients with other processes.
    processes: of whose images ‖t‖² is, so that the mean of what all of them find is what one would find.

    Raises UsageError for μ > 0 with a teacher that has other stages.
    """

    def __init__(
        self,
        model: OdeResNet,
        teacher: Teacher | None,
        settings: Settings,
        class_weights: Tensor | None = None,
        *,
        processes: Processes = ALONE,
    ) -> None:
        self.class_weights, self.processes = class_weights, processes
        self.teacher, self.settings = teacher, settings
        self.forward: Callable[[Tensor], Tensor] = model
        self.several = model.info.multi_label
        of_one = settings.bce_loss and not self.several
        self.binary = BinaryCrossEntropy(smoothing=settings.label_smoothing) if of_one else None
        self.watched: dict[str, tuple[nn.Module, nn.Module]] = {}
        if teacher is not None and settings.teacher_states:
            theirs = teacher.net.stages if isinstance(teacher.net, OdeResNet) else {}
            if set(theirs) != set(model.stages):
                raise UsageError(
                    f"--teacher-states needs a teacher with the model's stages ({', '.join(model.stages)});"
                    f" {teacher.name} has {', '.join(theirs) or 'none that are known'}"
                )
            self.watched = {name: (stage, theirs[name]) for name, stage in model.stages.items()}

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the model's logits.

        labels: classes (B,), or smoothed probabilities of them (B, K); of several labels an image 0 and 1 (B, K).
        """
        if self.teacher is None:
            logits = self.forward(images)
            return self._from_labels(logits, labels), logits
        with self._outputs() as outputs:
            target = self.teacher.logits(images)
            logits = self.forward(images)
        weight = self.settings.distill
        loss = weight * distillation_loss(logits, target, self.settings.temperature, several=self.several)
        if weight < 1:
            loss = loss + (1 - weight) * self._from_labels(logits, labels)
        if outputs:
            apart = torch.stack([(x.float() - t.float()).square().sum() for t, x in outputs.values()])
            sizes = torch.stack([t.float().square().sum() for t, _ in outputs.values()])
            loss = loss + self.settings.teacher_states * (apart / self._of_all(sizes, len(images))).mean()
        return loss, logits

    def _of_all(self, sums: Tensor, images: int) -> Tensor:
        """So much of the sums over all processes' images as falls to this many."""
        if self.processes.alone:
            return sums
        count = sums.new_full((1,), images)
        self.processes.mean_of([sums, count])
        return sums * (images / count)

    def _from_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """L. Probabilities of classes are smoothed already."""
        if self.several:
            weights, targets = self.class_weights, labels.to(_exact(logits).dtype)
            weights = None if weights is None else weights.to(targets)
            return F.binary_cross_entropy_with_logits(_exact(logits), targets, pos_weight=weights)
        if self.binary is not None:
            loss: Tensor = self.binary(_exact(logits), labels)
            return loss
        smoothing = self.settings.label_smoothing if labels.ndim == 1 else 0.0
        return cross_entropy(_exact(logits), labels, self.class_weights, smoothing=smoothing)

    @contextmanager
    def _outputs(self) -> Iterator[dict[str, list[Tensor]]]:
        """Each watched stage's outputs, the teacher's first."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.watched}
        hooks = [
            module.register_forward_hook(lambda module, given, out, name=name: found[name].append(out))
            for name, pair in self.watched.items()
            for module in pair
        ]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


def _exact(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()
