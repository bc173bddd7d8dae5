"""Tables of images: CSV or TSV with a header, a column of paths, one of labels, and perhaps one of splits."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import ResodeError, first_few, join
from ..quantities import counted
from .classes import in_order, joined, order_note
from .folders import Found, ImageFiles
from .holding_out import Division, HoldOut, part_of, splits_made
from .images import shown
from .label_sets import LabelSet, TableLabels, distinct, read_labels
from .splits import MEANT, Split

TABLES = (".csv", ".tsv")
# In the order in which they are looked for, whatever their case; spaces and hyphens are read as underscores.
PATHS = ("path", "file_path", "filepath", "image_path", "file", "file_name", "filename", "image", "img", "image_name")
LABELS = (
    *("label", "class", "class_name", "label_name", "target", "category", "category_name"),
    *("labels", "classes", "tags", "targets", "categories", "finding_labels"),
)
SPLITS = ("split", "subset", "set", "partition")


@dataclass(frozen=True)
class Row:
    """An image. file: its path; key: as the table has it; labels: one, or any number where images have several.

    split: '' where the table has none; number: its line.
    """

    file: str
    key: str
    labels: tuple[str, ...]
    split: Split | Literal[""]
    number: int


@dataclass(frozen=True)
class Table:
    """The rows of a table, each image once, and what to say of it. several: whether images have several labels.

    classes: those that have a column of their own.
    """

    path: Path
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    several: bool = False
    classes: tuple[str, ...] = ()

    def division(self, hold_out: HoldOut) -> Division | None:
        """How val is made, where no row is of it."""
        there = self.splits
        if not there:
            return hold_out.of("all")
        if "val" in there:
            hold_out.refuse(shown(self.path), "in its column of splits")
            return None
        return hold_out.of("train") if "train" in there else None

    @property
    def splits(self) -> set[Split]:
        """Those that some row is of; none where the table has no column for them."""
        return {row.split for row in self.rows if row.split}


def is_table(path: Path) -> bool:
    return path.suffix.lower() in TABLES and path.is_file()


def splits_of_table(path: Path, hold_out: HoldOut) -> set[Split]:
    """The splits that some row with a label is of, and those that are made of them."""
    table = read_table(path, labelled=False, skip_missing=True)
    with_labels = {row.split for row in table.rows if row.split and row.labels}
    return {*(with_labels or table.splits), *splits_made(table.division(hold_out))}


def open_table(
    path: Path,
    wanted: Split,
    *,
    labelled: bool,
    all_splits: bool,
    hold_out: HoldOut,
    skip_missing: bool,
    several: bool | None = None,
) -> Found:
    """The images of a split; `val` stands for `test` where the table has none. Arguments are those of `open_folder`.

    labelled: False needs no labels, and gives none. skip_missing: leave files out that are not there, and say so.
    several: whether images have several labels; None: as the table looks.
    Raises ResodeError for a table that is made otherwise.
    """
    table = read_table(path, labelled=labelled, skip_missing=skip_missing, several=several)
    notes, where, there = list(table.notes), shown(path), table.splits
    division = table.division(hold_out)
    split: Split = wanted
    if wanted == "test" and "test" not in there and ("val" in there or division is not None):
        notes.append(
            f"{where} has no test split: measured on {'val' if division is None else 'what is held out as val'}"
        )
        split = "val"
    divided = division if split in ("train", "val") else None
    if divided is None and split not in there:
        hint = "; --val-split 0.2 holds a share of train out" if split != "train" else ""
        raise ResodeError(f"{where} has no rows of the {split} split, only of {first_few(sorted(there))}{hint}")
    own = split if divided is None else "train" if divided.of == "train" else ""
    rows = [row for row in table.rows if row.split == own]
    of_splits: dict[str, set[str]] = {}
    for row in table.rows if all_splits else rows:
        of_splits.setdefault(row.split, set(table.classes if all_splits else ())).update(row.labels)
    names = _classes(of_splits, where, several=table.several)
    label_of = {name: label for label, name in enumerate(names)}
    sets = [tuple(sorted(label_of[name] for name in row.labels)) for row in rows]
    place = f"{where}, {split}"
    if divided is not None:
        places, said = part_of(
            divided, split, where, [row.key for row in rows], sets if table.several else _only(sets), names
        )
        if not places:
            raise ResodeError(f"{where} has one image alone of every class: nothing can be held out as val; add images")
        rows, sets = [rows[i] for i in places], [sets[i] for i in places]
        notes += said
        place = f"the {split} part of {where}"
    if not labelled:
        names, sets = ["unlabelled"], [(0,)] * len(rows)
    elif all_splits and (order := order_note(names)) is not None:
        notes.append(order)
    partial = [name for name in names if labelled and not all(name in of_split for of_split in of_splits.values())]
    present = frozenset(label for own in sets for label in own)
    kinds, numbers = distinct(sets) if table.several and labelled else (None, _only(sets))
    samples = ImageFiles([(row.file, number) for row, number in zip(rows, numbers, strict=True)])
    return Found(split, place, samples, names, names, present, partial, notes, divided, kinds)


def _only(sets: Sequence[LabelSet]) -> list[int]:
    """The class of each image, where it has one; that of an image without any says nothing."""
    return [own[0] if own else 0 for own in sets]


def _classes(of_splits: Mapping[str, set[str]], where: str, *, several: bool) -> list[str]:
    """The classes of all splits, in order. A small val may lack a class that test has: each is held against train.

    several: where images have several labels, rare ones may well be in one split alone.
    """
    for split in () if several else of_splits:
        joined({name: of_splits[name] for name in dict.fromkeys(("train", split)) if name in of_splits}, where)
    return in_order({name for names in of_splits.values() for name in names})


def read_table(path: Path, *, labelled: bool, skip_missing: bool, several: bool | None = None) -> Table:
    """All rows. Raises ResodeError, by the number of its line, for one that is no image with a label and a split.

    labelled: leave out the splits of which no row has a label, as long as some other has. several: see `read_labels`.
    """
    with_cells = list(_cells(path))
    if not with_cells:
        raise ResodeError(f"{shown(path)} has no rows below its header")
    columns = list(with_cells[0][1])
    of_paths, of_labels, of_splits = (_column(columns, names) for names in (PATHS, LABELS, SPLITS))
    if of_paths is None:
        raise _no_column(path, columns, "paths", PATHS)
    others = [name for name in columns if name not in (of_paths, of_splits)]
    found = read_labels(shown(path), [cells for _, cells in with_cells], of_labels, others, several)
    if found is None and labelled:
        raise _no_column(path, columns, "labels", LABELS)
    labels = found or TableLabels([()] * len(with_cells), several=False)
    rows = []
    empty: dict[str, list[int]] = {}
    named = ["" if of_splits is None else cells[of_splits].strip() for _, cells in with_cells]
    parts: list[Split | Literal[""]] = [MEANT.get(split.lower(), "") for split in named]
    with_labels = {part for part, own in zip(parts, labels.rows, strict=True) if own} if labelled else set()
    for (number, cells), own, split, meant in zip(with_cells, labels.rows, named, parts, strict=True):
        key = cells[of_paths].strip()
        needs = labelled and not labels.several and (meant in with_labels or not with_labels)
        for what, there, needed in (("path", key, True), ("label", own, needs), ("split", split, of_splits)):
            if needed and not there:
                empty.setdefault(what, []).append(number)
        if split and not meant:
            raise ResodeError(f"{shown(path)}, line {number}: {shown(split)!r} is no split: write train, val or test")
        rows.append(Row(_file(path, key), key.replace("\\", "/"), own, meant, number))
    for what, numbers in empty.items():
        lines = first_few([str(number) for number in numbers], 5)
        raise ResodeError(f"{shown(path)}: {counted(len(numbers), 'row')} without a {what} (line {lines}); fill it in")
    rows, notes = _each_once(path, rows, labelled=labelled)
    if without := [part for part in dict.fromkeys(parts) if with_labels and part not in with_labels]:
        rows = [row for row in rows if row.split in with_labels]
        are = "they are" if len(without) > 1 else "it is"
        notes.append(f"{shown(path)}: no row of {join(without)} has a label; {are} left out")
    notes += labels.notes if labelled else ()
    missing = [row for row in rows if not os.path.exists(row.file)]
    if missing:
        names = first_few([f"{shown(row.key)} (line {row.number})" for row in missing])
        said = f"{shown(path)}: {len(missing)} of {len(rows)} files are not there: {names}"
        if not skip_missing or len(missing) == len(rows):
            folder = shown(path.absolute().parent)
            raise ResodeError(f"{said}; paths are relative to {folder}; --skip-corrupt leaves such rows out")
        notes.append(said)
    gone = {row.number for row in missing}
    return Table(
        path, tuple(row for row in rows if row.number not in gone), tuple(notes), labels.several, labels.classes
    )


def _cells(path: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    """The line and the cells of each row, by the names of the header; rows without any text are passed over."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            tabs = path.suffix.lower() == ".tsv" or "\t" in header
            delimiter = "\t" if tabs else ";" if header.count(";") > header.count(",") else ","
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            columns = [name.strip() for name in reader.fieldnames or []]
            if len(set(columns)) < len(columns):
                names = first_few([shown(name) for name in columns], 9)
                raise ResodeError(f"{shown(path)}: two of its columns have one name: {names}")
            for row in reader:
                cells = {name: row[own] or "" for name, own in zip(columns, reader.fieldnames or [], strict=True)}
                if None in row:
                    raise ResodeError(f"{shown(path)}, line {reader.line_num}: more cells than the header has names")
                if any(cells.values()):
                    yield reader.line_num, cells
    except (csv.Error, UnicodeDecodeError) as error:
        raise ResodeError(f"{shown(path)} cannot be read as a table in UTF-8: {error}") from error
    except OSError as error:
        raise ResodeError(f"{shown(path)} cannot be read: {error.strerror or error}") from error


