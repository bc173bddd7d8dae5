"""Image folders: which folder holds which split, and which folders are classes.

A folder of class folders has no splits; a share of its images is held out of training as val (see holding_out).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ResodeError, join
from .classes import joined, listed, order_note, spelled
from .holding_out import Division, HoldOut, part_of, splits_made
from .images import extensions, read_image, shown
from .label_sets import LabelSet
from .listing import Walk, entries, extension, hidden, is_folder, leads_up
from .splits import SPLIT_FOLDERS, Split


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
    division: how images were held out, where the data have no such split of their own. sets: where images have several
    labels, samples are (image, place in `sets`), and each set holds numbers.
    """

    split: Split
    where: str
    samples: Any
    names: Sequence[str]
    classes: Sequence[str]
    present: frozenset[int]
    partial: Sequence[str] = ()
    notes: Sequence[str] = ()
    division: Division | None = None
    sets: Sequence[LabelSet] | None = None


def has_splits(path: Path) -> bool:
    return bool(_splits(path))


def splits_of_folder(path: Path, hold_out: HoldOut) -> set[Split]:
    """The labelled splits that a folder has, or that are made of what it has."""
    there = _splits(path)
    found: set[Split] = {split for split in there if _labelled(there, split)}
    return found | splits_made(_division(path, there, hold_out))


def open_folder(path: Path, wanted: Split, *, all_splits: bool, hold_out: HoldOut) -> Found:
    """The images of a split, in class folders; `val` stands for `test` where that is not there or has no labels.

    all_splits: the classes are those of every split, though the wanted one may lack some.
    Raises ResodeError for a folder that is laid out otherwise.
    """
    there = _splits(path)
    notes = _notes(path, there)
    division = _division(path, there, hold_out)
    split = wanted
    if wanted == "test" and ("val" in there or division is not None):
        if "test" not in there:
            notes.append(f"{shown(path)} has no test split: measured on {_val(there, division)}")
            split = "val"
        elif not _labelled(there, "test"):
            others = class_folders(there["test"][0])
            why = f"{shown(there['test'][0])} has no labels" + (f" (but {listed(others)})" if others else "")
            notes.append(f"{why}: measured on {_val(there, division)}")
            split = "val"
    if split not in there and (division is None or split == "test"):
        raise ResodeError(_no_split(path, wanted))
    divided = division if split in ("train", "val") else None
    folder = there[split][0] if divided is None else path if divided.of == "all" else there["train"][0]
    folders = class_folders(folder)
    if not folders:
        raise ResodeError(_no_classes(folder))
    names = [spelled(name) for name in folders]
    of_splits: dict[str, set[str]] = {split: set(names)}
    if all_splits and there:
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
    where = shown(folder)
    if divided is not None:
        present = {label for _, label in samples}
        empty = [name for label, name in enumerate(names) if label not in present]
        if empty and divided.of == "all":
            notes.append(f"{where} has folders without images, {listed(empty)}: remove those that are no classes")
        samples, said = _part(divided, split, path, folder, samples, names)
        notes += said
        where = f"the {split} part of {where}"
    there_are = frozenset(label for _, label in samples)
    return Found(split, where, ImageFiles(samples), names, classes, there_are, partial, notes, divided)


def open_unlabelled(path: Path, split: Split, hold_out: HoldOut) -> Found:
    """All images in the split's folder, or in `path` where there is none, however they are sorted into it.

    What is held out of a folder of classes, or of a train split, is left out here too: it is measured on.
    """
    there = _splits(path)
    division = _division(path, there, hold_out)
    folder = there[split][0] if split in there else path
    walk = Walk(folder)
    files = [(file, 0) for file in walk.below()]
    left_out = walk.left_out()
    if not files:
        raise ResodeError(f"{shown(folder)} holds no images{left_out and f' (left out: {left_out})'}")
    notes = [f"left out of {shown(folder)}: {left_out}"] if left_out else []
    if division is not None and split in ("train", "val"):
        of_class = [Path(file).relative_to(folder).parts for file, _ in files]
        names = sorted({parts[0] for parts in of_class if len(parts) > 1})
        place = {name: label for label, name in enumerate(names)}
        inside = [(file, place[parts[0]]) for (file, _), parts in zip(files, of_class, strict=True) if len(parts) > 1]
        loose = [(file, 0) for (file, _), parts in zip(files, of_class, strict=True) if len(parts) == 1]
        part, said = _part(division, split, path, folder, inside, names)
        files = sorted([*loose, *((file, 0) for file, _ in part)], key=lambda file: Path(file[0]).parts)
        notes += said
    none = ["unlabelled"]
    return Found(split, shown(folder), ImageFiles(files), none, none, frozenset([0]), notes=notes)


def _division(path: Path, there: dict[Split, list[Path]], hold_out: HoldOut) -> Division | None:
    """How val is made, where no folder is it."""
    if "val" in there:
        hold_out.refuse(shown(path), shown(there["val"][0]))
        return None
    if "train" in there:
        return hold_out.of("train")
    if not there and _is_of_classes(path):
        return hold_out.of("all")
    return None


def _val(there: dict[Split, list[Path]], division: Division | None) -> str:
    return shown(there["val"][0]) if division is None else "the images that are held out as val"


