"""From the name of data and a split to its images, preprocessed for a model, whose classes are the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UsageError, unknown
from ..network.model import ModelInfo
from ..network.parts import Preprocessing
from .class_map import ClassMap, known_names
from .classes import NEW_HEAD, OtherClasses, assumed_note, check_classes, order_note, places, spelled, without_images
from .folders import Found, has_splits, open_folder, open_unlabelled, splits_of_folder
from .holding_out import HoldOut, known_division, part_of
from .hub import HUB, is_hub, open_hub, splits_of_hub
from .images import shown
from .loading import ImageData
from .named import DIGITS, NAMES, NOT_FLIPPED, PREFIX, WITH_VAL, Part, labels_of, open_named
from .shards import SHARDS, is_shards, open_shards, splits_of_shards
from .splits import SPLIT_FOLDERS, Split
from .tables import TABLES, is_table, open_table, splits_of_table
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
    val_split: float | None = None,
    split_seed: int | None = None,
    known: Mapping[str, Any] | None = None,
    class_map: ClassMap | None = None,
    renamed: Mapping[str, str] | None = None,
    multi_label: bool | None = None,
) -> ImageData:
    """One split of `name`: 'digits', a torchvision data set, a folder of class folders or of splits, or a CSV table.

    split: 'test' is `val` where there is no labelled test split, and a note says so.
    val_split, split_seed: the share of each class that is held out as val, where the data have no val of their own,
        and which one. known: the record of a division that stands where these say nothing (see `HoldOut`).
    images: take this many, evenly spaced through the split, so that sorted classes are all seen.
    labelled: False takes any folder of images, however they are sorted into it; all labels are then 0.
    class_names: the model's classes, which labels are places in. Without them: the data's own, sorted, as numbers
        where every name is one.
    class_map: other names for the data's classes.
    renamed: those that stand without a map, where the data's own are not the model's (see `ImageData`).
    multi_label: whether images have several labels (of a table alone), or one class each; None: as the data have it.
    root: where torchvision data sets are downloaded to.
    Raises UsageError for a name or folder that does not exist, ResodeError for one without the split.
    """
    if split not in SPLIT_FOLDERS:
        raise unknown("split", split, SPLIT_FOLDERS)
    if images is not None and images < 1:
        raise UsageError(f"--images {images}: must be 1 or more")
    hold_out = HoldOut(val_split, split_seed, known)
    all_splits = class_names is None
    several = multi_label if labelled else None
    found = _find(
        name,
        split,
        root,
        labelled,
        all_splits=all_splits,
        hold_out=hold_out,
        skip_missing=skip_corrupt,
        several=several,
    )
    called: dict[str, str] = {}
    if class_map is not None:
        called = dict(zip(found.classes, class_map.applied_to(found.classes), strict=True))
    elif renamed and class_names is not None and not set(map(spelled, found.names)) <= set(map(spelled, class_names)):
        called = {name: renamed.get(spelled(name), name) for name in found.classes}
        called = called if len({*called.values()}) == len(called) else {}  # two of one name cannot be told apart
    found = _renamed(found, called)
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
        transform=transform(preprocessing, augment=augment, flip=_known_as(name) not in NOT_FLIPPED),
        indices=indices,
        seed=seed if augment else None,
        skip_corrupt=skip_corrupt,
        labels=labels,
        sets=None if found.sets is None else [[labels[place] for place in own] for own in found.sets],
        split=found.split,
        partial=found.partial,
        notes=[*found.notes, missing] if missing is not None else found.notes,
        division=found.division,
        renamed={spelled(own): name for own, name in called.items() if spelled(own) != name},
    )


def open_labelled(name: str, info: ModelInfo, split: Split, **arguments: Any) -> ImageData:
    """A split whose labels are a model's classes; arguments are those of `open_data`.

    What was held out when the model was trained is held out here, and what classes were called then they are called
    here, where no argument says otherwise.
    Raises ResodeError for data with other classes than the model's.
    """
    known: dict[str, Any] = {"known": known_division(info.history), "renamed": known_names(info.history)}
    known["multi_label"] = info.multi_label
    arguments = {**known, **arguments}
    data = open_data(name, info.preprocessing, split, class_names=info.class_names, **arguments)
    return as_labelled(data, name, info)


def as_labelled(data: ImageData, name: str, info: ModelInfo) -> ImageData:
    """The same data, once its classes are known to be the model's. Raises ResodeError where they are not."""
    check_classes(data, info.num_classes, info.class_names)
    if info.class_names is None and _folder_of(name)[0] is not None and order_note(data.class_names) is None:
        data.notes = (*data.notes, assumed_note(data.class_names))
    return data


def check_data_name(name: str) -> None:
    """Raises UsageError for a name that means no data; whether they can be read is seen when they are opened."""
    _folder_of(name)