def _column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The first column that is called by one of the names, the first of these that is there."""
    found = {column.lower().replace(" ", "_").replace("-", "_"): column for column in reversed(columns)}
    return next((found[name] for name in names if name in found), None)


def _no_column(path: Path, columns: Sequence[str], what: str, names: Sequence[str]) -> ResodeError:
    there = first_few([shown(column) for column in columns], 12)
    return ResodeError(f"{shown(path)} has no column of {what} ({', '.join(names[:6])}, …); its columns are {there}")


def _file(table: Path, key: str) -> str:
    """Where an image lies: paths are relative to the table's folder. A path as Windows writes it will do."""
    file = os.path.join(table.parent, key)
    other = os.path.join(table.parent, key.replace("\\", "/"))
    return other if "\\" in key and not os.path.exists(file) else file


def _each_once(path: Path, rows: Sequence[Row], *, labelled: bool) -> tuple[list[Row], list[str]]:
    """Raises ResodeError for an image that stands in the table with two labels, or in two splits."""
    first: dict[str, Row] = {}
    again = []
    for row in rows:
        before = first.setdefault(os.path.normpath(row.file), row)
        if before is row:
            continue
        again.append(shown(row.key))
        was, now = ("|".join(each.labels) for each in (before, row))
        hint = "; several labels of an image stand in one cell, as in cat|dog"
        for what, one, other, more in (("labels", was, now, hint), ("splits", before.split, row.split, "")):
            if one != other and (labelled or what == "splits"):
                raise ResodeError(
                    f"{shown(path)}: {shown(row.key)} stands in lines {before.number} and {row.number} with two {what},"
                    f" {shown(one)} and {shown(other)}{more}"
                )
    return list(first.values()), [f"{shown(path)}: taken once, of several rows: {first_few(again)}"] if again else []
