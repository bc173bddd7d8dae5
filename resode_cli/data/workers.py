"""Processes that read images: they outlive no one, and what stops the main process does not stop them first."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..errors import ResodeError, join
from ..machine.cores import available_cores
from ..machine.processes import processes_here
from ..machine.signals import SIGNALS

AUTO = "auto"  # as a number of workers
# Fewer images than these are read, at a millisecond each, before workers pay that are not asked for: a forked one is
# there in some tens of milliseconds; one that starts anew imports torch first, which takes seconds.
FEW, FEW_ANEW = 1000, 10_000
MOST = 8  # workers that are started without being asked for
STUCK = 300  # seconds without a batch; slow network disks take tens of them
LOOKED_AFTER = 5  # seconds after which the processes are looked after: a signal may come just before a wait begins
PR_SET_PDEATHSIG = 1

_alive: set[BaseProcess] = set()
_ending: set[BaseProcess] = set()
_waiting = 0  # how many loops wait for a batch just now
_starting = 0  # how many loaders are being made just now


def worker_count(asked: int | str, images: int, device: torch.device | str) -> int:
    """How many workers read so many images, which go to a device: as many as asked for, or as pay for 'auto'.

    A GPU leaves the processor to them. Beside a network that runs on the processor they take its cores: it is there for
    them where there are some to spare. On two that others used too, a step of a ResNet-20 took 3.6 s without workers,
    4.1 s with one and 4.2 s with two.
    """
    if asked != AUTO:
        return int(asked)
    cores = max(available_cores() // processes_here(), 1)
    if images < (FEW if multiprocessing.get_start_method() == "fork" else FEW_ANEW) or cores == 1:
        return 0
    return min(cores // 4 if torch.device(device).type == "cpu" else cores - 1, MOST)


class WorkerDied(ResodeError):
    """A process that reads images was killed, or reads nothing any more."""


class WorkersStuck(WorkerDied):
    """No process gives an image any more: whoever reads from there next waits too."""


def read_in_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """What a loader with workers gives. Raises WorkerDied, only while the caller waits for a batch."""
    global _waiting, _starting
    before = set(multiprocessing.active_children())
    mine: set[BaseProcess] = set()
    try:
        with _signals_held_back():
            _starting += 1
            try:
                source = iter(loader)
            finally:
                _starting -= 1
                mine = set(multiprocessing.active_children()) - before
                _alive.update(mine)
                _take_over_deaths()
            if len(mine) < loader.num_workers:  # one that is dead already is no child any more
                raise WorkerDied("a process that reads images died as it started, perhaps for want of memory")
        while True:
            _waiting += 1
            try:
                _check(mine)
                batch = _next(source, mine)
            except RuntimeError as error:
                _explain(error, mine)
                raise
            except (ConnectionError, EOFError) as error:  # it died while it handed a batch over
                for worker in mine:
                    worker.join(0.2)
                _check(mine)
                raise WorkerDied(f"a process that reads images died ({error or type(error).__name__})") from error
            finally:
                _waiting -= 1
            if batch is None:
                return
            yield batch
    except GeneratorExit:
        del source  # which lets the workers end in peace
        raise
    finally:
        # Whoever is left is stuck, or there is an error to tell: a worker ignores being asked to end.
        _ending.update(mine)
        _alive.difference_update(mine)
        for worker in mine:
            worker.kill()
        for worker in mine:
            worker.join(1)
        _ending.difference_update(mine)


def _next(source: Iterator[Any], workers: set[BaseProcess]) -> Any:
    """The next batch, however often the loader's own wait for it ends; None at the end."""
    until = time.monotonic() + STUCK
    while True:
        try:
            return next(source, None)
        except RuntimeError as error:
            if "timed out" not in str(error) or time.monotonic() > until:
                raise
            _check(workers)


def ignore_stops(parent: int, _: int) -> None:
    """What a worker does first."""
    sys.excepthook = _quietly
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux" and os.getppid() == parent:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _quietly(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """No word of a batch whose handing over the main process broke off: it says itself what happened.

    The thread that hands batches over ends up here.
    """
    if not issubclass(kind, (OSError, EOFError, multiprocessing.AuthenticationError)):
        sys.__excepthook__(kind, error, traceback)


def loader_arguments(workers: int) -> dict[str, Any]:
    """Of a DataLoader, beside its data."""
    if not workers:
        return {}
    return {
        "num_workers": workers,
        "timeout": LOOKED_AFTER,
        "worker_init_fn": partial(ignore_stops, os.getpid()),
    }


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Workers start with these signals blocked: they may come before a worker has said that it ignores them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # SIGCHLD too: torch raises an error at the death of a worker, and a loader that is half made cannot be ended.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, [*SIGNALS, signal.SIGCHLD])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _check(workers: set[BaseProcess]) -> None:
    """Raises WorkerDied if any of them ended otherwise than well."""
    ended = {worker.pid: worker.exitcode for worker in workers if worker.exitcode}
    if ended:
        raise _death(ended)


def _death(ended: Mapping[int | None, int | None]) -> WorkerDied:
    how = join([f"{pid}, {_how(code)}" for pid, code in ended.items()])
    return WorkerDied(
        f"a process that reads images died ({how}), perhaps for want of memory; fewer --workers take less of it"
    )


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"


def _explain(error: RuntimeError, workers: set[BaseProcess]) -> None:
    """Raises WorkerDied where a loader's error says that."""
    _check(workers)
    text = str(error)
    if "timed out" in text:
        raise WorkersStuck(f"no image was read in {STUCK} seconds: the disk or a file is stuck") from error
    if "DataLoader worker" in text:
        raise WorkerDied(f"a process that reads images died: {text}") from error


def _take_over_deaths() -> None:
    """torch raises an error wherever the main process is when a worker dies, even halfway through a step.

    A dead worker of ours is an error only where a batch is waited for: there the model is as the last step left it.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return
    theirs = signal.getsignal(signal.SIGCHLD)
    if isinstance(theirs, _OnDeath):
        return
    signal.signal(signal.SIGCHLD, _OnDeath(theirs))


class _OnDeath:
    def __init__(self, otherwise: Any) -> None:
        self.otherwise = otherwise

    def __call__(self, number: int, frame: Any) -> None:
        dead = {worker.pid: worker.exitcode for worker in list(_alive) if worker.exitcode}
        if dead and _waiting:
            raise _death(dead)
        if not dead and not _ending and not _starting and callable(self.otherwise):
            self.otherwise(number, frame)


@atexit.register
def _kill() -> None:
    for worker in list(_alive):
        if worker.is_alive():
            worker.kill()
