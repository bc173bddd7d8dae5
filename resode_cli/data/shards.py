"""Shards as WebDataset writes them: .tar files whose members KEY.jpg and KEY.cls are an image and its class.

An index of the members, by offset and size, is made when data are opened, so that any image can be read at any time: a
run draws its own order of images, and a resumed one the same again, which a stream of shards does not give. Nothing is
unpacked: what a member is called never becomes a path, and links, devices and sparse files are left out.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

from PIL import Image

from ..errors import ResodeError, UsageError, first_few, join
from .class_map import ClassMap, read_class_map
from .classes import in_order, spelled
from .folders import Found, class_folders
from .holding_out import Division, HoldOut, part_of, splits_made
from .images import extensions, image_of, shown
from .listing import hidden
from .splits import MEANT, Split

SHARDS = "wds:"
CLASSES = ("classes.txt", "classes.json")
_LONGEST_CLASS = 1000  # bytes of a .cls
_MOST_CLASSES = 1_000_000
_KNOWN = 16384  # shards whose index is remembered
_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(\d+)\.\.(\d+)")
_MOST_SHARDS = 100_000
_WRITE = "write wds:FOLDER, or 'wds:a-{000..009}.tar'"
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


@dataclass(frozen=True, slots=True)
class Member:
    """An image in a shard: where its bytes are, and its class as the shard has it; '' for none."""

    key: str
    extension: str
    offset: int
    size: int
    label: str


@dataclass(frozen=True)
class Shard:
    """images: in the order of the file. left_out: how many members of which kind are no image and no class."""

    path: str
    images: tuple[Member, ...]
    left_out: Counter[str]


class ShardImages:
    """Images of shards as (RGB image, label). samples: (SHARD/KEY.EXTENSION, label), which are no paths."""

    def __init__(self, members: Sequence[tuple[str, Member]], labels: Sequence[int]) -> None:
        self.members = list(members)
        self.samples = [
            (f"{path}/{member.key}.{member.extension}", label)
            for (path, member), label in zip(members, labels, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return image_of(self.first_bytes(i, self.stored(i))), self.samples[i][1]

    def stored(self, i: int) -> int:
        """Bytes of an image as it is stored."""
        return self.members[i][1].size

    def first_bytes(self, i: int, count: int) -> bytes:
        """The beginning of an image as it is stored."""
        path, member = self.members[i]
        with open(path, "rb") as file:
            file.seek(member.offset)
            return file.read(min(count, member.size))


def is_shards(name: str) -> bool:
    """Whether data are shards: 'wds:…', a .tar file, or a folder of them without class folders."""
    if name.startswith(SHARDS):
        return True
    path = Path(name)
    if path.is_dir():
        return _is_of_shards(path)
    return path.suffix.lower() == ".tar" and path.is_file()


def open_shards(name: str, wanted: Split, *, labelled: bool, hold_out: HoldOut) -> Found:
    """The images of a split; `val` stands for `test` where there is none. labelled: False needs no classes.

    Raises UsageError where there are no such shards, ResodeError for shards that are made otherwise.
    """
    of_split = _splits(name)
    division = _division(name, of_split, hold_out)
    split: Split = wanted
    notes = []
    if wanted == "test" and "test" not in of_split and ("val" in of_split or division is not None):
        split = "val"
        taken = "val" if division is None else "what is held out as val"
        notes.append(f"{shown(name)} has no test split: measured on {taken}")
    divided = division if split in ("train", "val") else None
    if divided is None and split not in of_split:
        there = join([each for each in of_split if each]) or "shards without one in their names"
        hint = "; --val-split 0.2 holds a share of train out" if split != "train" else ""
        raise ResodeError(f"{shown(name)} has no shards of the {split} split, only {there}{hint}")
    own: Split | None = split if divided is None else "train" if divided.of == "train" else None
    shards = {each: [_indexed(path) for path in paths] for each, paths in of_split.items()}
    members = [(shard.path, member) for shard in shards[own] for member in shard.images]
    left_out = sum((shard.left_out for shard in shards[own]), Counter())
    what = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(5))
    these = "shards" if own is None else f"{own} shards"
    if not members:
        hint = f", only {what}; images are called as in KEY.jpg, and a key ends at its first dot" if what else ""
        raise ResodeError(f"{shown(name)}: its {these} hold no images{hint}")
    if left_out:
        notes.append(f"left out of the {these} of {shown(name)}: {what}")
    names: Sequence[str] = ["unlabelled"]
    labels = [0] * len(members)
    everywhere = [member for each in shards.values() for shard in each for member in shard.images]
    if all(member.label for _, member in members):  # without labels, the same are held out where there are classes
        names, numbers = _classes(name, everywhere, of_split)
        labels = [numbers[member.label] for _, member in members]
    elif labelled:
        without = [f"{os.path.basename(path)}: {shown(m.key)}" for path, m in members if not m.label]
        raise ResodeError(
            f"{shown(name)}: {len(without)} of {len(members)} images have no class, a member KEY.cls beside them"
            f" ({first_few(without)}){f'; what is there is not read: {what}' if what else ''}; an archive of folders is"
            " for unpacking"
        )
    where = f"{shown(name)}, {split}"
    if divided is not None:
        keys = [f"{os.path.basename(path)}/{member.key}" for path, member in members]
        places, said = part_of(divided, split, name, keys, labels, names)
        if not places:
            raise ResodeError(f"{shown(name)} has one image alone of every class: nothing can be held out as val")
        members, labels = [members[i] for i in places], [labels[i] for i in places]
        notes += said
        where = f"the {split} part of {shown(name)}"
    if not labelled:
        names, labels = ["unlabelled"], [0] * len(members)
    return Found(
        split, where, ShardImages(members, labels), names, names, frozenset(labels), notes=notes, division=divided
    )


def splits_of_shards(name: str, hold_out: HoldOut) -> set[Split]:
    """The splits that shards are named after, and those that are made of them."""
    there = _splits(name)
    own: set[Split] = {split for split in there if split}
    return own | splits_made(_division(name, there, hold_out))


def _division(name: str, there: dict[Split | None, list[str]], hold_out: HoldOut) -> Division | None:
    if "val" in there:
        hold_out.refuse(shown(name), "in shards of that name")
        return None
    return hold_out.of("all") if None in there else hold_out.of("train") if "train" in there else None


def _splits(name: str) -> dict[Split | None, list[str]]:
    """The shards of each split; all of them under None where none is named after a split.

    Raises ResodeError where some are and some are not.
    """
    found: dict[Split | None, list[str]] = {}
    for path in _paths(name):
        found.setdefault(_split_of(path), []).append(path)
    if None in found and len(found) > 1:
        others = first_few([shown(os.path.basename(path)) for path in found[None]])
        raise ResodeError(f"{shown(name)}: some shards are named after a split (train, val, test), not: {others}")
    return found


def _split_of(path: str) -> Split | None:
    """By the first word of a shard's name that means a split, or else by its folder's name."""
    stem = os.path.basename(path).rpartition(".")[0].lower()
    words = [*re.findall(r"[a-z]+", stem), os.path.basename(os.path.dirname(path)).lower()]
    return next((MEANT[word] for word in words if word in MEANT), None)


def _paths(name: str) -> list[str]:
    """The shards that a name means, in order. Raises UsageError for none."""
    given = name.removeprefix(SHARDS)
    if not given:
        raise UsageError(f"data {shown(name)!r}: {_WRITE}")
    if os.path.isdir(given):
        found = _in_folder(Path(given))
    elif os.path.isfile(given):
        found = [given]
    else:
        found = []
        for pattern in _spelled_out(given):
            matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
            found += matches
    if missing := [path for path in found if not os.path.isfile(path)]:
        raise UsageError(f"data {shown(name)!r}: there is no shard {first_few([shown(path) for path in missing])}")
    if not found:
        raise UsageError(f"data {shown(name)!r}: there is no .tar file; {_WRITE}")
    return list(dict.fromkeys(found))


def _in_folder(folder: Path) -> list[str]:
    """The shards in a folder, or in folders of it that are named after splits."""
    inside = [folder, *(folder / name for name in MEANT)]
    each = [sorted(str(p) for p in f.glob("*.[tT][aA][rR]") if not hidden(p.name) and p.is_file()) for f in inside]
    return each[0] or [path for paths in each[1:] for path in paths]


def _is_of_shards(folder: Path) -> bool:
    """Whether there are shards and no class folders, in the folder or in those of splits."""
    shards = _in_folder(folder)
    try:
        return bool(shards) and not any(
            class_folders(inside) for inside in {Path(os.path.dirname(path)) for path in shards}
        )
    except ResodeError:  # it cannot be listed, which is for whoever opens it to say
        return False


def _spelled_out(pattern: str) -> Iterator[str]:
    """What braces stand for: {000..009} for numbers, {a,b} for words. Raises UsageError for very many."""
    parts = _BRACES.split(pattern)  # every second one stood in braces
    choices: list[list[str]] = []
    many = 1
    for place, part in enumerate(parts):
        numbers = _NUMBERS.fullmatch(part) if place % 2 else None
        if numbers is not None:
            start, end, width = int(numbers[1]), int(numbers[2]), len(numbers[1])
            many *= max(end - start + 1, 1)
            own = [] if many > _MOST_SHARDS else [f"{i:0{width}d}" for i in range(start, end + 1)]
        else:
            own = part.split(",") if place % 2 else [part]
            many *= len(own)
        choices.append(own)
    if many > _MOST_SHARDS:
        raise UsageError(f"data {shown(pattern)!r}: that is more than {_MOST_SHARDS} shards")
    for chosen in product(*choices):
        yield "".join(chosen)


def _indexed(path: str) -> Shard:
    try:
        found = os.stat(path)
        return _index(path, found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise ResodeError(f"{shown(path)} cannot be read: {error.strerror or error}") from error


@lru_cache(maxsize=_KNOWN)
def _index(path: str, size: int, _written: int) -> Shard:
    """What a shard holds. size, _written: bytes of the file and when it was written: another file has its own index.

    Raises ResodeError for a file that is no whole archive, and for a key of two images or two classes.
    """
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    known = {end.removeprefix(".") for end in extensions()}
    with open(path, "rb") as contents:
        for member in _members(path, size):
            folder, _, base = member.name.rpartition("/")
            stem, _, end = base.partition(".")
            key, end = spelled(f"{folder}/{stem}" if folder else stem), end.lower()
            if not member.isreg() or member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                if not member.isdir():
                    left_out["links or devices"] += 1
            elif hidden(base):
                left_out["hidden"] += 1
            elif end in known:
                if key in images:
                    raise ResodeError(f"{shown(path)}: there are two images of the key {shown(key)}")
                images[key] = (end, member.offset_data, member.size)
            elif end == "cls":
                if key in labels:
                    raise ResodeError(f"{shown(path)}: there are two classes of the key {shown(key)}")
                contents.seek(member.offset_data)
                labels[key] = _label(path, key, contents.read(min(member.size, _LONGEST_CLASS + 1)))
            else:
                left_out[f".{shown(end)}" if end else "without an extension"] += 1
    found = (Member(key, *own, labels.get(key, "")) for key, own in images.items())
    return Shard(path, tuple(found), left_out)


def _members(path: str, size: int) -> Iterator[tarfile.TarInfo]:
    """A shard's members, one after the other. Raises ResodeError for what is no whole archive."""
    last = -1
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                # A negative size would lead back to a member that was there already, and so on for ever.
                if member.size < 0 or member.offset_data <= last or member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"the member {shown(member.name)} does not fit into the file")
                last = member.offset_data
                yield member
                archive.members = []  # type: ignore[attr-defined]  # which would hold a kilobyte for each
            # At a header that is none it stops without a word, as at the block of zeros that ends an archive.
            with open(path, "rb") as rest:
                rest.seek(archive.offset)  # type: ignore[attr-defined]
                if any(rest.read(tarfile.BLOCKSIZE)):
                    raise tarfile.ReadError(f"it ends, or is damaged, at byte {archive.offset:,}")  # type: ignore
    except (tarfile.TarError, ValueError, EOFError, RecursionError, OverflowError) as error:
        with open(path, "rb") as file:
            compressed = file.read(6).startswith(_COMPRESSED)
        why = "it is compressed, as shards are not; unpack it once (gunzip, unxz, …)" if compressed else error
        raise ResodeError(f"{shown(path)} is no whole .tar file: {why}") from error


