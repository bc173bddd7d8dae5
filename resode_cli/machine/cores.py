"""Processor cores that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

# Microseconds of processor time, and in how many: by cgroups of the second version, and of the first.
_QUOTAS = (
    (Path("/sys/fs/cgroup/cpu.max"),),
    (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")),
)


def available_cores() -> int:
    """Those that the system lets it run on, or as many as its container's share of time is worth; one at least."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min(cores, round(_quota() or cores)), 1)


def _quota() -> float | None:
    """Cores that a container's share is worth; None without one."""
    for files in _QUOTAS:
        try:
            quota, period = (int(number) for file in files for number in file.read_text().split())
        except (OSError, ValueError):  # no such group, or 'max'
            continue
        if quota > 0 and period > 0:  # -1: no limit
            return quota / period
    return None