def _part(
    division: Division, split: Split, path: Path, folder: Path, samples: list[tuple[str, int]], names: Sequence[str]
) -> tuple[list[tuple[str, int]], list[str]]:
    """A split's images among those of a folder that is divided, and what to say. Raises ResodeError for none."""
    keys = [os.path.relpath(file, path).replace(os.sep, "/") for file, _ in samples]
    places, notes = part_of(division, split, shown(folder), keys, [label for _, label in samples], names)
    if not places:
        raise ResodeError(
            f"{shown(folder)} has one image alone of every class: nothing can be held out as val; add images"
        )
    return [samples[place] for place in places], notes


def _is_of_classes(path: Path) -> bool:
    """Whether a folder without splits is one of class folders, rather than a split, or the folder above one."""
    folders = class_folders(path)
    if not folders or _split_of(path) is not None or any(_looked_for(path / name) for name in folders[:20]):
        return False
    if len(folders) == 1:
        return _holds_images_alone(path / folders[0])
    first = [path / name for name in folders[:20]]
    # Images may lie deeper within classes; but where they lie in one folder of folders alone, that one has the classes.
    return any(map(_holds_images, first)) or sum(map(_looks_like_classes, first)) != 1


def _holds_images(folder: Path) -> bool:
    known = extensions()
    return any(extension(entry.name) in known and not hidden(entry.name) for entry in entries(folder))


def _holds_images_alone(folder: Path) -> bool:
    return _holds_images(folder) and not any(is_folder(e) and not hidden(e.name) for e in entries(folder))


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
    found = _named_as_splits(path)
    return {} if _are_classes(path, found) else found


def _named_as_splits(path: Path) -> dict[Split, list[Path]]:
    folders = {entry.name for entry in entries(path) if is_folder(entry)}
    found: dict[Split, list[Path]] = {}
    for split, names in SPLIT_FOLDERS.items():
        exact = [name for name in names if name in folders]
        others = sorted(name for name in folders - set(exact) if name.lower() in names)
        if exact or others:
            found[split] = [path / name for name in (*exact, *others)]
    return found


def _are_classes(path: Path, named: dict[Split, list[Path]]) -> bool:
    """Whether folders called as splits are classes: they hold images and no folders, and others stand beside them."""
    candidates = [folder for folders in named.values() for folder in folders]
    if not candidates:
        return False
    others = set(class_folders(path)) - {folder.name for folder in candidates}
    return bool(others) and all(_holds_images_alone(folder) for folder in candidates)


def _notes(path: Path, there: dict[Split, list[Path]]) -> list[str]:
    notes = []
    if not there and (named := _named_as_splits(path)):
        classes = listed([folder.name for folders in named.values() for folder in folders])
        notes.append(
            f"{shown(path)}: {classes} {'is a class' if len(named) == 1 else 'are classes'}, not splits, since"
            " images lie there beside other class folders"
        )
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


def _split_of(path: Path) -> Path | None:
    """The folder of splits, one for training and one to measure on, that this folder is in; None where it is in none.

    A folder called dev or test somewhere above says nothing alone.
    """
    absolute = path.absolute()
    for above in (absolute.parent, absolute.parent.parent):
        splits = _looked_for(above) if above != absolute else {}
        inside = any(absolute.is_relative_to(folder) for folders in splits.values() for folder in folders)
        if inside and "train" in splits and len(splits) > 1:
            return above
    return None


def _no_split(path: Path, wanted: Split) -> str:
    names = SPLIT_FOLDERS[wanted] + (SPLIT_FOLDERS["val"] if wanted == "test" else ())
    text = f"{shown(path)} has no folder {join(names, 'or')}"
    if (above := _split_of(path)) is not None:
        return f"{text}; pass the folder of the splits: {shown(above)}"
    there = _splits(path)
    inside = sorted(entry.name for entry in entries(path) if is_folder(entry) and not hidden(entry.name))
    within = [name for name in inside[:20] if _looked_for(path / name) or _looks_like_classes(path / name)]
    if len(within) == 1 and not there:
        return f"{text}; did you mean {shown(path / within[0])}?"
    name = shown(path.absolute().name)
    layout = f"{name}/CLASS/IMAGE, of which a share is held out, or {name}/train/CLASS/IMAGE and {name}/test (or val)"
    if not inside and _holds_images_alone(path):
        parent = path.absolute().parent
        if _looks_like_classes(parent):
            return f"{shown(path)} holds images and no class folders; did you mean {shown(parent)}?"
        return f"{shown(path)} holds images and no class folders; sort them into {layout}"
    if "train" in there and wanted != "train":
        return f"{text}; --val-split 0.2 holds a share of {shown(there['train'][0])} out"
    if there and (classes := sorted(set(inside) - {f.name for fs in there.values() for f in fs})):
        return f"{text}, but {listed(classes)}; are these the classes? Then move them into {name}/train"
    if not inside:
        return f"{shown(path)} holds no images; image folders are laid out as {layout}"
    return f"{text}{'' if there else f', but {listed(inside)}'}; image folders are laid out as {layout}"


def _looks_like_classes(path: Path) -> bool:
    """Of a folder that nobody asked for."""
    try:
        return len(class_folders(path)) > 1 and _is_of_classes(path)
    except ResodeError:
        return False


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
