"""Image folders: which folder holds which split, and which folders are classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ..errors import ResodeError, join
from .classes import joined, listed, order_note, spelled
from .images import extensions, read_image, shown
from .listing import Walk, entries, extension, hidden, is_folder, leads_up

Split = Literal["train", "val", "test"]
SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing"),
}


class ImageFiles:
    """Image files as (RGB image, label)."""

    def __init__(self, samples: Sequence[tuple[str, int]]) -> None:
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        path, label = self.samples[i]
        return read_image(path), label


@dataclass(frozen=True)
class Found:
    """One split of a data set.

    samples: (image, number) pairs. names: what each number means. classes: all classes of the data set, in their order.
    present: the numbers that some image has. partial: classes that are not in every split.
    where: the split in a few words. notes: what the user should know.
    """

    split: Split
    where: str
    samples: Any
    names: Sequence[str]
    classes: Sequence[str]
    present: frozenset[int]
    partial: Sequence[str] = ()
    notes: Sequence[str] = ()


def has_splits(path: Path) -> bool:
    return bool(_splits(path))


def held_out_of(path: Path) -> tuple[Split, ...]:
    """The labelled splits that are held out of training, the one that chooses among models first."""
    there = _splits(path)
    both: tuple[Split, ...] = ("val", "test")
    return both if all(split in there and _labelled(there, split) for split in both) else ("test",)


def open_folder(path: Path, wanted: Split, *, all_splits: bool) -> Found:
    """The images of a split, in class folders; `val` stands for `test` where that is not there or has no labels.

    all_splits: the classes are those of every split, though the wanted one may lack some.
    Raises ResodeError for a folder that is laid out otherwise.
    """
    there = _splits(path)
    notes = _notes(there)
    split = wanted
    if wanted == "test" and "val" in there and not ("test" in there and _labelled(there, "test")):
        why = f"{shown(path)} has no test split"
        if "test" in there:
            others = class_folders(there["test"][0])
            why = f"{shown(there['test'][0])} has no labels" + (f" (but {listed(others)})" if others else "")
        notes.append(f"{why}: measured on {shown(there['val'][0])}")
        split = "val"
    if split not in there:
        raise ResodeError(_no_split(path, wanted))
    folder = there[split][0]
    folders = class_folders(folder)
    if not folders:
        raise ResodeError(_no_classes(folder))
    names = [spelled(name) for name in folders]
    of_splits: dict[str, set[str]] = {split: set(names)}
    if all_splits:
        labelled = [s for s in there if s == split or _labelled(there, s)]
        of_splits = {s: {spelled(name) for name in class_folders(there[s][0])} for s in labelled}
    classes = joined(of_splits, shown(path))
    partial = [name for name in classes if not all(name in of_split for of_split in of_splits.values())]
    walk = Walk(folder)
    samples = walk.in_classes(folders)
    left_out = walk.left_out()
    if not samples:
        raise ResodeError(f"{shown(folder)}: no images in its class folders{left_out and f' (left out: {left_out})'}")
    if left_out:
        notes.append(f"left out of {shown(folder)}: {left_out}")
    if all_splits and (order := order_note(classes)) is not None:
        notes.append(order)
    present = frozenset(label for _, label in samples)
    return Found(split, shown(folder), ImageFiles(samples), names, classes, present, partial, notes)


def open_unlabelled(path: Path, split: Split) -> Found:
    """All images in the split's folder, or in `path` where there is none, however they are sorted into it."""
    there = _splits(path)
    folder = there[split][0] if split in there else path
    walk = Walk(folder)
    files = walk.below()
    left_out = walk.left_out()
    if not files:
        raise ResodeError(f"{shown(folder)} holds no images{left_out and f' (left out: {left_out})'}")
    samples = ImageFiles([(file, 0) for file in files])
    notes = [f"left out of {shown(folder)}: {left_out}"] if left_out else []
    return Found(split, shown(folder), samples, ["unlabelled"], ["unlabelled"], frozenset([0]), notes=notes)


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in a split, in the order of the alphabet."""
    real = os.path.realpath(folder)
    found = (e for e in entries(folder) if is_folder(e) and not hidden(e.name) and not leads_up(e, real))
    names = sorted(entry.name for entry in found)
    known: dict[str, str] = {}
    for name in names:
        if not name.isprintable() and any("\ud800" <= character <= "\udfff" for character in name):
            raise ResodeError(f"{shown(folder)}: the folder {name!r} has a name that is not UTF-8; rename it")
        if spelled(name) in known:
            raise ResodeError(f"{shown(folder)} has two folders for the class {shown(name)}, spelled with other bytes")
        known[spelled(name)] = name
    return names


def _splits(path: Path) -> dict[Split, list[Path]]:
    """The folders that can be a split: the one that is taken, and others of the same meaning."""
    folders = {entry.name for entry in entries(path) if is_folder(entry)}
    found: dict[Split, list[Path]] = {}
    for split, names in SPLIT_FOLDERS.items():
        exact = [name for name in names if name in folders]
        others = sorted(name for name in folders - set(exact) if name.lower() in names)
        if exact or others:
            found[split] = [path / name for name in (*exact, *others)]
    return found


def _notes(there: dict[Split, list[Path]]) -> list[str]:
    notes = []
    for split, (taken, *others) in there.items():
        if others:
            left = join([shown(other.name) for other in others])
            notes.append(f"{shown(taken.parent)}: {taken.name} is the {split} split, {left} left alone")
    real: dict[str, Path] = {}
    for taken, *_ in there.values():
        twin = real.setdefault(os.path.realpath(taken), taken)
        if twin != taken:
            notes.append(f"{shown(taken)} and {shown(twin)} are the same folder: nothing is held out")
    return notes


def _labelled(there: dict[Split, list[Path]], split: Split) -> bool:
    """Whether a split's images are in class folders: a test set as competitions hand it out is not."""
    names = {spelled(name) for name in class_folders(there[split][0])}
    if split != "train" and len(there) == len(SPLIT_FOLDERS):
        # Loose images often lie in one folder of any name, and where there is a choice that one is not taken.
        return bool(names & {spelled(name) for name in class_folders(there["train"][0])})
    return bool(names)


