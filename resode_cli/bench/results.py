"""What a benchmark found, and which rows of it no other beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Two rows are equal in error if both are float32 rounding, in time and memory if within 3 %.
FLOAT32_ROUNDING = 1e-5
NOISE = 1.03


@dataclass(frozen=True)
class BenchRow:
    """One method at one depth. Seconds are of a forward and backward pass; None where it did not run.

    depth: steps of the deepest stage.
    seconds: the median. ratio_to_backprop: the median of the ratios, each within one round.
    peak_bytes: how much memory grows at most during the step: allocated on a GPU; on a CPU resident, in a
        fresh process. peak_allocated: on a GPU, all that was allocated then.
    bytes_kept: what the whole graph keeps between the passes, parameters aside.
    evaluations_per_step: of the increment Φ in the backward pass, the taped one included; 0 for backprop.
    relative_error: ‖g − ĝ‖ / ‖g‖ of all parameters' gradients as one vector, against `error_against`:
        backprop, or where that ran out of memory torch checkpoint, which is as exact.
    largest_batch: images that fit on the GPU, to within 2 %, if asked for.
    leaves_as_backprop: whether buffers and the random generator stand after the step as after backprop's.
    status: 'ok', 'out of memory', or why it cannot be had. frontier: see `on_frontier`.
    """

    method: str
    depth: int
    status: str = "ok"
    seconds: float | None = None
    ratio_to_backprop: float | None = None
    images_per_second: float | None = None
    peak_bytes: int | None = None
    peak_allocated: int | None = None
    bytes_kept: int | None = None
    evaluations_per_step: float | None = None
    relative_error: float | None = None
    error_against: str | None = None
    leaves_as_backprop: bool | None = None
    largest_batch: int | None = None
    images_per_second_at_largest: float | None = None
    frontier: bool = False


@dataclass(frozen=True)
class BenchReport:
    """Every method at every depth, and what they ran on."""

    what: str
    device: str
    device_name: str
    torch: str
    threads: int
    dtype: str
    amp: str
    batch_size: int
    batch_norm: str
    channels_last: bool
    compiled: bool
    repeats: int
    seed: int
    rows: tuple[BenchRow, ...]


def on_frontier(rows: Sequence[BenchRow]) -> set[int]:
    """Places of the rows that no other of the same depth beats: as good in error, memory and time, better in one.

    Errors of rounding are equal, and so are seconds or bytes within 3 % of each other.
    """
    figures = {i: _judged(row) for i, row in enumerate(rows)}
    return {
        i
        for i, own in figures.items()
        if own is not None
        and not any(
            other is not None and rows[k].depth == rows[i].depth and _beats(other, own) for k, other in figures.items()
        )
    }


def _judged(row: BenchRow) -> tuple[float, float, float] | None:
    if row.status != "ok" or row.seconds is None or row.peak_bytes is None:
        return None
    error = row.relative_error
    if error is None or not math.isfinite(error):
        error = math.inf
    return 0.0 if error < FLOAT32_ROUNDING else error, float(row.peak_bytes), row.seconds


def _beats(other: tuple[float, float, float], own: tuple[float, float, float]) -> bool:
    tolerance = (1.0, NOISE, NOISE)
    as_good = all(a <= b * t for a, b, t in zip(other, own, tolerance, strict=True))
    better = any(a * t < b for a, b, t in zip(other, own, tolerance, strict=True))
    return as_good and better
