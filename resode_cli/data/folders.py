"""Image folders: which folder holds which split, which folders are classes, which files are images.

Hidden folders and files (.ipynb_checkpoints, __MACOSX, Thumbs.db …) are neither. Links are followed, but every real
folder is taken once, so that a link to a folder above, or to another class, adds nothing.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from ..errors import ResodeError, join
from .classes import joined, listed, spelled
from .images import extensions, read_image, shown

Split = Literal["train", "val", "test"]
SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev", "eval"),
    "test": ("test", "testing"),
}
_HIDDEN = {"__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin", "lost+found", "__pycache__"}


def hidden(name: str) -> bool:
    """What a file manager, an editor or an archive leaves behind."""
    return name.startswith(".") or name.lower() in _HIDDEN


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
class FolderSplit:
    """One split of an image folder.

    names: its classes, in the order of the alphabet; the labels of `files` are places in it.
    classes: those of all splits, in their own order. notes: what the user should know.
    """

    split: Split
    folder: Path
    files: ImageFiles
    names: list[str]
    classes: list[str]
    notes: list[str]


def has_splits(path: Path) -> bool:
    return bool(_splits(path))


def held_out_of(path: Path) -> tuple[Split, ...]:
    """The labelled splits that are held out of training, the one that chooses among models first."""
    there = _splits(path)
    both: tuple[Split, ...] = ("val", "test")
    return both if all(split in there and _labelled(there, split) for split in both) else ("test",)


def open_folder(path: Path, wanted: Split, *, all_splits: bool) -> FolderSplit:
    """The images of a split, in class folders; `val` stands for `test` where that is not there or has no labels.

    all_splits: the classes are those of every split, though the wanted one may lack some.
    Raises ResodeError for a folder that is laid out otherwise.
    """
    there = _splits(path)
    notes = _notes(there)
    split = wanted
    if wanted == "test" and "val" in there and not ("test" in there and _labelled(there, "test")):
        missing = f"{shown(there['test'][0])} has no labels" if "test" in there else f"{shown(path)} has no test split"
        notes.append(f"{missing}: measured on {shown(there['val'][0])}")
        split = "val"
    if split not in there:
        raise ResodeError(_no_split(path, wanted))
    folder = there[split][0]
    folders = class_folders(folder)
    if not folders:
        raise ResodeError(_no_classes(folder))
    names = [spelled(name) for name in folders]
    classes = names
    if all_splits:
        labelled = [s for s in there if s == split or _labelled(there, s)]
        classes = joined({s: {spelled(n) for n in class_folders(there[s][0])} for s in labelled}, shown(path))
    walk = _Walk(folder)
    samples = walk.in_classes(folders)
    left_out = walk.left_out()
    if not samples:
        raise ResodeError(f"{shown(folder)}: no images in its class folders{left_out and f' (left out: {left_out})'}")
    if left_out:
        notes.append(f"left out of {shown(folder)}: {left_out}")
    return FolderSplit(split, folder, ImageFiles(samples), names, classes, notes)


def open_unlabelled(path: Path, split: Split) -> tuple[ImageFiles, list[str]]:
    """All images in the split's folder, or in `path` where there is none, however they are sorted into it."""
    there = _splits(path)
    folder = there[split][0] if split in there else path
    walk = _Walk(folder)
    files = walk.below()
    left_out = walk.left_out()
    if not files:
        raise ResodeError(f"{shown(folder)} holds no images{left_out and f' (left out: {left_out})'}")
    return ImageFiles([(file, 0) for file in files]), [f"left out of {shown(folder)}: {left_out}"] if left_out else []


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in a split, in the order of the alphabet."""
    real = os.path.realpath(folder)
    found = (e for e in _entries(folder) if _is_folder(e) and not hidden(e.name) and not _leads_up(e, real))
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
    folders = {entry.name for entry in _entries(path) if _is_folder(entry)}
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
    names = set(class_folders(there[split][0]))
    if split == "test" and "val" in there and "train" in there:  # loose images often are in one folder of any name
        return bool(names & set(class_folders(there["train"][0])))
    return bool(names)


def _no_split(path: Path, wanted: Split) -> str:
    names = SPLIT_FOLDERS[wanted] + (SPLIT_FOLDERS["val"] if wanted == "test" else ())
    text = f"{shown(path)} has no folder {join(names, 'or')}"
    absolute = path.absolute()
    for above in (absolute.parent, absolute.parent.parent):
        if above != absolute and any(absolute.is_relative_to(f) for fs in _looked_for(above).values() for f in fs):
            return f"{text}; pass the folder of the splits: {shown(above)}"
    inside = sorted(entry.name for entry in _entries(path) if _is_folder(entry) and not hidden(entry.name))
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
    loose = sum(not hidden(entry.name) and _extension(entry.name) in known for entry in _entries(folder))
    holds = f"holds {loose} images and no class folders" if loose else "holds no class folders"
    return f"{shown(folder)} {holds}; sort the images into {shown(folder.name)}/CLASS/IMAGE"


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise ResodeError(f"{shown(folder)} cannot be listed: {error.strerror or error}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _leads_up(entry: os.DirEntry[str], real: str) -> bool:
    """Whether it is a link to the folder `real` or to one above it."""
    return entry.is_symlink() and Path(real).is_relative_to(os.path.realpath(entry.path))


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


class _Walk:
    """The images below a folder: each real folder is listed once, and what was left out is counted."""

    def __init__(self, top: Path) -> None:
        self.top, self.real = str(top), os.path.realpath(top)
        self.known = extensions()
        self.seen: set[str] = set()  # real paths of the folders that were listed
        self.found: list[list[tuple[str, str, list[str]]]] = []  # by label: a folder, its real path, its images
        self.folder_links: list[tuple[str, int]] = []
        self.file_links: list[tuple[str, str, int]] = []
        self.others: Counter[str] = Counter()
        self.hidden_folders: set[str] = set()
        self.hidden_images = self.loose = self.repeated = 0

    def below(self) -> list[str]:
        """All images, wherever they lie, in the order of their paths."""
        self._start([self.top])
        return sorted((path for path, _ in self._files()), key=lambda path: Path(path).parts)

    def in_classes(self, names: Sequence[str]) -> list[tuple[str, int]]:
        """The images in the folders `names`, label by label, in the order of the folders and then of the names."""
        for entry in _entries(self.top):
            if hidden(entry.name):
                self._count_hidden(entry)
            elif not _is_folder(entry):
                self._count_loose(entry)
            elif entry.name not in names:
                self.repeated += 1
        self._start([os.path.join(self.top, name) for name in names])
        return self._files()

    def left_out(self) -> str:
        """What was not taken, in one line; empty where nothing was."""
        parts = [
            f"{count} {shown(end) if end else 'without an extension'}" for end, count in self.others.most_common(5)
        ]
        further = sum(self.others.values()) - sum(count for _, count in self.others.most_common(5))
        parts += [f"{further} others"] if further else []
        parts += [f"{self.loose} images outside the class folders"] if self.loose else []
        parts += [f"{self.hidden_images} hidden images"] if self.hidden_images else []
        parts += [f"hidden folders ({listed(sorted(self.hidden_folders))})"] if self.hidden_folders else []
        parts += [f"{self.repeated} links to what is there already"] if self.repeated else []
        return ", ".join(parts)

    def _start(self, folders: Sequence[str]) -> None:
        real = [os.path.realpath(folder) for folder in folders]
        for place, target in enumerate(real):
            if target in real[:place]:
                twins = join([shown(os.path.basename(folders[i])) for i in (real.index(target), place)])
                raise ResodeError(f"{shown(self.top)}: the classes {twins} are one folder")
        self.seen.update(real)
        self.found = [[] for _ in folders]
        for label, (folder, target) in enumerate(zip(folders, real, strict=True)):
            self._list(folder, target, label)
        # Links come last: what lies in the classes themselves is taken from there.
        while self.folder_links:
            folder, label = self.folder_links.pop(0)
            target = os.path.realpath(folder)
            if target in self.seen or Path(self.real).is_relative_to(target):
                self.repeated += 1
                continue
            self.seen.add(target)
            self._list(folder, target, label)
        self._add_linked_files()

    def _list(self, top: str, real: str, label: int) -> None:
        waiting = [(top, real)]
        while waiting:
            folder, real = waiting.pop()
            images = []
            for entry in _entries(folder):
                if hidden(entry.name):
                    self._count_hidden(entry)
                elif _is_folder(entry):
                    target = os.path.join(real, entry.name)
                    if entry.is_symlink():
                        self.folder_links.append((entry.path, label))
                    elif target in self.seen:
                        self.repeated += 1
                    else:
                        self.seen.add(target)
                        waiting.append((entry.path, target))
                elif _extension(entry.name) not in self.known:
                    self.others[_extension(entry.name)] += 1
                elif entry.is_symlink():
                    self.file_links.append((folder, entry.name, label))
                else:
                    images.append(entry.name)
            self.found[label].append((folder, real, images))

    def _add_linked_files(self) -> None:
        if not self.file_links:
            return
        taken = {
            (label, os.path.join(real, name))
            for label, folders in enumerate(self.found)
            for _, real, names in folders
            for name in names
        }
        for folder, name, label in sorted(self.file_links):
            target = (label, os.path.realpath(os.path.join(folder, name)))
            if target in taken:
                self.repeated += 1
                continue
            taken.add(target)
            self.found[label].append((folder, target[1], [name]))

    def _files(self) -> list[tuple[str, int]]:
        files: list[tuple[str, int]] = []
        for label, folders in enumerate(self.found):
            by_folder: dict[str, list[str]] = {}
            for folder, _, names in folders:
                by_folder.setdefault(folder, []).extend(names)
            files += [
                (os.path.join(folder, name), label)
                for folder in sorted(by_folder)
                for name in sorted(by_folder[folder])
            ]
        return files

    def _count_hidden(self, entry: os.DirEntry[str]) -> None:
        if _is_folder(entry):
            self.hidden_folders.add(entry.name)
        elif _extension(entry.name) in self.known and not entry.name.startswith("._"):
            self.hidden_images += 1

    def _count_loose(self, entry: os.DirEntry[str]) -> None:
        if _extension(entry.name) in self.known:
            self.loose += 1
        else:
            self.others[_extension(entry.name)] += 1
