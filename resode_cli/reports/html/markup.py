"""HTML and SVG by elements. Text is escaped where it enters; what is markup already says so by its type."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from ...errors import printable

VOID = ("img", "meta", "col", "path", "line")  # that enclose nothing


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def markup(inside: object) -> Markup:
    """Markup as it is, anything else as text: of files come class names, paths and settings."""
    return inside if isinstance(inside, Markup) else Markup(html.escape(printable(str(inside))))


def joined(parts: Iterable[object], between: str = "") -> Markup:
    return Markup(html.escape(between).join(markup(part) for part in parts))


def element(name: str, /, *inside: object, **attributes: object) -> Markup:
    """<name attribute="…">inside</name>; None is left out of either.

    An attribute is written with '-' for '_', and without one at its end, which Python's own words need (`class_`).
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{markup(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{joined(part for part in inside if part is not None)}</{name}>")


def table(caption: str, header: Sequence[object], rows: Iterable[Sequence[object]], *, words: int = 1) -> Markup:
    """A table that scrolls by itself where the page is narrow; the first column heads the rows.

    words: columns from the left that hold words; the others hold figures, and stand at the right.
    """
    kinds = ["words" if place < words else "figure" for place in range(len(header))]
    head = element("tr", *(element("th", h, scope="col", class_=k) for h, k in zip(header, kinds, strict=True)))
    body = []
    for row in rows:
        first, *rest = row
        cells = [element("td", cell, class_=kind) for cell, kind in zip(rest, kinds[1:], strict=True)]
        body.append(element("tr", element("th", first, scope="row", class_=kinds[0]), *cells))
    made = element("table", element("caption", caption), element("thead", head), element("tbody", *body))
    return scrolling(made, caption)


def scrolling(inside: Markup, label: str) -> Markup:
    """What may be wider than the page. A keyboard reaches it, as it has to be scrolled."""
    return element("div", inside, class_="wide", tabindex=0, role="region", aria_label=label)


def section(title: str, *inside: object) -> Markup:
    return element("section", element("h2", title), *inside)


def paragraph(*inside: object, class_: str | None = None) -> Markup:
    return element("p", *inside, class_=class_)


def folded(summary: str, *inside: object) -> Markup:
    """What a reader opens."""
    return element("details", element("summary", summary), *inside)
