"""From the name of data and a split to its images, preprocessed for a model, whose classes are the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UsageError, unknown
from ..network.model import ModelInfo
from ..network.parts import Preprocessing
from .classes import assumed_note, check_classes, order_note, places, without_images
from .folders import SPLIT_FOLDERS, Found, Split, has_splits, held_out_of, open_folder, open_unlabelled
from .images import shown
from .loading import ImageData
from .named import DIGITS, NAMES, NOT_FLIPPED, PREFIX, WITH_VAL, open_named
from .transforms import Augmentation, transform

DEFAULT_ROOT = Path("~/.cache/resode")


def open_data(
    name: str,
    preprocessing: Preprocessing,
    split: Split,
    *,
    augment: bool | Augmentation = False,
    seed: int = 0,
    images: int | None = None,
    skip_corrupt: bool = False,
    root: Path = DEFAULT_ROOT,
    labelled: bool = True,
    class_names: Sequence[str] | None = None,
) -> ImageData:
    """One split of `name`: 'digits', a torchvision data set, or a folder of train, val and test folders.

    split: 'test' is `val` where there is no labelled test split, and a note says so.
    images: take this many, evenly spaced through the split, so that sorted classes are all seen.
    labelled: False takes any folder of images, however they are sorted into it; all labels are then 0.
    class_names: the model's classes, which labels are places in. Without them: the data's own, sorted, as numbers
        where every name is one.
    root: where torchvision data sets are downloaded to.
    Raises UsageError for a name or folder that does not exist, ResodeError for one without the split.
    """
    if split not in SPLIT_FOLDERS:
        raise unknown("split", split, SPLIT_FOLDERS)
    if images is not None and images < 1:
        raise UsageError(f"--images {images}: must be 1 or more")
    found = _find(name, split, root, labelled=labelled, all_splits=class_names is None)
    classes = found.classes if class_names is None else class_names
    labels = places(found.names, classes, found.where)
    missing = without_images(classes, {labels[place] for place in found.present}, found.split, found.where)
    count = len(found.samples)
    indices = None
    if images is not None:
        n = min(images, count)
        indices = [i * count // n for i in range(n)]
    return ImageData(
        name,
        found.samples,
        classes,
        transform=transform(preprocessing, augment=augment, flip=name.removeprefix(PREFIX) not in NOT_FLIPPED),
        indices=indices,
        seed=seed if augment else None,
        skip_corrupt=skip_corrupt,
        labels=labels,
        split=found.split,
        partial=found.partial,
        notes=[*found.notes, missing] if missing is not None else found.notes,
    )


def open_labelled(name: str, info: ModelInfo, split: Split, **arguments: Any) -> ImageData:
    """A split whose labels are a model's classes; arguments are those of `open_data`.

    Raises ResodeError for data with other classes than the model's.
    """
    return as_labelled(
        open_data(name, info.preprocessing, split, class_names=info.class_names, **arguments), name, info
    )


def as_labelled(data: ImageData, name: str, info: ModelInfo) -> ImageData:
    """The same data, once its classes are known to be the model's. Raises ResodeError where they are not."""
    check_classes(data, info.num_classes, info.class_names)
    if info.class_names is None and _folder_of(name)[0] is not None and order_note(data.class_names) is None:
        data.notes = (*data.notes, assumed_note(data.class_names))
    return data


def held_out_splits(name: str) -> tuple[Split, ...]:
    """The splits to measure a training run on: the one that chooses among its models, then any for the end alone."""
    folder, _ = _folder_of(name)
    if folder is not None:
        return held_out_of(folder)
    return ("val", "test") if name.removeprefix(PREFIX) in WITH_VAL else ("test",)


def _find(name: str, split: Split, root: Path, *, labelled: bool, all_splits: bool) -> Found:
    folder, notes = _folder_of(name)
    if folder is None:
        samples, names = open_named(name.removeprefix(PREFIX), split, root)
        found = Found(split, name, samples, names, names, frozenset(range(len(names))))
    elif labelled:
        found = open_folder(folder, split, all_splits=all_splits)
    else:
        found = open_unlabelled(folder, split)
    return replace(found, notes=(*notes, *found.notes))


def _folder_of(name: str) -> tuple[Path | None, list[str]]:
    """The folder that a name means, None for a data set with a name, and what to say of it. Raises UsageError."""
    if not name:
        raise UsageError("the name of the data is empty; pass a folder, or 'digits', or a name such as cifar10")
    path = Path(name)
    if name in NAMES:
        if not path.is_dir():
            return None, []
        if not has_splits(path):
            return None, [f"data: the data set {name}; the folder {name} here holds no folder train or test"]
        other = "the embedded images" if name == DIGITS else f"torchvision's, which is {PREFIX}{name}"
        return path, [f"data: the folder {name} here, not {other}"]
    if name.startswith(PREFIX):
        if name.removeprefix(PREFIX) not in NAMES[1:]:
            raise unknown("data set of torchvision", name.removeprefix(PREFIX), NAMES[1:])
        return None, []
    if path.is_dir():
        return path, []
    if path.is_file():
        raise UsageError(f"data {shown(name)!r} is a file; unpack it if it is an archive, and pass the folder")
    if "/" in name or path.suffix or path.exists():
        raise UsageError(f"data folder {name!r} does not exist, or is not a folder")
    raise unknown("data set (and there is no such folder)", name, NAMES)
