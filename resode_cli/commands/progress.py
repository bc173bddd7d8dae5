"""Progress bars, on standard error; silent where that is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..report import number, size

if TYPE_CHECKING:
    from ..finetune import StepRecord
    from .output import Output


@contextmanager
def counting(output: Output, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` things; yields the function that says how many are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=output.aside, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


@contextmanager
def training(output: Output, total: int, done: int) -> Iterator[Callable[[StepRecord], None]]:
    """A bar over training steps with loss, accuracy, speed, peak memory and drift."""
    progress = Progress(
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=output.aside,
    )
    smooth: dict[str, float] = {}

    def show(record: StepRecord) -> None:
        for name, value in (("loss", record.loss), ("accuracy", record.accuracy)):
            smooth[name] = value if name not in smooth else 0.9 * smooth[name] + 0.1 * value
        drift = "/".join(number(None if d != d else d) for d in record.drift.values())
        figures = (
            f"loss {smooth['loss']:.3f} acc {smooth['accuracy']:.1%} {record.images_per_second:.0f} img/s"
            f" peak {size(record.peak_bytes)} drift {drift}"
        )
        progress.update(task, completed=record.step, epoch=record.epoch, figures=figures)

    with progress:
        task = progress.add_task("", total=total, completed=done, epoch="–", figures="")
        yield show
