"""`resode list [PATTERN]`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from ..errors import first_few
from ..quantities import counted
from ..reports.tables import plain_table
from ..sources import catalog
from .options import JsonOption
from .output import Output


def list_command(
    pattern: Annotated[
        str,
        typer.Argument(help="Of sources, names or families: 'resnet50*', 'timm:*', 'regnet'. A word: what begins so."),
    ] = "*",
    refused: Annotated[
        bool, typer.Option("--refused", help="Those that cannot be converted instead, and why.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """List the architectures that can be converted."""
    output = Output(json_mode=json)
    made_with = ", ".join(f"{library} {version}" for library, version in catalog.versions().items())
    if refused:
        refusals = catalog.refusals(pattern)
        table = plain_table(f"not convertible, of {made_with}")
        for column in ("source", "family", "reason"):
            table.add_column(column, no_wrap=column != "reason")
        for refusal in refusals:
            table.add_row(refusal.source, refusal.family, refusal.reason)
        output.show(table)
        output.show(counted(len(refusals), "architecture"))
        output.json([asdict(refusal) for refusal in refusals])
        return
    rows = catalog.rows(pattern)
    table = plain_table(f"convertible, of {made_with}")
    table.add_column("source", no_wrap=True)
    table.add_column("family", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("steps of each stage")
    table.add_column("pretrained tags")
    for row in rows:
        shown = row.tags if len(rows) == 1 else [first_few(row.tags, 2)]
        table.add_row(
            row.source, row.family, f"{row.parameters / 1e6:.1f} M", " ".join(map(str, row.steps)), ", ".join(shown)
        )
    output.show(table)
    tags = sum(len(row.tags) for row in rows)
    output.show(f"{counted(len(rows), 'architecture')}, {counted(tags, 'pretrained tag')}")
    output.json([asdict(row) for row in rows])
