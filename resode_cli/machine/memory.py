"""Memory that a device has free."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import torch

from ..errors import ResodeError
from ..quantities import size
from .processes import processes_here

FOOTPRINT = 4  # times a batch's own bytes in float32 that the first layers of a network take at least
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate: on a GPU what is free or cached, else what the system or its
    container leaves, to each process of a run as much."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [_system_free()]
    for limit, used in CGROUPS:
        try:
            limits.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such group, or 'max'
            continue
    return max(min(limits) // processes_here(), 0)


def give_back_freed_memory() -> bool:
    """Let the C library give large blocks back to the system as soon as they are freed; whether it can.

    glibc keeps freed memory for the next allocation, so that a process holds up to twice what is alive. That costs a
    little time, and is for those who have set a budget.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return bool(mallopt(_TRIM, _LARGE) and mallopt(_MMAP, _LARGE))


_TRIM, _MMAP, _LARGE = -1, -3, 65536  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h; bytes


def check_room(images: int, channels: int, height: int, width: int) -> None:
    """Raises ResodeError for a batch that would leave no memory for a network to run on it."""
    needed, free = FOOTPRINT * 4 * images * channels * height * width, free_bytes(torch.device("cpu"))
    if needed > free:
        raise ResodeError(
            f"images of {height}×{width}: a network's first layers take {size(needed)} and more for {images} of them,"
            f" and {size(free)} are free; choose a smaller --input-size"
        )


def _system_free() -> int:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    except OSError:
        pass
    # Elsewhere only the total is to be had without a library: count on half of it.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
