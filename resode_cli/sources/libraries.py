"""What a source library is: where networks of a name come from, such as timm."""

from __future__ import annotations

from collections.abc import Set
from importlib import import_module
from typing import Any, Literal, Protocol, cast

from torch import nn

from ..errors import ResodeError
from ..network.parts import Preprocessing

# The modules beside this one, by what stands before the colon of a SOURCE; FILE.py:FUNCTION is the last.
MODULES = {"timm": "timm_models", "torchvision": "torchvision_models", "cifar": "cifar", "file": "user_file"}


class Library(Protocol):
    """What such a module offers.

    ARGUMENTS: of `build`, beside `pretrained`, by which `convert` names them, such as 'num_classes' and 'stem'.
    WEIGHTS: 'fetched' where the library has pretrained weights, which `tag` and `pretrained_classes` describe; 'none'
        where they come from a file alone; 'own' where `build` may have loaded some.
    """

    ARGUMENTS: Set[str]
    WEIGHTS: Literal["fetched", "none", "own"]

    def build(self, name: str, *args: Any, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        """The network, with the library's weights where `pretrained`. Raises UsageError for a name it has not."""

    def preprocessing(self, name: str, net: nn.Module) -> Preprocessing:
        """How images are made the network's input."""

    def tag(self, name: str) -> str | None:
        """The pretrained weights that the name stands for."""

    def pretrained_classes(self, name: str) -> int:
        """How many classes their head tells apart."""


def library_of(name: str) -> Library:
    """A library by its name. One that is not used is not imported. Raises ResodeError for none that is known."""
    if name not in MODULES:
        raise ResodeError(f"the model file names the source library {name!r}, which this version does not know")
    return cast(Library, import_module(f".{MODULES[name]}", __package__))
