"""A fresh process that takes one step by one method: by how much its resident size grows at most.

    python -m resode_cli.bench.worker < job.json

The job is {"workload", "method", "depth", "threads"}; the answer {"growth": bytes} or {"error": one line}.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..errors import ResodeError
from .rivals import Rival, RivalTrial, read_any_method
from .workload import Trial, Workload

WARM_UP_IMAGES = 2  # one would leave BatchNorm a single value per channel where the image has shrunk to a pixel


def growth_in_a_step(job: dict[str, Any]) -> int:
    """Bytes by which the resident size grows at most during one forward and backward pass."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(job["threads"])
    workload, method = Workload.read(job["workload"]), read_any_method(job["method"])
    trial = RivalTrial(workload, method) if isinstance(method, Rival) else Trial(workload, job["depth"])
    # A step on two images loads what the method needs: kernels, threads, and modules that torch imports when
    # first asked (150 MB by torch.utils.checkpoint). None of it grows with the network or the batch.
    trial.use(method)  # type: ignore[arg-type]
    whole = trial.workload.batch_size
    # Compiled code is for one batch size, and the compiler needs much memory: it has to have run before.
    compiled = trial.workload.compiled or (isinstance(method, Rival) and method.kind == "compiled")
    trial.load_batch(whole if compiled else min(WARM_UP_IMAGES, whole))
    trial.reset()
    trial.step()
    trial.clear()
    trial.load_batch(whole)
    trial.reset()
    before = start_watching()
    trial.step()
    return largest_since() - before


STATUS = Path("/proc/self/status")


def start_watching() -> int:
    """The resident size now, in bytes; where the system can, its high-water mark is lowered to it."""
    if not STATUS.exists():
        return largest_since()
    with suppress(OSError):  # a container may forbid it; the mark is then at most what building took too high
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def largest_since() -> int:
    """The high-water mark of the resident size, in bytes."""
    if STATUS.exists():
        return _status("VmHWM")
    try:
        import resource
    except ImportError as error:
        raise ResodeError("the peak memory of a process cannot be read on this system") from error
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ResodeError(f"the peak memory of a process cannot be read on this system: no {name} in {STATUS}")


def main() -> None:
    try:
        answer: dict[str, Any] = {"growth": growth_in_a_step(json.load(sys.stdin))}
    except Exception as error:
        answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
