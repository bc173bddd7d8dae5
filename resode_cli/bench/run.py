"""Time, memory, evaluations and gradient error of the ways to run a network's steps, all in one run."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import ResodeError, UsageError
from ..files import model_file
from ..ode import Adjoint
from .workload import BACKPROP, BASELINES, Method, Trial, Workload, check_depth, method_record

# Two rows are equal in error if both are float32 rounding, in time and memory if within 3 %.
FLOAT32_ROUNDING = 1e-5
NOISE = 1.03
LARGEST_TRIED = 2**16  # images
TIMED_AT_LARGEST = 3  # steps

Result = TypeVar("Result")


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
    status: 'ok' or 'out of memory'. frontier: see `on_frontier`.
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


@dataclass
class _Figures:
    """What was measured of a method so far."""

    seconds: list[float] = field(default_factory=list)
    values: dict[str, int | float | str | None] = field(default_factory=dict)


def bench(
    workload: Workload,
    methods: Sequence[Method],
    *,
    depths: Sequence[int] | None,
    repeats: int = 5,
    find_largest_batch: bool = False,
    on_progress: Callable[[str], None] = lambda what: None,
) -> BenchReport:
    """Measure plain backprop, torch.utils.checkpoint and `methods` at every depth.

    depths: a model's stages are deepened to by replication; None: a model as it is.
    Timed steps go round-robin over the methods, so that a drift of the machine's speed cancels.
    Raises UsageError, before anything is measured, for a method or depth that does not suit the network.
    """
    if repeats < 1:
        raise UsageError(f"--repeats {repeats}: must be 1 or more")
    device = torch.device(workload.device)
    if find_largest_batch and device.type != "cuda":
        raise UsageError(f"--largest-batch needs a GPU: on {device.type} memory does not run out, it gets slow")
    chosen = (*BASELINES, *(m for m in methods if m != BACKPROP))
    what = _check(workload, chosen, depths)
    rows: list[BenchRow] = []
    for depth in depths or (None,):
        trial = Trial(workload, depth)
        rows += _measure(trial, chosen, depth, repeats, find_largest_batch, on_progress)
    kept = on_frontier(rows)
    return BenchReport(
        what=what,
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        dtype="float32",
        amp=workload.amp,
        batch_size=workload.batch_size,
        batch_norm=workload.bn,
        channels_last=workload.channels_last,
        compiled=workload.compiled,
        repeats=repeats,
        seed=workload.seed,
        rows=tuple(replace(row, frontier=i in kept) for i, row in enumerate(rows)),
    )


def _check(workload: Workload, methods: Sequence[Method], depths: Sequence[int] | None) -> str:
    """What the workload is, in words. Raises UsageError for what could only fail later."""
    if workload.shape is not None:
        if not depths:
            raise UsageError("--stage-shape needs --depths")
        what, schemes = str(workload.shape), {workload.shape.scheme}
    else:
        assert workload.model is not None
        model = model_file.load(workload.model, source=workload.source, trust_source=workload.trust_source)
        for depth in depths or ():
            check_depth(model, depth)
        own = model.info.preprocessing
        images = replace(own, size=workload.input_size or own.size)
        what = f"{os.path.basename(workload.model)} ({model.info.source}), {images.size_text}"
        schemes = {stage.spec.scheme for stage in model.stages.values()}
    for method in methods:
        if isinstance(method, Adjoint):
            for scheme in schemes:
                method.plan(1, scheme)
    if any(depth < 1 for depth in depths or ()):
        raise UsageError(f"--depths {min(depths or ())}: must be 1 or more")
    return what


def _measure(
    trial: Trial,
    methods: Sequence[Method],
    depth: int | None,
    repeats: int,
    find_largest_batch: bool,
    on_progress: Callable[[str], None],
) -> list[BenchRow]:
    where = f"at {trial.depth} steps"
    figures = {method: _Figures() for method in methods}
    reference: tuple[str, list[Tensor | None]] | None = None
    for method in methods:
        on_progress(f"gradients of {method.label} {where}")
        counted = _unless_out_of_memory(trial, method, trial.counted_step)
        if counted is None:
            del figures[method]
            continue
        gradients, kept, evaluations = counted
        if reference is None and method in BASELINES:
            reference = (method.label, gradients)
        values = figures[method].values
        values |= {"bytes_kept": kept, "evaluations_per_step": evaluations}
        if reference is not None:
            values |= {"relative_error": _difference(reference[1], gradients), "error_against": reference[0]}
        del gradients, counted
    del reference
    for turn in range(repeats):
        order = list(figures)
        order = order[turn % len(order) :] + order[: turn % len(order)] if order else []
        for method in order:
            on_progress(f"step {turn + 1} of {repeats} of {method.label} {where}")
            seconds = _unless_out_of_memory(trial, method, lambda: _seconds(trial))
            if seconds is None:
                del figures[method]
            else:
                figures[method].seconds.append(seconds)
    for method in list(figures):
        on_progress(f"peak memory of {method.label} {where}")
        if trial.device.type == "cuda":
            peaks = _unless_out_of_memory(trial, method, lambda: _allocated(trial))
            if peaks is None:
                del figures[method]
                continue
            figures[method].values |= {"peak_bytes": peaks[0], "peak_allocated": peaks[1]}
        else:
            figures[method].values["peak_bytes"] = fresh_process_growth(trial.workload, method, depth)
    rows = [_row(trial, method, figures.get(method), figures.get(BACKPROP)) for method in methods]
    if not find_largest_batch:
        return rows
    searched = []
    for method, row in zip(methods, rows, strict=True):
        on_progress(f"largest batch of {method.label} {where}")
        largest, speed = _largest_batch(trial, method)
        searched.append(replace(row, largest_batch=largest, images_per_second_at_largest=speed))
    return searched


def _row(trial: Trial, method: Method, figures: _Figures | None, backprop: _Figures | None) -> BenchRow:
    if figures is None:
        return BenchRow(method.label, trial.depth, "out of memory")
    seconds = statistics.median(figures.seconds)
    ratio = None
    if backprop is not None:
        ratio = statistics.median(a / b for a, b in zip(figures.seconds, backprop.seconds, strict=True))
    return BenchRow(
        method.label,
        trial.depth,
        seconds=seconds,
        ratio_to_backprop=ratio,
        images_per_second=trial.workload.batch_size / seconds,
        **figures.values,  # type: ignore[arg-type]
    )


def _unless_out_of_memory(trial: Trial, method: Method, measure: Callable[[], Result]) -> Result | None:
    """The measurement by a method, or None where it does not fit on the GPU."""
    try:
        trial.use(method)
        return measure()
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        trial.clear()


def _seconds(trial: Trial) -> float:
    trial.clear()
    trial.wait()
    start = time.perf_counter()
    trial.step()
    return time.perf_counter() - start


def _allocated(trial: Trial) -> tuple[int, int]:
    """Growth and absolute size of the largest memory allocated on the GPU during a step."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(trial.device)
    before = torch.cuda.memory_allocated(trial.device)
    trial.step()
    peak = torch.cuda.max_memory_allocated(trial.device)
    return peak - before, peak


