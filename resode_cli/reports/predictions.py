"""Predictions as a table, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..errors import one_line
from ..quantities import counted
from .tables import plain_table

if TYPE_CHECKING:
    from ..measuring.predict import Prediction

MOST_LABELS = 20  # of an image in a table, where a threshold says how many it is given
WIDEST = 60  # characters of a path in a table; its end says most


def prediction_table(predictions: Sequence[Prediction], *, rows: int | None = None, labels: int | None = None) -> Table:
    """A row for each class of each image. rows, labels: images and classes of each that are shown, where not all are.

    Paths stand without the folder that they have in common, which the title names.
    """
    shown = predictions if rows is None else predictions[:rows]
    common = _common_folder([prediction.path or "" for prediction in predictions])
    title = counted(len(predictions), "image") + (f" in {one_line(common)}" if common else "")
    caption = f"the first {len(shown)} of {len(predictions):,}" if len(shown) < len(predictions) else None
    table = plain_table(title, caption)
    table.add_column("image")
    table.add_column("class")
    table.add_column("probability", justify="right", no_wrap=True)
    for prediction in shown:
        name = _shortened(one_line((prediction.path or "")[len(common) :]))
        for label, probability in list(zip(prediction.classes, prediction.probabilities, strict=True))[:labels]:
            table.add_row(name, one_line(label), f"{probability:.2%}")
            name = ""
        if labels is not None and len(prediction.classes) > labels:
            table.add_row(name, f"and {len(prediction.classes) - labels} more", "")
        if not prediction.classes:
            table.add_row(name, "–", "–")
    return table


def predictions_csv(predictions: Sequence[Prediction]) -> str:
    """A row for each image: its path, then class and probability by rank; empty cells where it has fewer classes."""
    top = max((len(prediction.classes) for prediction in predictions), default=0)
    header = ["path", *(f"{what}_{rank}" for rank in range(1, top + 1) for what in ("class", "probability"))]
    rows: list[list[Any]] = [
        [p.path, *(cell for pair in zip(p.classes, p.probabilities, strict=True) for cell in pair)] for p in predictions
    ]
    rows = [[*row, *[""] * (len(header) - len(row))] for row in rows]
    # Python before 3.13 quotes no carriage return by itself, and a reader takes one for the end of a row.
    returns = any(isinstance(cell, str) and "\r" in cell for row in rows for cell in row)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL)
    writer.writerows([header, *rows])
    return text.getvalue()


def predictions_json(
    predictions: Sequence[Prediction], unreadable: Sequence[Prediction], *, named: bool, several: bool
) -> dict[str, Any]:
    """named: whether the classes are the model's own names. several: whether an image may have any number of them."""
    return {
        "images": len(predictions),
        "class_names": named,
        "multi_label": several,
        "predictions": [
            {"path": p.path, "classes": list(p.classes), "probabilities": list(p.probabilities)} for p in predictions
        ],
        "unreadable": [{"path": p.path, "reason": p.error} for p in unreadable],
    }


def _common_folder(paths: Sequence[str]) -> str:
    """What all paths begin with, up to a separator; nothing for a single one."""
    if len(paths) < 2:
        return ""
    start = os.path.commonprefix([os.path.split(path)[0] + os.sep for path in paths])
    common = start[: start.rfind(os.sep) + 1]
    return "" if common == os.sep or not all(path.startswith(common) for path in paths) else common


def _shortened(path: str) -> str:
    return path if len(path) <= WIDEST else f"…{path[1 - WIDEST :]}"
