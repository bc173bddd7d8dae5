"""The page on one run or several."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ... import __version__
from .curves import curve_sections
from .held_out import HeldOut, held_out_section
from .markup import Markup, element, joined, paragraph
from .runs import backward, differences, origin, overview
from .style import SHEET

if TYPE_CHECKING:
    from ...training.run_record import RunRecord

BEGINNING = "<!doctype html>\n<!-- resode report -->\n"
# Nothing is asked of the network, and nothing runs: a browser enforces it, whatever a file's text may hold.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(runs: Sequence[RunRecord], found: Sequence[HeldOut | str], *, now: datetime) -> str:
    """found: what was measured on images for each run, or why nothing was; an empty text where nobody asked."""
    names = run_names([run.folder for run in runs])
    title = f"Training run {names[0]}" if len(runs) == 1 else f"{len(runs)} training runs: {', '.join(names)}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(SHEET)),
    )
    named = list(zip(runs, names, strict=True))
    body = [
        element("h1", title),
        paragraph(f"Written by resode {__version__} on {now:%Y-%m-%d at %H:%M}.", class_="note"),
        overview(runs, names, [each.summary if isinstance(each, HeldOut) else "" for each in found]),
        differences(runs, names) if len(runs) > 1 else Markup(),
        curve_sections(runs, names),
        *(backward(run, name) for run, name in named),
        *(held_out_section(each, name) for each, name in zip(found, names, strict=True) if each),
        *(origin(run, name) for run, name in named),
    ]
    whole = element("html", head, element("body", element("main", joined(body))), lang="en")
    return f"{BEGINNING}{whole}\n"


def run_names(folders: Sequence[Path]) -> list[str]:
    """What runs are called: their folders' names, or their paths where two have one name."""
    names = [folder.resolve().name for folder in folders]
    return [str(folder) if names.count(name) > 1 else name for folder, name in zip(folders, names, strict=True)]
