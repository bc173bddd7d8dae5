"""Other names for classes: from the names of folders, or from the order of a model's outputs, to what is shown."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .classes import in_order, listed, spelled
from .images import shown

_HEADERS = {"label", "class", "folder", "id", "wnid", "synset", "target", "index", "category", "class_id", "key"}
_SYNSET = re.compile(r"(n\d{8})[\s,]+(\S.*)")  # a line of WordNet's, as ImageNet's lists have them


@dataclass(frozen=True)
class ClassMap:
    """names: from the class of the data to the one that is shown; or `ordered`: those that are shown, in order.

    A name that two classes share is told apart by what it stands for in brackets, as 'crane (n02012849)'.
    """

    path: Path
    names: Mapping[str, str]
    ordered: tuple[str, ...] = ()

    def applied_to(self, classes: Sequence[str]) -> list[str]:
        """The names that are shown; of what the map does not know, its own.

        Raises UsageError where it knows none, or has names in order of another number of classes.
        """
        known = {*self.names, *self.names.values(), *self.ordered}
        if self.ordered and not set(map(spelled, classes)) <= known:
            if len(self.ordered) != len(classes):
                raise UsageError(
                    f"--class-map {shown(self.path)} has {len(self.ordered)} names in order, and there are"
                    f" {len(classes)} classes ({listed(classes)}); map names to names, as in n01440764,tench"
                )
            return list(self.ordered)
        if not known & set(map(spelled, classes)):
            raise UsageError(
                f"--class-map {shown(self.path)} knows none of the classes {listed(classes)}; it is of"
                f" {listed(list(self.names))}"
            )
        found = [self.names.get(spelled(name), name) for name in classes]
        if twice := [name for name, count in Counter(map(spelled, found)).items() if count > 1]:
            raise UsageError(f"--class-map {shown(self.path)}: two of the classes would be called {listed(twice)}")
        return found

    def of_outputs(self, names: Sequence[str] | None, count: int) -> list[str] | None:
        """What the outputs of a model are called. names: what they are called so far, if anything.

        Without, they are taken in the order of the map, or of the classes that it maps; None where there are more or
        fewer. Raises UsageError for a map that knows none of the model's names.
        """
        if names is not None:
            return self.applied_to(names)
        found = list(self.ordered) or [self.names[name] for name in in_order(self.names)]
        return found if len(found) == count else None


def known_names(history: Iterable[Mapping[str, object]]) -> dict[str, str]:
    """What a model's last training called the classes of its data, where they had other names."""
    runs = [entry for entry in history if entry.get("command") == "finetune"]
    found = runs[-1].get("class_map") if runs else None
    return {str(own): str(name) for own, name in found.items()} if isinstance(found, Mapping) else {}


def read_class_map(path: Path) -> ClassMap:
    """A map of a CSV or TSV (class, name), JSON ({class: name} or [name, …]) or text file (a name a line, in order).

    Lines of a text file that begin with WordNet's numbers, or have a tab, map what stands first. Of JSON lists as Keras
    has them, {"0": ["n01440764", "tench"]}, too. Raises UsageError for a file that is none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise UsageError(f"--class-map {shown(path)} cannot be read: {reason}") from error
    if path.suffix.lower() == ".json":
        found = _of_json(path, text)
    elif path.suffix.lower() in (".csv", ".tsv"):
        found = _of_table(path, text)
    else:
        found = _of_lines(text)
    pairs = [(spelled(key.strip()), spelled(name.strip())) for key, name in found]
    if not pairs or not all(name for _, name in pairs):
        raise UsageError(f"--class-map {shown(path)}: {'a name is empty' if pairs else 'it is empty'}")
    keys = Counter(key for key, _ in pairs if key)
    if twice := [key for key, count in keys.items() if count > 1]:
        raise UsageError(f"--class-map {shown(path)} has two lines of {listed(twice)}")
    names = Counter(name for _, name in pairs)
    places = [(key or str(place), name) for place, (key, name) in enumerate(pairs)]
    apart = [(key, name if names[name] == 1 else f"{name} ({key})") for key, name in places]
    if keys:
        return ClassMap(path, dict(apart))
    return ClassMap(path, {}, tuple(name for _, name in apart))


Pairs = list[tuple[str, str]]  # the first is empty where names stand in order


def _of_json(path: Path, text: str) -> Pairs:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--class-map {shown(path)} is no JSON: {error}") from error
    if isinstance(found, list):
        pairs = [("", name) for name in found]
    elif isinstance(found, dict):
        pairs = list(found.items())
        if all(isinstance(value, list) and len(value) == 2 for value in found.values()):
            pairs = [(key, name) for key, name in found.values()]
        elif {key for key, _ in pairs} == {str(i) for i in range(len(pairs))}:
            pairs = [("", found[str(i)]) for i in range(len(pairs))]
    else:
        pairs = []
    if not pairs or not all(isinstance(part, str) for pair in pairs for part in pair):
        raise UsageError(f'--class-map {shown(path)}: write {{"class": "name", …}} or ["name", …]')
    return pairs


def _of_table(path: Path, text: str) -> Pairs:
    tabs = path.suffix.lower() == ".tsv" or "\t" in text.partition("\n")[0]
    try:
        rows = [row for row in csv.reader(text.splitlines(), delimiter="\t" if tabs else ",") if any(row)]
    except csv.Error as error:
        raise UsageError(f"--class-map {shown(path)} cannot be read as a table: {error}") from error
    if rows and rows[0][0].strip().lower() in _HEADERS:
        rows = rows[1:]
    if rows and all(len(row) == 1 for row in rows):
        return [("", row[0]) for row in rows]
    if short := [str(place) for place, row in enumerate(rows, 1) if len(row) < 2]:
        raise UsageError(f"--class-map {shown(path)}: row {listed(short)} has one cell, others a class and its name")
    return [(row[0], row[1]) for row in rows]


def _of_lines(text: str) -> Pairs:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and all("\t" in line for line in lines):
        return [(key, name) for key, _, name in (line.partition("\t") for line in lines)]
    synsets = [_SYNSET.fullmatch(line) for line in lines]
    if all(synsets):
        return [(match[1], match[2]) for match in synsets if match]
    return [("", line) for line in lines]
