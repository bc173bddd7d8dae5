"""The network that another one is fitted to or distilled from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ResodeError, UsageError, first_few
from ..files import model_file
from ..network.model import OdeResNet, non_finite
from ..network.parts import Preprocessing, PreprocessingChoice
from ..network.residual import ACTIVATIONS
from ..sources.registry import open_source, parse_source
from ..surgery.depth_weights import TIED

# What a command that leaves the weights as the source's own is called in a model's history.
KEEPS_WEIGHTS = {"convert", "deepen", "untie"}


@dataclass(frozen=True)
class Teacher:
    """Gives logits (B, K) for images that were preprocessed for the student.

    name: for people. mean, std: the student's and the teacher's own, where they differ.
    """

    net: nn.Module
    name: str
    student: Preprocessing
    own: Preprocessing

    def logits(self, images: Tensor) -> Tensor:
        """In eval mode, without a tape."""
        if (self.student.mean, self.student.std) != (self.own.mean, self.own.std):
            images = (images * _channels(self.student.std, images) + _channels(self.student.mean, images)).sub_(
                _channels(self.own.mean, images)
            ) / _channels(self.own.std, images)
        with torch.no_grad():
            logits: Tensor = self.net(images)
        return logits.float()

    @property
    def bytes(self) -> int:
        """Of its weights and buffers."""
        return sum(t.nbytes for t in (*self.net.parameters(), *self.net.buffers()))

    def to(self, device: torch.device) -> Teacher:
        self.net.to(device)
        return self


def _channels(values: Sequence[float], images: Tensor) -> Tensor:
    return images.new_tensor(values).view(1, -1, 1, 1)


def own_teacher(model: OdeResNet, path: str) -> Teacher:
    """A model as it stands; in exact form where its weights are still those of the network it was converted from.

    The `pre` form of such weights is another, worse function; what it stands for is the source.
    """
    net, name = copy.deepcopy(model), path
    commands = {str(entry["command"]) for entry in model.info.history}
    if commands <= KEEPS_WEIGHTS and not any(_changes_weights(entry) for entry in model.info.history):
        for stage in net.stages.values():
            if stage.spec.form == "pre" and stage.activation in ACTIVATIONS:
                stage.use_form("exact")
                name = f"{path} in exact form, as {model.info.source} has it"
    return _frozen(net, name, model.info.preprocessing, model.info.preprocessing)


def _changes_weights(entry: dict[str, object]) -> bool:
    return (
        entry.get("fit") is not None
        or entry.get("mode") == "interpolate"
        or entry.get("horizon") is not None
        or entry.get("depth_weights") in ("linear", *TIED)
    )


def open_teacher(given: str, model: OdeResNet, *, trust_source: bool = False) -> Teacher:
    """A model file, or a source as `convert` takes it, with its pretrained weights.

    trust_source: run the file of the user's own that a model file names.

    Raises UsageError if its classes are not the model's.
    """
    pre = model.info.preprocessing
    if given.endswith(".safetensors"):
        loaded = model_file.load(given, trust_source=trust_source)
        _check_channels(given, loaded.info.preprocessing, pre)
        teacher, classes = _frozen(loaded, given, pre, loaded.info.preprocessing), loaded.info.num_classes
        several = loaded.info.multi_label
    else:
        if parse_source(given)[0] in ("cifar", "file"):
            raise UsageError(f"teacher {given} brings no weights; convert it with --weights and give the model file")
        source = open_source(given, pretrained=True, preprocessing=PreprocessingChoice(size=pre.size))
        _check_channels(given, source.preprocessing, pre)
        teacher = _frozen(source.net, given, pre, source.preprocessing)
        with torch.no_grad():
            out = teacher.logits(torch.zeros(1, *pre.shape))
        if out.ndim != 2:
            raise ResodeError(f"teacher {given} returns {tuple(out.shape)} where logits (images, classes) are needed")
        classes, several = out.shape[1], False
    if bad := non_finite(teacher.net.state_dict()):
        raise ResodeError(f"teacher {given} holds NaN or infinity in {first_few(bad)}: nothing can be learned from it")
    if several != model.info.multi_label:
        kinds = ("one class", "any number of labels")
        raise UsageError(f"teacher {given} gives an image {kinds[several]}, the model {kinds[not several]}")
    if classes != model.info.num_classes:
        raise UsageError(f"teacher {given} tells {classes} classes apart, the model {model.info.num_classes}")
    return teacher


def _check_channels(given: str, teacher: Preprocessing, student: Preprocessing) -> None:
    if teacher.channels != student.channels:
        raise UsageError(
            f"teacher {given} takes images of {teacher.channels} channels, the model of {student.channels}"
        )


def _frozen(net: nn.Module, name: str, student: Preprocessing, own: Preprocessing) -> Teacher:
    net.eval()  # its own `train` may return nothing
    return Teacher(net.requires_grad_(False), name, student, own)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float, *, several: bool) -> Tensor:
    """τ² KL(softmax(z_teacher / τ) ‖ softmax(z_student / τ)), averaged over images (Hinton et al. 2015, section 2).

    The factor keeps the size of the gradient whatever the temperature τ. Both (B, K). several: an image may have any
    number of labels; then each class has a divergence of its own, between the sigmoids of z / τ, and their mean counts:
    a softmax would not see logits that all move alike, by which labels come and go.
    """
    if several:
        # A sigmoid is the softmax of z and 0.
        both = (torch.stack([z.float(), torch.zeros_like(z.float())]) for z in (teacher, student))
        p, q = (F.log_softmax(z / temperature, 0) for z in both)
        return F.kl_div(q, p, reduction="sum", log_target=True) / q[0].numel() * temperature**2
    p = F.log_softmax(teacher.float() / temperature, 1)
    q = F.log_softmax(student.float() / temperature, 1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2
