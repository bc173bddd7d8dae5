"""A process that reads images and dies is told as that, wherever in handing over a batch it was."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resode_cli.data.workers import WorkerDied, loader_arguments, read_in_workers


class Numbers(Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        return torch.zeros(3) + i


class CutShort(DataLoader[Tensor]):
    """Its second batch breaks off while it is handed over, with the process that made it, or without."""

    error: type[Exception] = ConnectionResetError
    dies = True

    def __iter__(self) -> Any:
        batches = super().__iter__()
        pids = [worker.pid for worker in batches._workers]  # type: ignore[attr-defined]

        def cut() -> Iterator[Tensor]:
            yield next(batches)
            if self.dies:
                os.kill(pids[0], signal.SIGKILL)
                time.sleep(0.05)
            raise self.error("Connection reset by peer")

        return cut()


@pytest.mark.parametrize("dies", [True, False], ids=["killed", "out of reach"])
@pytest.mark.parametrize("error", [ConnectionResetError, BrokenPipeError, EOFError])
def test_a_batch_that_breaks_off_is_a_process_that_died(error: type[Exception], dies: bool) -> None:
    loader = CutShort(Numbers(), batch_size=2, **loader_arguments(1))
    loader.error, loader.dies = error, dies
    batches = read_in_workers(loader)
    assert torch.equal(next(batches)[:, 0], torch.tensor([0.0, 1.0]))
    with pytest.raises(WorkerDied, match="a process that reads images died"):
        next(batches)


class Broken(Numbers):
    """What its worker's thread for handing over batches meets."""

    def __getitem__(self, i: int) -> Tensor:
        error = (ConnectionResetError if i else ValueError)(f"at {i}")
        sys.excepthook(type(error), error, None)
        return super().__getitem__(i)


def test_a_worker_says_nothing_of_a_batch_that_was_not_fetched(capfd: Any) -> None:
    """The main process breaks off where another worker died, and tells of that."""
    assert len(list(read_in_workers(DataLoader(Broken(), batch_size=4, **loader_arguments(1))))) == 2
    assert capfd.readouterr().err.strip() == "ValueError: at 0"