def _label(path: str, key: str, content: bytes) -> str:
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        text = ""
    if not text or len(content) > _LONGEST_CLASS or not text.isprintable():
        raise ResodeError(f"{shown(path)}: {shown(key)}.cls is no number and no name of a class")
    return spelled(text)


def _classes(
    name: str, members: Sequence[Member], of_split: dict[Split | None, list[str]]
) -> tuple[list[str], dict[str, int]]:
    """The classes in order, and the place of each label. Numbers are places; of texts each is a class."""
    labels = {member.label for member in members} - {""}
    called = _names(of_split)
    if not all(label.isascii() and label.isdigit() and len(label) < 18 for label in labels):
        whole = called is not None and labels <= set(called.ordered)
        names = list(called.ordered) if called is not None and whole else in_order(labels)
        place = {label: i for i, label in enumerate(names)}
        return names if called is None or whole else called.applied_to(names), place
    most = max(map(int, labels))
    if most >= _MOST_CLASSES:
        raise ResodeError(f"{shown(name)}: a class has the number {most}; there are {_MOST_CLASSES:,} at most")
    if called is not None and called.ordered:
        if most >= len(called.ordered):
            count = len(called.ordered)
            raise ResodeError(f"{shown(called.path)} names {count} classes, and an image is of class {most}, from 0")
        names = list(called.ordered)
    else:
        names = [str(k) for k in range(most + 1)]
        names = names if called is None else called.applied_to(names)
    return names, {label: int(label) for label in labels}


def _names(of_split: dict[Split | None, list[str]]) -> ClassMap | None:
    """What classes are called, by a file beside the shards, or in the folder above those of splits."""
    folders = dict.fromkeys(os.path.dirname(path) for paths in of_split.values() for path in paths)
    above = dict.fromkeys(os.path.dirname(f) for f in folders if os.path.basename(f).lower() in MEANT)
    found = [os.path.join(f, name) for f in (*folders, *above) for name in CLASSES]
    path = next((path for path in found if os.path.isfile(path)), None)
    try:
        return None if path is None else read_class_map(Path(path))
    except UsageError as error:
        raise UsageError(str(error).removeprefix("--class-map ")) from error
