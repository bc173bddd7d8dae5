"""Which images are held out of training, where the data come without a split to choose a model on.

Of each class the images are ranked by a hash of their paths, and the first ones are held out. So images that are added
later move few others, the images of a smaller share are among those of a larger one, and every command finds the same.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from ..errors import UsageError
from ..quantities import SHARES, counted
from .classes import listed, spelled
from .images import shown
from .label_sets import LabelSet, held_out_sets

SHARE, SPLIT_SEED = 0.2, 0  # where nothing else is asked for
Divided = Literal["all", "train"]


@dataclass(frozen=True)
class Division:
    """A share of each class's images, held out as val. seed: which ones.

    of: what was divided: 'all' images of data without splits, or their 'train' split.
    why: in a few words, where share and seed come from.
    """

    share: float
    seed: int
    of: Divided
    why: str = ""

    def record(self) -> dict[str, Any]:
        """For the history of a model that was trained on the rest, and for a run's fingerprint."""
        return {"val_split": self.share, "split_seed": self.seed, "divided": self.of}

    def held_out(self, keys: Sequence[str], labels: Sequence[int]) -> list[bool]:
        """Whether each image is held out. keys: their paths within the data, with /; labels: their classes.

        Of n images of a class ⌈share n⌉ are, of two or more at least one and not all, of a single one none.
        """
        of_class: dict[int, list[tuple[bytes, int]]] = {}
        for place, (key, label) in enumerate(zip(keys, labels, strict=True)):
            of_class.setdefault(label, []).append((self.rank(key), place))
        chosen = [False] * len(keys)
        share = Fraction(str(self.share))  # in floating point 0.07 of 100 is more than 7
        for ranked in of_class.values():
            count = min(math.ceil(share * len(ranked)), len(ranked) - 1)
            for _, place in sorted(ranked)[:count]:
                chosen[place] = True
        return chosen

    def rank(self, key: str) -> bytes:
        """By which images are sorted: the first ones are held out."""
        return hashlib.sha256(f"{self.seed}\0{spelled(key)}".encode(errors="surrogateescape")).digest()

    def notes(self, where: str, held_out: Sequence[bool], sets: Sequence[LabelSet], names: Sequence[str]) -> list[str]:
        """What to say of it. sets: the classes of each image."""
        images = Counter(label for own in sets for label in own)
        held = {label for own, out in zip(sets, held_out, strict=True) if out for label in own}
        said = [
            f"{where}: {sum(held_out)} of {counted(len(sets), 'image')}, of"
            f" {len(held)} {'class' if len(held) == 1 else 'classes'}, are held out of training as val"
            f" (--val-split {self.share:g}, --split-seed {self.seed}; {self.why})"
        ]
        if single := [names[label] for label, count in images.items() if count == 1]:
            said.append(f"{where} has one image alone of {listed(single)}: it trains, and val has none")
        return said


@dataclass(frozen=True)
class HoldOut:
    """What is asked for. share, seed: None where nothing is said of them.

    known: the record of a `Division` that a model was trained on, or that a run began with.
    """

    share: float | None = None
    seed: int | None = None
    known: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        SHARES.check("--val-split", self.share)

    def of(self, divided: Divided) -> Division | None:
        """How data without splits ('all'), or without val ('train'), are divided; None where they are not.

        Raises UsageError for a seed of no division.
        """
        known = self.known if self.known is not None and self.known["divided"] == divided else None
        share, seed = self.share, self.seed
        if share is None and known is not None:
            share = known["val_split"]
        if share is None and divided == "all":
            share = SHARE
        if share is None:
            self.refuse_seed()
            return None
        if seed is None:
            seed = known["split_seed"] if known is not None else SPLIT_SEED
        if known is not None and (share, seed) == (known["val_split"], known["split_seed"]):
            why = "as the model was trained"
        else:
            why = "as asked for" if self.share is not None else "the default" if self.seed is None else "as asked for"
        return Division(share, seed, divided, why)

    def refuse(self, where: str, own: str) -> None:
        """Raises UsageError where a share is asked for of data that has a val split of its own."""
        if self.share is not None:
            raise UsageError(f"--val-split {self.share:g}: {where} has a val split of its own, {own}; leave it out")
        self.refuse_seed()

    def refuse_seed(self) -> None:
        if self.seed is not None:
            raise UsageError(
                f"--split-seed {self.seed}: of these data nothing is held out; add --val-split, or leave it"
            )


def splits_made(division: Division | None) -> set[Literal["train", "val"]]:
    """The splits that a division makes of data, or of their train split."""
    return set() if division is None else {"train", "val"}


def known_division(history: Iterable[Mapping[str, object]]) -> Mapping[str, Any] | None:
    """The record of the last division that a model was trained on; None where there was none."""
    found = [entry for entry in history if entry.get("command") == "finetune" and is_division(entry)]
    return found[-1] if found else None


def is_division(record: Mapping[str, Any]) -> bool:
    share, seed = record.get("val_split"), record.get("split_seed")
    fits = isinstance(share, float) and share in SHARES and isinstance(seed, int) and not isinstance(seed, bool)
    return fits and record.get("divided") in ("all", "train")


def part_of(
    division: Division,
    split: str,
    where: str,
    keys: Sequence[str],
    labels: Sequence[int] | Sequence[LabelSet],
    names: Sequence[str],
) -> tuple[list[int], list[str]]:
    """The places of a split's images ('train' or 'val') among all, and what to say of the division.

    labels: the class of each image, or the classes of each.
    """
    sets = [(label,) if isinstance(label, int) else label for label in labels]
    one_each = [label for label in labels if isinstance(label, int)]
    several = len(one_each) < len(sets)
    held_out = held_out_sets(division, keys, sets) if several else division.held_out(keys, one_each)
    places = [place for place, out in enumerate(held_out) if out == (split == "val")]
    return places, division.notes(shown(where), held_out, sets, names)
