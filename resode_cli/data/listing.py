"""Which files below a folder are images, and what was left out.

Hidden folders and files (.ipynb_checkpoints, __MACOSX, Thumbs.db …) are passed over. Links are followed, but every
real folder is listed once, so that a link to a folder above, or to another class, adds nothing.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..errors import ResodeError, join
from .classes import listed
from .images import extensions, shown

_HIDDEN = {"__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin", "lost+found", "__pycache__"}


def hidden(name: str) -> bool:
    """What a file manager, an editor or an archive leaves behind."""
    return name.startswith(".") or name.lower() in _HIDDEN


def entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise ResodeError(f"{shown(folder)} cannot be listed: {error.strerror or error}") from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def leads_up(entry: os.DirEntry[str], real: str) -> bool:
    """Whether it is a link to the folder `real` or to one above it."""
    return entry.is_symlink() and Path(real).is_relative_to(os.path.realpath(entry.path))


def extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


class Walk:
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
        self.broken: set[str] = set()
        self.hidden_images = self.loose = self.repeated = 0

    def below(self) -> list[str]:
        """All images, wherever they lie, in the order of their paths."""
        self._start([self.top])
        return sorted((path for path, _ in self._files()), key=lambda path: Path(path).parts)

    def in_classes(self, names: Sequence[str]) -> list[tuple[str, int]]:
        """The images in the folders `names`, label by label, in the order of the folders and then of the names."""
        for entry in entries(self.top):
            if hidden(entry.name):
                self._count_hidden(entry)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                self.broken.add(entry.name)
            elif not is_folder(entry):
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
        parts += [f"links that lead nowhere ({listed(sorted(self.broken))})"] if self.broken else []
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
            for entry in entries(folder):
                if hidden(entry.name):
                    self._count_hidden(entry)
                elif is_folder(entry):
                    target = os.path.join(real, entry.name)
                    if entry.is_symlink():
                        self.folder_links.append((entry.path, label))
                    elif target in self.seen:
                        self.repeated += 1
                    else:
                        self.seen.add(target)
                        waiting.append((entry.path, target))
                elif extension(entry.name) not in self.known:
                    self.others[extension(entry.name)] += 1
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
        if is_folder(entry):
            self.hidden_folders.add(entry.name)
        elif extension(entry.name) in self.known and not entry.name.startswith("._"):
            self.hidden_images += 1

    def _count_loose(self, entry: os.DirEntry[str]) -> None:
        if extension(entry.name) in self.known:
            self.loose += 1
        else:
            self.others[extension(entry.name)] += 1
