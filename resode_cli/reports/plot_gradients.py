"""Plots, drawn with matplotlib, which is the optional extra `plot`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ResodeError, UsageError
from ..machine.atomic import atomic_path

if TYPE_CHECKING:
    from ..gradients.gradient_errors import GradientReport, SweepRow

SUFFIXES = (".png", ".pdf", ".svg")


def check_plot(path: Path) -> None:
    """Refuse, before any work is done, a plot that cannot be drawn."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--plot {str(path)!r}: must end in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UsageError(f"folder {str(path.parent)!r} of the plot does not exist")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"--plot {str(path)!r}: cannot be written")
    pyplot()


def pyplot() -> Any:
    """matplotlib, drawing to files only."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ResodeError("--plot needs matplotlib: pip install 'resode[plot]'") from error
    return plt


def plot_errors(report: GradientReport, path: Path) -> None:
    """Relative gradient error of every method and stage, as bars on a logarithmic axis."""
    plt = pyplot()
    methods = [m for m in report.methods if m.name != "backprop"]
    if not methods:
        raise UsageError("--plot has nothing to draw: backprop is the reference")
    stages = [s.stage for s in methods[0].stages]
    figure, axes = plt.subplots(figsize=(1.6 + 1.1 * len(stages), 3.6), layout="constrained")
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        places = [k + (i - (len(methods) - 1) / 2) * width for k in range(len(stages))]
        # An exact gradient has no place on a logarithmic axis: float32 rounding stands in for it.
        heights = [max(s.relative_error, 1e-8) for s in method.stages]
        axes.bar(places, heights, width, label=method.name)
    axes.set_yscale("log")
    axes.set_xticks(range(len(stages)), stages)
    axes.set_ylabel("relative gradient error")
    axes.set_title(f"against backprop, {report.images} images", fontsize=10)
    axes.legend(fontsize=8)
    save(plt, figure, path)


def plot_sweep(rows: Sequence[SweepRow], path: Path) -> None:
    """Relative gradient error against depth, log-log, one panel per stage (the paper's figure 3c)."""
    plt = pyplot()
    rows = [row for row in rows if max(row.errors) > 0]  # an exact method has no place on a logarithmic axis
    if not rows:
        raise UsageError("--plot has nothing to draw: every method asked for is exact")
    stages = list(dict.fromkeys(row.stage for row in rows))
    size = (1 + 3 * len(stages), 3.2)
    figure, panels = plt.subplots(1, len(stages), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes, stage in zip(panels[0], stages, strict=True):
        for row in (r for r in rows if r.stage == stage):
            slope = "" if row.slope is None else f" (slope {row.slope:.1f})"
            axes.loglog(row.depths, row.errors, "o-", label=f"{row.method}{slope}")
        axes.set_xticks(row.depths, [str(depth) for depth in row.depths])
        axes.minorticks_off()
        axes.set_title(stage)
        axes.set_xlabel("steps N")
        axes.legend(fontsize=7)
    panels[0][0].set_ylabel("relative gradient error")
    save(plt, figure, path)


def save(plt: Any, figure: Any, path: Path) -> None:
    """Write a figure, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)
    plt.close(figure)
