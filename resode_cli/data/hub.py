"""Data sets of Hugging Face's `datasets`: by their name on the hub, or saved to a folder by `save_to_disk`.

The library is an extra. The column of images and that of classes are known by the types that the data set gives them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from ..errors import ResodeError, first_few, join
from .folders import Found
from .holding_out import Division, HoldOut, part_of, splits_made
from .images import shown
from .named import Part
from .splits import MEANT, Split

HUB = "hf:"


class HubImages:
    """One split as (PIL image, label). targets: the labels, -1 where there is none."""

    def __init__(self, rows: Any, image: str, label: str | None) -> None:
        self.rows, self.image = rows, image
        self.targets: list[int] = [0] * len(rows) if label is None else [-1 if k is None else k for k in rows[label]]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.rows[i][self.image], self.targets[i]


def is_hub(name: str) -> bool:
    return name.startswith(HUB)


def open_hub(name: str, wanted: Split, *, labelled: bool, hold_out: HoldOut) -> Found:
    """The images of a split; `val` stands for `test` where that is not there or has no labels.

    A train split alone is all there is, of which a share is held out. labelled: False needs no column of classes.
    Raises ResodeError where the library or the data set is not to be had, or has no such columns or split.
    """
    there, notes = _splits(name, _load(name))
    image, label, names = _columns(name, there, labelled=labelled)
    division = _division(name, there, hold_out)
    opened = {
        split: HubImages(rows, image, label) for split, rows in there.items() if split in (wanted, "train", "val")
    }
    split: Split = wanted
    measurable = "test" in opened and (not labelled or _has_labels(opened["test"]))
    if wanted == "test" and not measurable and ("val" in there or division is not None):
        why = "has no labels of its test split" if "test" in there else "has no test split"
        taken = "val" if "val" in there else "what is held out as val"
        notes.append(f"{name} {why}: measured on {taken}")
        split = "val"
    divided = division if split in ("train", "val") else None
    if divided is None and split not in there:
        hint = "; --val-split 0.2 holds a share of train out" if "train" in there else ""
        raise ResodeError(f"{name} has no {split} split, only {join(sorted(there))}{hint}")
    samples = opened["train" if divided is not None else split]
    if labelled and not _has_labels(samples):
        raise ResodeError(f"{name}: images of its {split} split have no label")
    where, places = f"{name}, {split}", None
    if divided is not None:
        keys = [str(i) for i in range(len(samples))]
        places, said = part_of(divided, split, name, keys, samples.targets, names)
        notes += said
        where = f"the {split} part of {name}"
    if not labelled:
        names, samples.targets = ["unlabelled"], [0] * len(samples)
    part: Any = samples if places is None else Part(samples, places)
    return Found(split, where, part, names, names, frozenset(part.targets), notes=notes, division=divided)


def splits_of_hub(name: str, hold_out: HoldOut) -> set[Split]:
    """The labelled splits that a data set has, or that are made of what it has."""
    there, _ = _splits(name, _load(name))
    image, label, _ = _columns(name, there, labelled=False)
    found: set[Split] = {split for split, rows in there.items() if _has_labels(HubImages(rows, image, label))}
    return found | splits_made(_division(name, there, hold_out))


def _has_labels(samples: HubImages) -> bool:
    return min(samples.targets, default=0) >= 0


def _division(name: str, there: Mapping[Split, Any], hold_out: HoldOut) -> Division | None:
    if "val" in there:
        hold_out.refuse(name, "with that name")
        return None
    if "train" not in there:
        return None
    return hold_out.of("all" if len(there) == 1 else "train")


def _library(name: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise ResodeError(f"data {shown(name)} need the library datasets, an extra: pip install '.[hf]'") from error
    return datasets


def _load(name: str) -> Any:
    """A `datasets.DatasetDict`, or one `Dataset`. 'NAME:CONFIGURATION' says which one of several."""
    datasets, given = _library(name), name.removeprefix(HUB)
    folder = Path(given)
    try:
        with redirect_stdout(sys.stderr):
            if folder.is_dir():
                return datasets.load_from_disk(str(folder))
            return datasets.load_dataset(*given.split(":", 1))
    except Exception as error:  # of many kinds: no network, no such name, no such configuration, a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if folder.is_dir():
            raise ResodeError(f"{shown(folder)} is no data set that save_to_disk wrote ({reason})") from error
        raise ResodeError(
            f"the data set {shown(given)} cannot be fetched ({reason}); connect to the network, or pass a folder"
        ) from error


def _splits(name: str, loaded: Any) -> tuple[dict[Split, Any], list[str]]:
    """By our names for them; and which others are left alone."""
    if not hasattr(loaded, "keys"):
        return {"train": loaded}, []
    found: dict[Split, Any] = {}
    left = []
    for own in loaded:
        meant = MEANT.get(str(own).lower())
        if meant is None or meant in found:
            left.append(shown(str(own)))
        else:
            found[meant] = loaded[own]
    if not found and len(left) == 1:
        return {"train": loaded[next(iter(loaded))]}, []
    if not found:
        raise ResodeError(f"{name} has the splits {join(left)}, of which none is train, val or test")
    return found, [f"{name}: its splits {join(left)} are left alone"] if left else []


def _columns(name: str, there: Mapping[Split, Any], *, labelled: bool) -> tuple[str, str | None, Sequence[str]]:
    """The column of images, that of classes, and the names of these."""
    features = next(iter(there.values())).features
    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    images = [column for column, kind in kinds.items() if kind == "Image"]
    classes = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    columns = first_few([f"{shown(column)} ({kind})" for column, kind in kinds.items()], 12)
    if len(images) != 1:
        raise ResodeError(f"{name} has {len(images)} columns of images, and one is needed; its columns are {columns}")
    if labelled and len(classes) != 1:
        raise ResodeError(
            f"{name} has {len(classes)} columns of type ClassLabel, and one is needed (class_encode_column makes one);"
            f" its columns are {columns}"
        )
    if len(classes) != 1:
        return images[0], None, ["unlabelled"]
    return images[0], classes[0], list(features[classes[0]].names)