def _no_split(path: Path, wanted: Split) -> str:
    names = SPLIT_FOLDERS[wanted] + (SPLIT_FOLDERS["val"] if wanted == "test" else ())
    text = f"{shown(path)} has no folder {join(names, 'or')}"
    absolute = path.absolute()
    for above in (absolute.parent, absolute.parent.parent):
        if above != absolute and any(absolute.is_relative_to(f) for fs in _looked_for(above).values() for f in fs):
            return f"{text}; pass the folder of the splits: {shown(above)}"
    inside = sorted(entry.name for entry in entries(path) if is_folder(entry) and not hidden(entry.name))
    within = [name for name in inside[:20] if _looked_for(path / name)]
    if len(within) == 1 and not has_splits(path):
        return f"{text}; did you mean {shown(path / within[0])}?"
    name = shown(absolute.name)
    layout = f"an image folder is {name}/train/CLASS/IMAGE and {name}/test/CLASS/IMAGE (or val)"
    if inside and not has_splits(path):
        return f"{text}, but {listed(inside)}; {layout}"
    return f"{text}; {layout}"


def _looked_for(path: Path) -> dict[Split, list[Path]]:
    """The splits of a folder that nobody asked for, which may be one that cannot be listed."""
    try:
        return _splits(path)
    except ResodeError:
        return {}


def _no_classes(folder: Path) -> str:
    known = extensions()
    loose = sum(not hidden(entry.name) and extension(entry.name) in known for entry in entries(folder))
    holds = f"holds {loose} images and no class folders" if loose else "holds no class folders"
    return f"{shown(folder)} {holds}; sort the images into {shown(folder.name)}/CLASS/IMAGE"
