"""Kernels that give the same bits each time: torch's deterministic algorithms, for as long as they are wanted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import ResodeError

# cuBLAS reads it when it starts; with either value its results do not depend on what runs beside it.
CUBLAS, CUBLAS_VALUES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
LACKS = " does not have a deterministic implementation"


def set_cublas_workspace() -> None:
    """Ask cuBLAS for workspaces of a fixed size, before CUDA starts. It stays so for the life of the process.

    Raises ResodeError where CUDA has started without.
    """
    if os.environ.get(CUBLAS) in CUBLAS_VALUES:
        return
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise ResodeError(
            f"--deterministic: CUDA has started, and takes {CUBLAS} no more; set it to {CUBLAS_VALUES[0]} in the"
            " environment before"
        )
    os.environ[CUBLAS] = CUBLAS_VALUES[0]


@contextmanager
def deterministic(wanted: bool, device: torch.device) -> Iterator[None]:
    """Inside the block torch takes deterministic algorithms alone, if that is wanted; then all is as it was before.

    Raises ResodeError for what has none on the device.
    """
    if not wanted:
        yield
        return
    if device.type == "cuda":
        set_cublas_workspace()
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        kernel, lacks, _ = str(error).partition(LACKS)
        if not lacks:
            raise
        raise ResodeError(
            f"--deterministic: torch has no deterministic version of {kernel.split()[-1]} on {device.type}; leave it"
            " out, or choose another device"
        ) from error
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.backends.cudnn.benchmark = benchmark
