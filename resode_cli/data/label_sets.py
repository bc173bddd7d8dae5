"""Images with several labels: what a table says of them, and which are held out.

Two forms are read: a column whose cells hold labels with a separator between them (cat|dog, or cat;dog), and a column
for each class, of 0 and 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING

from ..errors import ResodeError, first_few
from ..quantities import counted
from .classes import NEW_HEAD, OtherClasses, spelled
from .images import shown

if TYPE_CHECKING:
    from .holding_out import Division

SEPARATORS = ("|", ";")
_YES, _NO = {"1", "1.0", "true"}, {"0", "0.0", "false"}  # whatever their case
_OR = " or ".join(SEPARATORS)
_UNKNOWN = {"", "-1", "-1.0", "nan", "na", "?"}
LabelSet = tuple[int, ...]  # the classes of an image, ascending


@dataclass(frozen=True)
class TableLabels:
    """What each row of a table is of. several: an image may have any number of labels; else it has one.

    notes: what to say of how they were read. classes: those that have a column, whether an image is of them or not.
    """

    rows: Sequence[tuple[str, ...]]
    several: bool
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


def read_labels(
    where: str, rows: Sequence[Mapping[str, str]], column: str | None, others: Sequence[str], several: bool | None
) -> TableLabels | None:
    """The labels of a table's rows, by a column of labels, or else by columns of 0 and 1; None where it has neither.

    others: the columns that are neither of paths nor of splits. several: whether images have several labels; None: they
    have where a cell holds a separator, or where a row of the columns of 0 and 1 has not exactly one 1.
    Raises ResodeError for labels of the other kind.
    """
    found = _of_columns(where, rows, others, several) if column is None else _of_column(where, rows, column, several)
    if found is None:
        return None
    if found.several and several is False:
        raise OtherClasses(f"{where}: images have several labels, and the model gives an image one class; {NEW_HEAD}")
    without = sum(not labels for labels in found.rows)
    note = f"{where}: {without} of {counted(len(found.rows), 'row')} have no label" if found.several and without else ""
    return replace(found, notes=(*found.notes, *([note] if note else [])))


def _of_column(where: str, rows: Sequence[Mapping[str, str]], column: str, several: bool | None) -> TableLabels:
    cells = [row[column].strip() for row in rows]
    there = [separator for separator in SEPARATORS if any(separator in cell for cell in cells)]
    if len(there) > 1:
        raise ResodeError(f"{where}: labels are separated by | in some rows and by ; in others; write one of them")
    if lists := [cell for cell in cells if cell.startswith("[") and cell.endswith("]")]:
        raise ResodeError(f"{where}: labels are written as lists, {shown(lists[0])}; write them as in cat|dog")
    if not there:
        notes = [] if (doubtful := _with_commas(cells)) is None else [f"{where}: {doubtful}"]
        return TableLabels([(spelled(cell),) if cell else () for cell in cells], bool(several), tuple(notes))
    note = f"{where}: images have several labels, separated by {there[0]}"
    return TableLabels([_parts(cell.split(there[0])) for cell in cells], True, (note,))


def _with_commas(cells: Sequence[str]) -> str | None:
    """What to say of names with commas whose parts are classes too, or come again; None of 'tench, Tinca tinca'."""
    whole = set(cells)
    commas = sorted(cell for cell in whole if "," in cell)
    parts = [{part.strip() for part in cell.split(",")} for cell in commas]
    if commas and (len(set().union(*parts)) < sum(map(len, parts)) or set().union(*parts) & whole):
        return f"{shown(commas[0])} is taken for one class; several labels of an image are separated by {_OR}"
    return None


def _of_columns(
    where: str, rows: Sequence[Mapping[str, str]], others: Sequence[str], several: bool | None
) -> TableLabels | None:
    cells = {name: [row[name].strip().lower() for row in rows] for name in others}
    names = [name for name in others if set(cells[name]) <= _YES | _NO]
    unclear = [name for name in others if name not in names and _with_gaps(set(cells[name]))]
    if unclear and len(names) + len(unclear) > 1:
        name = unclear[0]
        other = sorted(set(cells[name]) & _UNKNOWN)[0]
        raise ResodeError(
            f"{where}: the column {shown(name)} is of 0 and 1, but for {counted(cells[name].count(other), 'row')} with"
            f" {f'{other!r} in it' if other else 'an empty cell'}; write 1 where an image has the label and 0"
            " where not, or take the column out"
        )
    if len(names) < 2:
        return None
    labels = [_parts(name for name in names if cells[name][place] in _YES) for place in range(len(rows))]
    one_each = all(len(own) == 1 for own in labels)
    what = "every image is of one class" if one_each and not several else "images have several labels"
    left = [shown(name) or "a column without a name" for name in others if name not in names]
    alone = f"; left alone: {first_few(left)}" if left else ""
    note = f"{where}: {what}, by {len(names)} columns of 0 and 1{alone}"
    return TableLabels(labels, bool(several) or not one_each, (note,), _parts(names))


def _with_gaps(cells: set[str]) -> bool:
    """Whether a column would be of 0 and 1 but for cells that say nothing."""
    return bool(cells & (_YES | _NO)) and cells <= _YES | _NO | _UNKNOWN


def _parts(names: Iterable[str]) -> tuple[str, ...]:
    """Each once, in an order that says nothing."""
    return tuple(sorted({spelled(name.strip()) for name in names} - {""}))


def held_out_sets(division: Division, keys: Sequence[str], sets: Sequence[LabelSet]) -> list[bool]:
    """Whether each image is held out: of every class the share, to within what several labels of one image allow.

    The classes are gone through from the rarest on, as in the iterative stratification of Sechidis et al. 2011. Of n
    images ⌈share n⌉ are held out, fewer where one of them would be the last of some class to train on, and more where
    images of rarer classes brought more along. Of the images without a label the share is held out too.
    """
    ranked = sorted(range(len(keys)), key=lambda place: division.rank(keys[place]))
    of_class: dict[int, list[int]] = {}
    for place in ranked:
        for label in sets[place] or (-1,):
            of_class.setdefault(label, []).append(place)
    left = {label: len(places) for label, places in of_class.items()}  # to train on
    chosen, seen = [False] * len(keys), [False] * len(keys)
    share = Fraction(str(division.share))
    for label in sorted(of_class, key=lambda label: (len(of_class[label]), label)):
        places = of_class[label]
        wanted = ceil(share * len(places)) - sum(chosen[place] for place in places)
        for place in places:
            own = sets[place] or (-1,)
            if not seen[place] and wanted > 0 and all(left[each] > 1 for each in own):
                chosen[place] = True
                wanted -= 1
                for each in own:
                    left[each] -= 1
            seen[place] = True
    return chosen


def distinct(sets: Sequence[LabelSet]) -> tuple[list[LabelSet], list[int]]:
    """The sets that there are, and the place of each image's among them."""
    found = list(dict.fromkeys(sets))
    place = {own: i for i, own in enumerate(found)}
    return found, [place[own] for own in sets]
