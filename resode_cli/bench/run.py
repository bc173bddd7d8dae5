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
from .results import BenchReport, BenchRow, on_frontier
from .rivals import RIVALS, NotAvailable, Rival, RivalTrial
from .workload import BACKPROP, BASELINES, Counted, Trial, Workload, check_depth, method_record
from .workload import Method as OwnMethod

LARGEST_TRIED = 2**16  # images
TIMED_AT_LARGEST = 3  # steps

Method = OwnMethod | Rival
Result = TypeVar("Result")


@dataclass
class _Figures:
    """What was measured of a method so far."""

    seconds: list[float] = field(default_factory=list)
    values: dict[str, int | float | str | bool | None] = field(default_factory=dict)


def bench(
    workload: Workload,
    methods: Sequence[Method],
    *,
    depths: Sequence[int] | None,
    repeats: int = 5,
    find_largest_batch: bool = False,
    rivals: bool = False,
    on_progress: Callable[[str], None] = lambda what: None,
) -> BenchReport:
    """Measure plain backprop, torch.utils.checkpoint and `methods` at every depth.

    rivals: also what people do instead to the source network, unconverted; for a model at its own depth.
    depths: a model's stages are deepened to by replication; None: a model as it is.
    Timed steps go round-robin over the methods, so that a drift of the machine's speed cancels.
    Raises UsageError, before anything is measured, for a method or depth that does not suit the network.
    """
    if repeats < 1:
        raise UsageError(f"--repeats {repeats}: must be 1 or more")
    device = torch.device(workload.device)
    if find_largest_batch and device.type != "cuda":
        raise UsageError(f"--largest-batch needs a GPU: on {device.type} memory does not run out, it gets slow")
    if rivals and (workload.shape is not None or depths):
        raise UsageError("--rivals goes with a model file at its own depth: they train the source network as it is")
    chosen: tuple[Method, ...] = (*BASELINES, *(m for m in methods if m != BACKPROP), *(RIVALS if rivals else ()))
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
    trials: dict[Method, Trial] = {}
    missing: dict[Method, str] = {}

    def attempt(method: Method, measure: Callable[[Trial], Result]) -> Result | None:
        """The measurement by a method; None, and no more of them, where it does not fit on the GPU."""
        try:
            own = trials[method]
            own.use(method)  # type: ignore[arg-type]
            return measure(own)
        except torch.cuda.OutOfMemoryError:
            missing[method] = "out of memory"
            figures.pop(method, None)
            return None
        finally:
            trials[method].clear()

    reference: tuple[str, Counted] | None = None
    for method in methods:
        on_progress(f"gradients of {method.label} {where}")
        try:
            trials[method] = RivalTrial(trial.workload, method) if isinstance(method, Rival) else trial
        except NotAvailable as reason:
            missing[method] = str(reason)
            del figures[method]
            continue
        counted = attempt(method, lambda own: own.counted_step())
        if counted is None:
            continue
        if reference is None and method in BASELINES:
            reference = (method.label, counted)
        values = figures[method].values
        values |= {"bytes_kept": counted.kept, "evaluations_per_step": counted.evaluations}
        if reference is not None:
            error = _difference(reference[1].gradients, counted.gradients)
            values |= {"relative_error": error, "error_against": reference[0]}
            values["leaves_as_backprop"] = counted.leaves_as(reference[1])
        del counted
    del reference
    for turn in range(repeats):
        order = list(figures)
        order = order[turn % len(order) :] + order[: turn % len(order)] if order else []
        for method in order:
            on_progress(f"step {turn + 1} of {repeats} of {method.label} {where}")
            seconds = attempt(method, _seconds)
            if seconds is not None:
                figures[method].seconds.append(seconds)
    for method in list(figures):
        on_progress(f"peak memory of {method.label} {where}")
        if trial.device.type == "cuda":
            peaks = attempt(method, _allocated)
            if peaks is not None:
                figures[method].values |= {"peak_bytes": peaks[0], "peak_allocated": peaks[1]}
        else:
            figures[method].values["peak_bytes"] = fresh_process_growth(trial.workload, method, depth)
    rows = [_row(trial, method, figures.get(method), figures.get(BACKPROP), missing.get(method)) for method in methods]
    if not find_largest_batch:
        return rows
    searched = []
    for method, row in zip(methods, rows, strict=True):
        if method in trials:
            on_progress(f"largest batch of {method.label} {where}")
            largest, speed = _largest_batch(trials[method], method)
            row = replace(row, largest_batch=largest, images_per_second_at_largest=speed)
        searched.append(row)
    return searched


def _row(
    trial: Trial, method: Method, figures: _Figures | None, backprop: _Figures | None, missing: str | None
) -> BenchRow:
    if figures is None:
        return BenchRow(method.label, trial.depth, missing or "out of memory")
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

    trial.use(method)  # type: ignore[arg-type]
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
