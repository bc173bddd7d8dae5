"""How figures are written: in tables for people, and in JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table


def plain_table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))


def number(value: float | None) -> str:
    """A figure to two significant digits; '–' where there is none."""
    if value is None:
        return "–"
    return "not finite" if not math.isfinite(value) else "0" if value == 0 else f"{value:.2g}"


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 999.5 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    minutes, rest = divmod(round(seconds), 60)
    return f"{rest + 60 * minutes} s" if seconds < 90 else f"{minutes} min {rest:02} s"


def counted(count: int, noun: str) -> str:
    """'1 image', '5,000 images'."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def finite(value: Any) -> Any:
    """The same with every figure that is not finite replaced by None, which JSON can say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value
