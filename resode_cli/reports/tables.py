"""Tables that are as wide as the terminal is, and never cut a cell short."""

from __future__ import annotations

import copy

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text


class FittingTable(Table):
    """A table that never cuts a cell short, however narrow the terminal is.

    It stands as it is where there is room; else without the spaces around its columns, and with cells wrapped
    between words, not within them; else row by row, one line per cell: "header: value".
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        for close in (False, True):
            table = self._fitted(width, close=close)
            if table is not None:
                yield from Table.__rich_console__(table, console, options)
                return
        yield from self._stacked()

    def _fitted(self, width: int, *, close: bool) -> Table | None:
        """The table within a width; None if some word would have to be broken."""
        table = copy.copy(self)
        # One space remains between columns: the separator of the box.
        table.padding = (0, 0) if close else self.padding
        table.columns = [copy.copy(column) for column in self.columns]
        around = table._extra_width + sum(table._get_padding_width(i) for i in range(len(table.columns)))
        natural = [_widest(column, split=False) for column in table.columns]
        least = [_widest(column, split=not column.no_wrap) for column in table.columns]
        room = width - around
        if sum(natural) > room and not (close and sum(least) <= room):
            return None
        for column, own in zip(table.columns, _shared(natural, least, room), strict=True):
            column.width, column.no_wrap = own, False
        return table

    def _stacked(self) -> RenderResult:
        if self.title:
            yield Text(str(self.title), style="table.title")
        headers = [" ".join(str(column.header).split()) for column in self.columns]
        for cells in zip(*(column.cells for column in self.columns), strict=True):
            yield Text()
            for header, cell in zip(headers, list(cells), strict=True):
                if str(cell).strip():
                    yield Text(f"{header}: {cell}" if header else str(cell))
        if self.caption:
            yield Text()
            yield Text(str(self.caption), style="table.caption")


def _widest(column: Column, *, split: bool) -> int:
    """Of a column's lines, or of its words."""
    texts = [str(cell) for cell in (column.header, *column.cells)]
    return max((cell_len(part) for text in texts for part in (text.split() if split else text.splitlines())), default=1)


def _shared(natural: list[int], least: list[int], room: int) -> list[int]:
    """Widths that add up to the room at most: columns get what they ask for, the widest of them less."""
    widths = list(natural)
    while sum(widths) > room:
        widest = max((i for i in range(len(widths)) if widths[i] > least[i]), key=lambda i: widths[i])
        widths[widest] -= 1
    return widths


def plain_table(title: str, caption: str | None = None) -> Table:
    return FittingTable(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
    )
