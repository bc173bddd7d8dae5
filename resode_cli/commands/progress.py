"""Progress on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..quantities import number, size

if TYPE_CHECKING:
    from ..fitting.results import FitStep
    from ..training.run_log import StepRecord
    from .output import Output

LINE_EVERY = 20  # steps, where there is no terminal to draw a bar on
BAR = 10  # columns
TIMES = 16  # columns of the time elapsed and the time left: h:mm:ss


def in_width(console: Console, description: str, total: int, figures: Sequence[str]) -> str:
    """As many of the figures, the most important first, as a line has room for beside the bar.

    Where there is no terminal a line is as long as it is.
    """
    if not console.is_terminal:
        return " ".join(figures)
    taken = sum(part + 1 for part in (cell_len(description), BAR, len(f"{total}/{total}"))) + TIMES
    shown = ""
    for figure in figures:
        longer = f"{shown} {figure}" if shown else figure
        if cell_len(longer) > console.width - taken - 1:
            break
        shown = longer
    return shown


@contextmanager
def counting(output: Output, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` things; yields the function that says how many are done."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    quiet = not output.aside.is_terminal
    with Progress(*columns, console=output.aside, transient=True, disable=quiet) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


@contextmanager
def training(output: Output, total: int, done: int) -> Iterator[Callable[[StepRecord], None]]:
    """A bar over training steps with loss, accuracy, speed, peak memory and what the monitor says.

    drift: each stage's; correction and contraction: the largest of all stages. See `ode.Monitor`.
    """
    quiet = not output.aside.is_terminal
    progress = Progress(
        TextColumn("epoch {task.fields[epoch]}", markup=False),
        BarColumn(bar_width=BAR),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=output.aside,
        disable=quiet,
    )
    smooth: dict[str, float] = {}

    def show(record: StepRecord) -> None:
        for name, value in (("loss", record.loss), ("accuracy", record.accuracy)):
            smooth[name] = value if name not in smooth else 0.9 * smooth[name] + 0.1 * value
        parts = [
            f"loss {smooth['loss']:.3f}",
            f"acc {smooth['accuracy']:.1%}",
            f"{record.images_per_second:.0f} img/s",
            f"peak {size(record.peak_bytes)}",
        ]
        if any(record.monitor["drift"].values()):
            parts.append("drift " + "/".join(map(number, record.monitor["drift"].values())))
        for name in ("correction", "contraction"):
            if values := [value for value in record.monitor[name].values() if value]:
                parts.append(f"{name} {number(max(values))}")
        figures = in_width(output.aside, f"epoch {record.epoch}", total, parts)
        progress.update(task, completed=record.step, epoch=record.epoch, figures=figures)
        if quiet and (record.step % LINE_EVERY == 0 or record.step == total):
            output.note(f"step {record.step}/{total} epoch {record.epoch} {figures}")

    with progress:
        task = progress.add_task("", total=total, completed=done, epoch="–", figures="")
        yield show


@contextmanager
def fitting(output: Output) -> Iterator[Callable[[FitStep], None]]:
    """A bar over the training steps of each round of a fit: agreement before it, loss, and each stage's state error."""
    quiet = not output.aside.is_terminal
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=BAR),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=output.aside,
        disable=quiet,
        transient=True,
    )
    tasks: dict[str, TaskID] = {}

    def show(step: FitStep) -> None:
        name = step.phase if step.round == 1 else f"{step.phase} {step.round}"
        parts = [f"agreement so far {step.agreement:.1%}", f"loss {step.loss:.4f}"]
        if step.errors:
            worst = " ".join(f"{sum(e) / len(e):.3f}/{e[-1]:.3f}" for e in step.errors.values())
            parts.append(f"state error (mean/last) {worst}")
        figures = in_width(output.aside, name, step.total, parts)
        if name not in tasks:
            tasks[name] = progress.add_task(name, total=step.total, figures="")
        progress.update(tasks[name], completed=step.step, figures=figures)
        if quiet and (step.step % LINE_EVERY == 0 or step.step == step.total):
            output.note(f"{name} {step.step}/{step.total} {figures}")

    with progress:
        yield show
