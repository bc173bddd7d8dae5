"""What `bench` measured, drawn: memory against depth (the paper's memory figure), error against memory against time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plot_gradients import pyplot, save

if TYPE_CHECKING:
    from ..bench.results import BenchReport, BenchRow

EXACT = 1e-8  # an error of 0 has no place on a logarithmic axis
MARKERS = "osD^vP*X<>"
AREA_OF_BACKPROP = 60.0  # points²


def plot_bench(report: BenchReport, path: Path) -> None:
    """Left: peak memory against depth. Right: error against peak memory at the largest depth, area by time."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    methods = list(dict.fromkeys(row.method for row in report.rows))
    styles = {method: (f"C{i % 10}", MARKERS[i % len(MARKERS)]) for i, method in enumerate(methods)}
    _memory(left, [row for row in report.rows if row.peak_bytes is not None], styles)
    depth = max(row.depth for row in report.rows)
    _frontier(right, [row for row in report.rows if row.depth == depth and row.peak_bytes is not None], styles)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(methods), 6), fontsize=9)
    figure.suptitle(
        f"{report.what}\nbatch {report.batch_size}, BatchNorm {report.batch_norm}, {report.device}", fontsize=10
    )
    save(plt, figure, path)


def _memory(axes: Any, rows: Sequence[BenchRow], styles: dict[str, tuple[str, str]]) -> None:
    for method, (colour, marker) in styles.items():
        own = sorted((row.depth, _mebibytes(row)) for row in rows if row.method == method)
        if own:
            axes.loglog(*zip(*own, strict=True), marker=marker, color=colour, label=method)
    depths = sorted({row.depth for row in rows})
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.xaxis.set_minor_locator(_matplotlib().ticker.NullLocator())
    if len(depths) == 1:
        axes.set_xlim(depths[0] / 2, depths[0] * 2)
    _plain(axes.yaxis)
    axes.set_xlabel("steps N")
    axes.set_ylabel("peak memory of a step, MiB")
    axes.set_title("memory against depth", fontsize=10)
    axes.grid(alpha=0.3)


def _frontier(axes: Any, rows: Sequence[BenchRow], styles: dict[str, tuple[str, str]]) -> None:
    for i, row in enumerate(sorted(rows, key=_mebibytes)):
        x, y = _mebibytes(row), max(row.relative_error or 0.0, EXACT)
        colour, marker = styles[row.method]
        ratio = row.ratio_to_backprop
        area = AREA_OF_BACKPROP * (1.0 if ratio is None else ratio)
        edge, alpha = ("black", 1.0) if row.frontier else ("none", 0.45)
        axes.scatter(x, y, s=area, color=colour, marker=marker, alpha=alpha, edgecolor=edge, linewidth=1.3)
        away = 4 + math.sqrt(area) / 2
        axes.annotate(
            "–" if ratio is None else f"{ratio:.2f}×",
            (x, y),
            textcoords="offset points",
            xytext=(0, away if i % 2 else -away),  # neighbours in memory often have the same error
            ha="center",
            va="bottom" if i % 2 else "top",
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(EXACT / 10, max(10 * max((row.relative_error or 0.0 for row in rows), default=1.0), 1e-2))
    axes.margins(x=0.12)
    _plain(axes.xaxis)
    axes.set_xlabel("peak memory of a step, MiB")
    axes.set_ylabel(f"relative gradient error (0 is drawn at {EXACT:.0e})")
    depth = f" at {rows[0].depth} steps" if rows else ""
    axes.set_title(
        f"error against memory{depth}\nlabel and area: time against backprop's; outlined: frontier", fontsize=10
    )
    axes.grid(alpha=0.3)


def _plain(axis: Any) -> None:
    """Memory is read in plain numbers, and often spans less than a power of ten."""
    ticker = _matplotlib().ticker
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def _matplotlib() -> Any:
    import matplotlib.ticker

    return matplotlib


def _mebibytes(row: BenchRow) -> float:
    assert row.peak_bytes is not None
    return max(row.peak_bytes, 1) / 2**20
