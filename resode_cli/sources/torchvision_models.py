"""Networks of torchvision: `torchvision:NAME` or `torchvision:NAME.TAG`."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision import models

from ..errors import UsageError, unknown
from ..network.parts import Preprocessing
from .stems import three_by_three

ARGUMENTS = frozenset({"num_classes", "stem"})
WEIGHTS = "fetched"
CLASSES = 1000  # ImageNet's, for every classification network of torchvision


def check_name(name: str) -> None:
    """Raises UsageError, with the nearest matches, for a name that torchvision does not have."""
    architecture, _, tag = name.partition(".")
    classification = models.list_models(module=models)
    if architecture not in classification:
        raise unknown("torchvision model", name, classification)
    tags = [weights.name for weights in models.get_model_weights(architecture)]
    if tag and tag not in tags:
        raise unknown(f"pretrained tag of {architecture}", tag, tags)


def _weights(name: str) -> Any:
    architecture, _, tag = name.partition(".")
    choices = models.get_model_weights(architecture)
    return choices[tag] if tag else choices.DEFAULT


def build(name: str, *, pretrained: bool = False, num_classes: int | None = None, stem: str | None = None) -> nn.Module:
    """The network, with the tag's weights where `pretrained`."""
    check_name(name)
    architecture = name.partition(".")[0]
    if pretrained:
        net = models.get_model(architecture, weights=_weights(name))
        if num_classes is not None and num_classes != CLASSES:
            _replace_head(net, num_classes)
    else:
        arguments: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
        net = models.get_model(architecture, weights=None, **arguments)
    if stem == "cifar":
        if not isinstance(net, models.ResNet):
            raise UsageError(f"--stem cifar is for torchvision's ResNet, not {type(net).__name__}")
        net.conv1 = three_by_three(net.conv1)
        net.maxpool = nn.Identity()
    return net


def _replace_head(net: nn.Module, num_classes: int) -> None:
    """Put a random layer for other classes in the place of the last linear one."""
    linear = [(path, module) for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1][1].out_features != CLASSES:
        raise UsageError(f"--num-classes needs a linear layer at the end, which {type(net).__name__} has not")
    path, layer = linear[-1]
    parent, _, name = path.rpartition(".")
    setattr(net.get_submodule(parent), name, nn.Linear(layer.in_features, num_classes, bias=layer.bias is not None))


def pretrained_classes(name: str) -> int:
    """How many classes the pretrained head tells apart."""
    return CLASSES


def tag(name: str) -> str:
    """The pretrained tag that the name stands for."""
    return _weights(name).name


def preprocessing(name: str, net: nn.Module) -> Preprocessing:
    """The preset of the name's pretrained weights."""
    preset = _weights(name).transforms()
    (size,), (resize,) = preset.crop_size, preset.resize_size
    return Preprocessing(
        size=size,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
        crop_fraction=size / resize,
    )
