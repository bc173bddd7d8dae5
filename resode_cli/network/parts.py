"""What an adapter returns: a source network, and which of its blocks are steps of which stage."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from ..errors import UsageError
from .premises import Premises

Branch = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class BlockSplit:
    """How to read a block: its branch g and what follows the addition (see residual.py).

    premises: what that rests on beside the block's tensors; None for a block that is called as it is.
    reason: why a block is called as it is, where that can be told.
    in_place: whether the block adds its input to the branch in the branch's own memory.
    """

    branch: Branch
    activation: str
    in_place: bool = False
    premises: Premises | None = field(default=None, compare=False, repr=False)
    reason: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class StageParts:
    """Consecutive children of one container: transition blocks, then residual steps.

    container: the container's path in the network, e.g. 'layer1'.
    transition, blocks: names of its children; one that is called several times in a row stands there as often.
    further: names of what the blocks take beside the state, the same for all of them.
    same: children that are a block which the container has under another name too, and the first of its names.
    """

    container: str
    transition: tuple[str, ...]
    blocks: tuple[str, ...]
    further: tuple[str, ...] = ()
    same: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Preprocessing:
    """From an image to the network's input. Mean and std per channel, of values in [0, 1]; size in pixels.

    size: the length of both sides, or (height, width) where they differ.
    mean, std: as many as the network takes channels: three for RGB, one for grey.
    crop_mode: how an image becomes square before the central crop: 'center' keeps its proportions and cuts the
        longer side, 'squash' does not keep them, 'border' pads the shorter side with the mean colour.
    """

    size: int | tuple[int, int] = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    crop_fraction: float = 0.875  # of the resized image's side
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if not isinstance(self.size, int):  # a list, out of a file; a square is written as one number
            height, width = self.size
            object.__setattr__(self, "size", height if height == width else (height, width))

    @property
    def height(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[0]

    @property
    def width(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[1]

    @property
    def channels(self) -> int:
        """How many channels the network's input has."""
        return len(self.mean)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.channels, self.height, self.width

    @property
    def size_text(self) -> str:
        """For people: '224×224', height by width."""
        return f"{self.height}×{self.width}"


SMALL = 64  # pixels; images of small networks are used whole, without the central crop of ImageNet's


@dataclass(frozen=True)
class PreprocessingChoice:
    """What the user says of the preprocessing; the source says the rest. See Preprocessing for the fields."""

    size: int | tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_fraction: float | None = None
    crop_mode: str | None = None

    def applied_to(self, own: Preprocessing) -> Preprocessing:
        """The source's preprocessing with what is chosen here.

        A size of up to 64 pixels brings a crop fraction of 1 with it, unless that is chosen too.
        Raises UsageError for a mean or standard deviation of another number of channels.
        """
        chosen = {name: value for name, value in vars(self).items() if value is not None}
        if self.size is not None and max(Preprocessing(self.size).shape[1:]) <= SMALL:
            chosen.setdefault("crop_fraction", 1.0)
        for name in ("mean", "std"):
            if name in chosen and len(chosen[name]) != own.channels:
                raise UsageError(
                    f"--{name} has {len(chosen[name])} numbers, but the network takes images of {own.channels} channels"
                )
        return replace(own, **chosen)


def parse_size(text: str, option: str = "--input-size") -> int | tuple[int, int]:
    """The pixels of '224', or the height and width of '256x128' or '256,128'. Raises UsageError for anything else."""
    sides = re.fullmatch(r"\s*(\d{1,9})\s*(?:[x×,]\s*(\d{1,9})\s*)?", text)
    height, width = (int(sides[1]), int(sides[2] or sides[1])) if sides else (0, 0)
    if min(height, width) < 1:
        raise UsageError(
            f"{option} {text}: must be 1 or more pixels, as one number, or as height and width: 256x128 or 256,128"
        )
    return height if height == width else (height, width)


USERS_OWN = ("file", "module")  # networks that code of the user's builds


@dataclass(frozen=True)
class SourceSpec:
    """Where a network came from: enough to build it again.

    library: one of `sources.libraries.MODULES`, or 'module' for a network made in Python.
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

    @property
    def is_packaged(self) -> bool:
        """Whether an installed package builds the network by its name alone: no code or folder of the user's."""
        return self.library not in USERS_OWN

    def __str__(self) -> str:
        return self.name if self.library in USERS_OWN else f"{self.library}:{self.name}"


@dataclass(frozen=True)
class Source:
    """A source network, ready to be converted. class_names: in the order of its outputs, where the source has them.

    multi_label: whether an image may have several of them.
    """

    spec: SourceSpec
    net: nn.Module
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()  # what the user should know, e.g. a re-initialised head
    fresh_head: tuple[str, ...] = ()  # names of the head's parameters, where it starts at random
    class_names: tuple[str, ...] | None = None
    multi_label: bool = False
