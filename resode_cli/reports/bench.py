"""What `bench` measured, for people (a rich table) and for programs (JSON-ready dictionaries, CSV)."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..bench.results import BenchRow
from ..quantities import finite, number, size
from .tables import plain_table

if TYPE_CHECKING:
    from ..bench.results import BenchReport
    from ..bench.simulated import SimulatedReport


OTHERWISE = (
    "\n† buffers (BatchNorm's statistics) or the random generator stand otherwise after the step than by backprop"
)


def bench_title(report: BenchReport) -> str:
    """What was measured, on what: two lines."""
    extras = ["channels last"] * report.channels_last + ["compiled"] * report.compiled
    dtype = report.dtype if report.amp == "none" else f"{report.dtype} state, {report.amp} branches"
    return (
        f"{report.what}, batch {report.batch_size}, BatchNorm {report.batch_norm}\n"
        + ", ".join([f"{report.device} ({report.device_name})", f"{report.threads} threads", f"torch {report.torch}"])
        + "".join(f", {extra}" for extra in (dtype, *extras))
    )


def bench_table(report: BenchReport) -> Table:
    table = plain_table(
        bench_title(report),
        "* on the frontier: no row of its depth is as good in error, peak memory and time, and better in one"
        + OTHERWISE * any(row.leaves_as_backprop is False for row in report.rows),
    )
    searched = any(row.largest_batch is not None for row in report.rows)
    table.add_column("", no_wrap=True)
    table.add_column("method")
    columns = ["steps", "seconds", "against\nbackprop", "images/s", "peak\nmemory", "kept by\ngraph"]
    columns += ["evals\nper step", "relative\nerror"]
    columns += ["largest\nbatch", "images/s\nthen"] if searched else []
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    depth = None
    for row in report.rows:
        if depth is not None and row.depth != depth:
            table.add_section()
        depth = row.depth
        cells = [
            "–" if row.seconds is None else f"{row.seconds:.3g}",
            "–" if row.ratio_to_backprop is None else f"{row.ratio_to_backprop:.2f}×",
            "–" if row.images_per_second is None else f"{row.images_per_second:.3g}",
            "–" if row.peak_bytes is None else size(row.peak_bytes),
            "–" if row.bytes_kept is None else size(row.bytes_kept),
            "–" if row.evaluations_per_step is None else f"{row.evaluations_per_step:.2f}",
            number(row.relative_error) + "†" * (row.leaves_as_backprop is False),
        ]
        if searched:
            speed = row.images_per_second_at_largest
            cells += [str(row.largest_batch), "–" if speed is None else f"{speed:.3g}"]
        name = row.method if row.status == "ok" else f"{row.method}: {row.status}"
        table.add_row("*" if row.frontier else "", name, str(row.depth), *cells)
    return table


def simulated_table(report: SimulatedReport) -> Table:
    """What methods would hold; the caption says what that is."""
    layout = ", channels last" * report.channels_last
    amp = "float32" if report.amp == "none" else f"float32 state, {report.amp} branches"
    table = plain_table(
        f"{report.what}, batch {report.batch_size}, BatchNorm {report.batch_norm}\n"
        f"simulated on {report.device}, {amp}{layout}: nothing was run",
        "peak: all tensors alive at a time, weights and gradients included, without what an optimizer keeps and what"
        " libraries take for themselves; time: by the roofline model",
    )
    table.add_column("method")
    for column in ("steps", "peak", "growth\nin a step", "kept between\nthe passes", "time against\nbackprop"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(
            row.method, str(row.depth), size(row.peak_bytes), size(row.growth), size(row.bytes_kept), f"{row.time:.2f}×"
        )
    return table


def bench_rows(report: BenchReport) -> list[dict[str, Any]]:
    """One dictionary per row; a figure that is not finite is None."""
    return [finite(asdict(row)) for row in report.rows]


def bench_json(report: BenchReport) -> dict[str, Any]:
    return finite({**asdict(report), "rows": bench_rows(report)})


def bench_csv(report: BenchReport) -> str:
    """The rows of the JSON document as a table with a header; an empty field is no figure."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(BenchRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(bench_rows(report))
    return text.getvalue()
