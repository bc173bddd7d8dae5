"""What an adapter returns: a source network, and which of its blocks are steps of which stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from .premises import Premises

Branch = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class BlockRule:
    """How to read a block: its branch g and what follows the addition (see residual.py).

    premises: what that rests on beside the block's tensors; None for a block that is called as it is.
    """

    branch: Branch
    activation: str
    premises: Premises | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class StageParts:
    """Consecutive children of one container: transition blocks, then residual steps.

    container: the container's path in the network, e.g. 'layer1'.
    transition, blocks: names of its children.
    further: names of what the blocks take beside the state, the same for all of them.
    """

    container: str
    transition: tuple[str, ...]
    blocks: tuple[str, ...]
    further: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preprocessing:
    """From an image to the network's input. Mean and std per channel, of RGB in [0, 1]; size in pixels.

    crop_mode: how an image becomes square before the central crop: 'center' keeps its proportions and cuts the
        longer side, 'squash' does not keep them, 'border' pads the shorter side with the mean colour.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    crop_fraction: float = 0.875  # of the resized image's side
    crop_mode: str = "center"


@dataclass(frozen=True)
class SourceSpec:
    """Where a network came from: enough to build it again.

    library: 'timm', 'torchvision', 'cifar', 'file' or 'module'.
    name: architecture, 'FILE.py:FUNCTION', or the class of a module.
    tag: pretrained tag, if the library's own weights were loaded.
    arguments: what the builder was called with.
    weights: the file, repository or folder that they came from, if one was given.
    weights_sha256: of the loaded state dict.
    """

    library: str
    name: str
    tag: str | None = None
    arguments: dict[str, object] = field(default_factory=dict)
    weights: str | None = None
    weights_sha256: str | None = None

    def __str__(self) -> str:
        return self.name if self.library in ("file", "module") else f"{self.library}:{self.name}"


@dataclass(frozen=True)
class Source:
    """A source network, ready to be converted."""

    spec: SourceSpec
    net: nn.Module
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()  # what the user should know, e.g. a re-initialised head