def _difference(reference: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> float:
    """‖g − ĝ‖ / ‖g‖ of all gradients as one vector, in float64; a missing gradient is zero."""
    error = norm = 0.0
    for g, h in zip(reference, gradients, strict=True):
        present = g if g is not None else h
        if present is None:
            continue
        zero = torch.zeros_like(present)
        exact, other = (zero if t is None else t for t in (g, h))
        error += (exact.double() - other.double()).square().sum().item()
        norm += exact.double().square().sum().item()
    if norm == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return math.sqrt(error / norm)


def fresh_process_growth(workload: Workload, method: Method, depth: int | None) -> int:
    """Bytes by which a fresh process grows during a step. Raises ResodeError, in one line, if it fails."""
    job = {
        "workload": workload.record(),
        "method": method_record(method),
        "depth": depth,
        "threads": torch.get_num_threads(),
    }
    # glibc keeps freed memory for the next allocation, and how much depends on the order of earlier
    # ones. With these, tensors are mapped one by one and go back to the system when freed, so that the
    # resident size is what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", f"{__package__}.worker"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=environment, check=False)
    name = f"the process measuring {method.label}"
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError:
        lines = done.stderr.strip().splitlines()
        why = lines[-1] if lines else "out of memory?" if done.returncode == -9 else "it said nothing"
        raise ResodeError(f"{name} ended with code {done.returncode}: {why}") from None
    if "error" in answer:
        raise ResodeError(f"{name} failed: {answer['error']}")
    return int(answer["growth"])


def _largest_batch(trial: Trial, method: Method) -> tuple[int, float | None]:
    """The largest batch that fits on the GPU, and images per second with it; (0, None) if not one image does."""

    def fits(images: int) -> bool:
        torch.cuda.empty_cache()
        try:
            trial.load_batch(images)
            trial.step()
        except RuntimeError:
            # OutOfMemoryError is one of these; cuDNN says it in other words, and also refuses tensors of
            # more than 2^31 elements. The same step has run with fewer images.
            return False
        finally:
            trial.clear()
        return True

    trial.use(method)
    largest = 0
    try:
        largest = largest_fitting(fits, trial.workload.batch_size)
        if not largest:
            return 0, None
        torch.cuda.empty_cache()
        trial.load_batch(largest)
        return largest, largest / statistics.median(_seconds(trial) for _ in range(TIMED_AT_LARGEST))
    except torch.cuda.OutOfMemoryError:
        return largest, None  # it fitted once, and no more beside what the allocator has since cut up
    finally:
        trial.clear()
        torch.cuda.empty_cache()
        trial.load_batch(trial.workload.batch_size)


def largest_fitting(fits: Callable[[int], bool], start: int) -> int:
    """The largest number that fits, to within 2 %: doubling from `start`, then bisection. 0 if 1 does not."""
    low, high = 0, start
    while high <= LARGEST_TRIED and fits(high):
        low, high = high, 2 * high
    if high > LARGEST_TRIED:
        return low
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


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
