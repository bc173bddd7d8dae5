"""Data sets with a name: the embedded digits, and torchvision's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load as load_safetensors
from torchvision import datasets

from ..errors import ResodeError
from .splits import Split

N_TRAIN_DIGITS = 1437
DIGITS = "digits"
PREFIX = "torchvision:"

# torchvision data sets by the name a user types: the class, and its arguments for a split.
_TORCHVISION: dict[str, tuple[str, Callable[[str], dict[str, Any]]]] = {
    "cifar10": ("CIFAR10", lambda split: {"train": split == "train"}),
    "cifar100": ("CIFAR100", lambda split: {"train": split == "train"}),
    "mnist": ("MNIST", lambda split: {"train": split == "train"}),
    "fashionmnist": ("FashionMNIST", lambda split: {"train": split == "train"}),
    "svhn": ("SVHN", lambda split: {"split": split}),
    "stl10": ("STL10", lambda split: {"split": split}),
    "food101": ("Food101", lambda split: {"split": split}),
    "flowers102": ("Flowers102", lambda split: {"split": split}),
    "oxfordiiitpet": ("OxfordIIITPet", lambda split: {"split": "trainval" if split == "train" else "test"}),
    "imagenette": ("Imagenette", lambda split: {"split": "train" if split == "train" else "val"}),
}
NAMES = (DIGITS, *_TORCHVISION)
WITH_VAL = {"flowers102"}
# A mirrored or strongly cropped digit is another symbol, or none.
NOT_FLIPPED = {"digits", "mnist", "svhn"}


def open_named(name: str, split: Split, root: Path) -> tuple[Any, list[str]]:
    """Images and labels of a data set of `NAMES`, and the names of its classes."""
    if split == "val" and name not in WITH_VAL:
        raise ResodeError(f"{name} has no val split, only train and test; --val-split 0.2 holds a share of train out")
    if name == DIGITS:
        return _Digits(split), [str(d) for d in range(10)]
    return _torchvision(name, split, root.expanduser())


def labels_of(samples: Any) -> list[int]:
    """The label of every image, without reading one where the data set has a list of them."""
    for name in ("targets", "labels", "_labels"):
        if (found := getattr(samples, name, None)) is not None:
            return [int(label) for label in found]
    for name in ("samples", "_samples"):
        if (pairs := getattr(samples, name, None)) is not None:
            return [int(label) for _, label in pairs]
    return [int(samples[i][1]) for i in range(len(samples))]


class Part:
    """Some of a data set's (image, label) pairs."""

    def __init__(self, samples: Any, places: Sequence[int]) -> None:
        self.whole, self.places = samples, places
        labels = labels_of(samples)
        self.targets = [labels[place] for place in places]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> Any:
        return self.whole[self.places[i]]


class _Digits:
    """The embedded digits as (PIL image, label)."""

    def __init__(self, split: Split) -> None:
        content = resources.files("resode_cli.data.digits").joinpath("digits.safetensors").read_bytes()
        tensors = load_safetensors(content)
        part = slice(0, N_TRAIN_DIGITS) if split == "train" else slice(N_TRAIN_DIGITS, None)
        self.images, self.labels = tensors["images"][part], tensors["labels"][part]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        pixels = (self.images[i].float() * (255 / 16)).round().to(torch.uint8)
        return Image.fromarray(pixels.numpy()), int(self.labels[i])


def _torchvision(name: str, split: Split, root: Path) -> tuple[Any, list[str]]:
    class_name, arguments = _TORCHVISION[name]
    dataset = getattr(datasets, class_name)
    try:
        with redirect_stdout(sys.stderr):
            samples = dataset(str(root), download=True, **arguments(split))
    except (RuntimeError, OSError) as error:
        raise ResodeError(
            f"{name} is not in {root} and cannot be downloaded ({str(error).splitlines()[0]});"
            " connect to the network or pass a folder of images"
        ) from error
    classes = getattr(samples, "classes", None)
    if classes is None:  # data sets that number their classes
        classes = [str(k) for k in sorted({int(label) for label in getattr(samples, "labels", range(10))})]
    return samples, [c if isinstance(c, str) else ", ".join(c) for c in classes]
