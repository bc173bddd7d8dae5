"""Which images the names mean that a user gives: files, folders and patterns; and images without labels for a model.

A file that is named is taken whatever it is called, so that one that is no image is named when it is read. What a
folder or a pattern brings along is taken where its extension is an image's, and counted where it is not.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import ResodeError, UsageError, first_few
from ..network.parts import Preprocessing
from .folders import ImageFiles
from .images import extensions, read_image, shown, upright
from .listing import Walk, extension, hidden
from .loading import ImageData
from .transforms import transform


@dataclass(frozen=True)
class Selection:
    """Image files in the order in which they were found, and what the user should know of the rest."""

    paths: tuple[str, ...]
    notes: tuple[str, ...]


def select_images(names: Sequence[str | Path]) -> Selection:
    """The images that files, folders (with all below them) and patterns name; each file once, by its first name.

    Raises UsageError for a name that nothing has and a pattern that nothing fits, ResodeError where none is an image.
    """
    found: dict[str, str] = {}  # by real path
    again: list[str] = []
    notes: list[str] = []
    for name in map(str, names):
        paths, left_out = _named(name)
        if left_out:
            notes.append(f"left out of {shown(name)}: {left_out}")
        elif not paths:
            notes.append(f"{shown(name)} holds no images")
        for path in paths:
            real = os.path.realpath(path)
            if real in found:
                again.append(shown(path))
            found.setdefault(real, path)
    if not found:
        raise ResodeError(f"there is no image to read: {'; '.join(notes) or 'nothing was named'}")
    if again:
        notes.append(f"named more than once, and read once: {first_few(again)}")
    return Selection(tuple(found.values()), tuple(notes))


def open_images(images: Sequence[str | Path | Image.Image], preprocessing: Preprocessing) -> ImageData:
    """Images of files, or from memory, as a model wants them; the label of each is its place in the sequence.

    What cannot be read is left out, and stands with the reason in a batch's `skipped`.
    """
    whole = transform(preprocessing, augment=False)
    return ImageData("images", _Images(images), ["unlabelled"], transform=whole, skip_corrupt=True)


class _Images(ImageFiles):
    """Files and pictures as (RGB image, place)."""

    def __init__(self, images: Sequence[str | Path | Image.Image]) -> None:
        names = [f"image {i}" if isinstance(image, Image.Image) else str(image) for i, image in enumerate(images)]
        super().__init__([(name, place) for place, name in enumerate(names)])
        self.images = images

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        image = self.images[i]
        return upright(image.copy()) if isinstance(image, Image.Image) else read_image(image), i


def _named(name: str) -> tuple[list[str], str]:
    """The images that one name means, and what was left out of them in a few words."""
    if os.path.isdir(name):
        return _below(name)
    if os.path.lexists(name):
        return [name], ""
    if not glob.has_magic(name):
        raise UsageError(f"{name!r}: there is no such image or folder")
    # Of what begins with a dot a pattern takes only what it names so, as a shell does.
    matches = sorted(glob.glob(name, recursive=True), key=lambda path: Path(path).parts)
    if not matches:
        raise UsageError(f"{name!r}: nothing fits this pattern")
    return _among(matches)


def _below(folder: str) -> tuple[list[str], str]:
    walk = Walk(Path(folder))
    return walk.below(), walk.left_out()


def _among(matches: Sequence[str]) -> tuple[list[str], str]:
    """The images among files and folders that fit a pattern; folders inside others that fit are walked once."""
    paths: list[str] = []
    left: list[str] = []
    others: Counter[str] = Counter()
    walked: set[Path] = set()
    known = extensions()
    for match in matches:
        path = Path(match)
        if walked & {path, *path.parents}:
            continue  # '**' fits a folder and all that is in it
        if os.path.isdir(match):
            walked.add(path)
            below, left_out = _below(match)
            paths += below
            left += [f"{shown(match)}: {left_out}"] if left_out else []
        elif hidden(path.name) or extension(path.name) not in known:
            others[extension(path.name)] += 1
        else:
            paths.append(match)
    counts = [f"{count} {shown(end) if end else 'without an extension'}" for end, count in others.most_common()]
    return paths, "; ".join([", ".join(counts), *left] if counts else left)
