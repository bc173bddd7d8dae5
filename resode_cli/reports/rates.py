"""A learning-rate range test, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from .tables import plain_table

if TYPE_CHECKING:
    from ..training.find_lr import FoundRates

ROWS, BAR = 16, 30  # rows of the table at most, and columns of its longest bar


def rates_table(found: FoundRates) -> Table:
    """The smoothed loss at evenly spaced points of the curve, the two that were read off among them, with bars."""
    points = found.curve
    apart = max(-(-len(points) // ROWS), 1)
    named = {found.steepest: "falls fastest", found.lowest: "lowest"}
    chosen = [p for place, p in enumerate(points) if place % apart == 0 or p.lr in named]
    most = 1.1 * max(point.smoothed for point in points if found.lowest is None or point.lr <= found.lowest)
    table = plain_table("learning-rate range test: the loss of each step's batch, smoothed")
    for column in ("learning rate", "loss"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("")
    for point in chosen:
        bar = "█" * min(round(BAR * point.smoothed / most), BAR) if most > 0 else ""
        table.add_row(f"{point.lr:.2g}", f"{point.smoothed:.4g}", bar, named.get(point.lr, ""))
    return table


def rates_line(found: FoundRates, lr: float) -> str:
    """What the curve suggests, and by which rule. lr: the run's."""
    if found.steepest is None or found.lowest is None:
        return "no suggestion: the loss fell at no rate by more than it varies from batch to batch"
    return (
        f"suggested: --lr {found.steepest:.2g}, where the smoothed loss falls fastest (the run's is {lr:.2g}); it is"
        f" lowest at {found.lowest:.2g}, of which a tenth is {found.lowest / 10:.2g}"
    )
