"""Whose order of classes holds: the model's own names, or else those of the folders, as numbers where all are."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import ResodeError, first_few
from .images import shown

if TYPE_CHECKING:
    from .loading import ImageData


NEW_HEAD = "`resode finetune --new-head` trains a head for the data's classes"


class OtherClasses(ResodeError):
    """Data and a model tell other classes apart, or one gives an image several labels and the other one."""


def spelled(name: str) -> str:
    """A name in one spelling: file systems write accents as one character or as two."""
    return unicodedata.normalize("NFC", name)


def in_order(names: Collection[str]) -> list[str]:
    """Sorted as text; by number where names differ in a number at their end alone, so that 2 comes before 10."""
    parts = {name: re.fullmatch(r"(.*?)([0-9]+)", name, re.DOTALL) for name in names}
    numbers = {name: (int(match[2]), name) for name, match in parts.items() if match and len(match[2]) < 18}
    beginnings = {match[1] for match in parts.values() if match}
    if len(numbers) == len(parts) and len(beginnings) == 1:
        return sorted(numbers, key=numbers.__getitem__)
    return sorted(names)


def order_note(names: Sequence[str]) -> str | None:
    """What to say of an order that is not the alphabet's."""
    if list(names) == sorted(names):
        return None
    return f"the classes are numbered, and taken by number: {', '.join(names[:3])}, … {names[-1]}"


def assumed_note(names: Sequence[str]) -> str:
    """What to say where the order of the folders stands in for names that the model does not have."""
    return f"the model names no classes: its outputs are taken in the order of their names, {listed(names)}"


def joined(names: Mapping[str, Collection[str]], where: str) -> list[str]:
    """The classes of several splits in order; a split may lack some of them.

    names: each split's class names. where: the data set that the splits belong to.
    Raises ResodeError where each of two splits has a class
    that the other lacks: one of them is misspelled, and nothing says which.
    """
    splits = list(names)
    for i, first in enumerate(splits):
        for second in splits[i + 1 :]:
            one, other = set(names[first]), set(names[second])
            if one - other and other - one:
                lists = differing({f"only {first}": one - other, f"only {second}": other - one})
                raise ResodeError(f"{where}: the splits have different classes ({lists}); make the names equal")
    return in_order({name for classes in names.values() for name in classes})


def differing(only: Mapping[str, Collection[str]]) -> str:
    """'only train: owl; only test: owls', the longer lists cut."""
    return "; ".join(f"{who}: {listed(in_order(names))}" for who, names in only.items() if names)


def listed(names: Sequence[str]) -> str:
    return first_few([shown(name) for name in names], 5)


def places(names: Sequence[str], classes: Sequence[str], where: str) -> list[int]:
    """The place of each of `names` among the model's classes.

    Raises ResodeError for a name that is none of them.
    """
    if list(names) == list(classes):
        return list(range(len(names)))
    own = {spelled(name): place for place, name in enumerate(classes)}
    if not {spelled(name) for name in names} <= set(own):
        raise _other_classes(where, names, classes)
    return [own[spelled(name)] for name in names]


def check_classes(data: ImageData, num_classes: int, class_names: Sequence[str] | None) -> None:
    """Raises ResodeError unless the data's classes are the ones that the model's head tells apart."""
    if class_names is not None and tuple(class_names) != data.class_names:
        if set(class_names) == set(data.class_names):
            raise ResodeError(
                f"the model tells the classes of {shown(data.name)} apart in another order"
                f" ({listed(class_names)}; the data: {listed(data.class_names)}); open the data with the model's names"
            )
        raise _other_classes(shown(data.name), data.class_names, class_names)
    n = len(data.class_names)
    if n != num_classes:
        other = ""
        if n < num_classes:
            other = "make an empty folder for each class without images, or "
        elif data.partial:
            other = f"not every split has {listed(data.partial)}: remove what is no class, or "
        raise OtherClasses(
            f"{shown(data.name)} has {n} classes and the model's head {num_classes}, without names; {other}{NEW_HEAD}"
        )


def without_images(classes: Sequence[str], labels: Collection[int], split: str, where: str) -> str | None:
    """What to say of classes that no image is of."""
    missing = [name for place, name in enumerate(classes) if place not in labels]
    if not missing:
        return None
    them, are = ("it", "is") if len(missing) == 1 else ("they", "are")
    what = "trained" if split == "train" else "measured"
    return f"{where} has no images of {listed(missing)}: {them} {are} not {what} here"


def _other_classes(where: str, names: Sequence[str], classes: Sequence[str]) -> ResodeError:
    theirs, own = {spelled(n) for n in names}, {spelled(n) for n in classes}
    lists = differing({"only the data": theirs - own, "only the model": own - theirs})
    case = {n.casefold() for n in theirs - own} & {n.casefold() for n in own - theirs}
    hint = " (some differ in upper and lower case alone)" if case else ""
    if not theirs & own and not hint:
        hint = "; --class-map FILE gives the data's classes other names"
    return OtherClasses(f"the model tells other classes apart than {where} has: {lists}{hint}; {NEW_HEAD}")