def held_out_splits(name: str, hold_out: HoldOut = HoldOut()) -> tuple[Split, ...]:  # noqa: B008  it is frozen
    """The splits to measure a training run on: the one that chooses among its models, then any for the end alone.

    'test' alone stands for `val` too, where that is not there or has no labels.
    """
    both: tuple[Split, ...] = ("val", "test")
    return both if {*both} <= {*labelled_splits(name, hold_out)} else ("test",)


def labelled_splits(name: str, hold_out: HoldOut = HoldOut()) -> tuple[Split, ...]:  # noqa: B008  it is frozen
    """Every split of the data that has labels, in the order train, val, test; those that are held out with them."""
    folder, _ = _folder_of(name)
    found: set[Split]
    if is_shards(name):
        found = splits_of_shards(name, hold_out)
    elif folder is not None:
        found = splits_of_table(folder, hold_out) if is_table(folder) else splits_of_folder(folder, hold_out)
    elif is_hub(name):
        found = splits_of_hub(name, hold_out)
    else:
        has_val = name.removeprefix(PREFIX) in WITH_VAL or hold_out.of("train") is not None
        found = {"train", "val", "test"} if has_val else {"train", "test"}
    return tuple(split for split in SPLIT_FOLDERS if split in found)


def _find(
    name: str,
    split: Split,
    root: Path,
    labelled: bool,
    *,
    all_splits: bool,
    hold_out: HoldOut,
    skip_missing: bool,
    several: bool | None,
) -> Found:
    folder, notes = _folder_of(name)
    if several and (folder is None or not is_table(folder)):
        raise OtherClasses(
            f"the model gives an image any number of labels, and in {shown(name)} each has one class; pass a table with"
            f" columns of paths and labels, or {NEW_HEAD}"
        )
    if is_hub(name):
        found = open_hub(name, split, labelled=labelled, hold_out=hold_out)
    elif is_shards(name):
        found = open_shards(name, split, labelled=labelled, hold_out=hold_out)
    elif folder is None:
        found = _open_named(name.removeprefix(PREFIX), split, root, hold_out)
    elif is_table(folder):
        found = open_table(
            folder,
            split,
            labelled=labelled,
            all_splits=all_splits,
            hold_out=hold_out,
            skip_missing=skip_missing,
            several=several,
        )
    elif labelled:
        found = open_folder(folder, split, all_splits=all_splits, hold_out=hold_out)
    else:
        found = open_unlabelled(folder, split, hold_out)
    return replace(found, notes=(*notes, *found.notes))


def _renamed(found: Found, called: Mapping[str, str]) -> Found:
    """With other names for its classes, in the order that they had."""
    if not called:
        return found
    names, classes, partial = ([called[name] for name in old] for old in (found.names, found.classes, found.partial))
    return replace(found, names=names, classes=classes, partial=partial)


def _open_named(name: str, split: Split, root: Path, hold_out: HoldOut) -> Found:
    division = None
    if name in WITH_VAL:
        hold_out.refuse(name, "val")
    else:
        division = hold_out.of("train")
    if division is None or split == "test":
        samples, names = open_named(name, split, root)
        return Found(split, name, samples, names, names, frozenset(range(len(names))))
    samples, names = open_named(name, "train", root)
    labels = labels_of(samples)
    places, notes = part_of(division, split, f"{name}, train", [str(i) for i in range(len(labels))], labels, names)
    return Found(
        split,
        f"the {split} part of {name}",
        Part(samples, places),
        names,
        names,
        frozenset(labels[place] for place in places),
        notes=notes,
        division=division,
    )


def _known_as(name: str) -> str:
    """'mnist' of 'torchvision:mnist' and of 'hf:ylecun/mnist'."""
    return name.removeprefix(HUB).rpartition("/")[2].lower() if is_hub(name) else name.removeprefix(PREFIX)


def _folder_of(name: str) -> tuple[Path | None, list[str]]:
    """The folder or table that a name means, None for a data set with a name; and what to say of it.

    Raises UsageError for a name that means nothing.
    """
    if not name:
        raise UsageError("the name of the data is empty; pass a folder, or 'digits', or a name such as cifar10")
    if is_hub(name) or name.startswith(SHARDS):
        return None, []
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
    if path.is_dir() or is_table(path) or is_shards(name):
        return path, []
    if path.is_file():
        raise UsageError(
            f"data {shown(name)!r} is a file; unpack it if it is an archive, and pass the folder (a table ends in"
            f" {' or '.join(TABLES)})"
        )
    if "/" in name or path.suffix or path.exists():
        raise UsageError(f"data folder {name!r} does not exist, or is not a folder")
    raise unknown("data set (and there is no such folder)", name, NAMES)
