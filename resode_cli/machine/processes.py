"""The processes of one run: mostly one; torchrun starts several, each of which takes a share of every batch.

The first of them writes the files and says what there is to say. What decides how the run goes on is decided by one of
them, or by numbers that all of them have, so that they stay together.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ResodeError, UsageError

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store

MEETING = 0.05  # seconds between two looks for the others
LATEST = 600.0  # seconds after the first of them that the last may start

Item = TypeVar("Item")
Value = TypeVar("Value")

LONGEST = timedelta(hours=4)  # that one process waits for another: a plan of the first one, or a save, takes minutes


class EndedElsewhere(ResodeError):
    """Another process of the run ended, or has said already why all of them end."""


@dataclass(frozen=True)
class Processes:
    """place: this one's among all, from 0. count: all of them. here, beside: the same of those on this machine."""

    place: int = 0
    count: int = 1
    here: int = 0
    beside: int = 1

    @property
    def alone(self) -> bool:
        return self.count == 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.place == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of a sequence: parts follow each other, and their lengths differ by one at most."""
        return items[len(items) * self.place // self.count : len(items) * (self.place + 1) // self.count]

    def gathered(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every process, of which all have as many."""
        if self.alone:
            return [list(numbers)]
        import torch
        import torch.distributed as dist

        own = torch.tensor(numbers, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.count)]
        with lost_means_ended():
            dist.all_gather(found, own)
        return [each.tolist() for each in found]

    def exchanged(self, value: Value) -> list[Value]:
        """What every process has, of any kind that can be pickled; it goes to no file and to no one else."""
        if self.alone:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        with lost_means_ended():
            dist.all_gather_object(found, value)
        return found

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return any(numbers[0] for numbers in self.gathered([flag]))

    def least(self, number: float) -> float:
        return min(numbers[0] for numbers in self.gathered([number]))

    def mean_of(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each of the tensors by its mean over the processes."""
        if self.alone or not tensors:
            return
        import torch
        import torch.distributed as dist

        with torch.no_grad(), lost_means_ended():
            flat = torch.cat([tensor.reshape(-1).double() for tensor in tensors])
            dist.all_reduce(flat)
            sizes = [tensor.numel() for tensor in tensors]
            for tensor, mean in zip(tensors, torch.split_with_sizes(flat / self.count, sizes), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def alike(self, error: ResodeError) -> ResodeError:
        """An error that every process meets, as each has the same numbers: said by the first one alone."""
        return error if self.leads else EndedElsewhere(str(error))

    def decided(self, decide: Callable[[], Value]) -> Value:
        """What the first process decides, or its error. The value of every process but the first is a copy."""
        if self.alone:
            return decide()
        import torch.distributed as dist

        said: list[Any] = [None]
        failure: ResodeError | None = None
        if self.leads:
            try:
                said = [(decide(), False)]
            except ResodeError as error:
                said, failure = [(None, True)], error
        with lost_means_ended():
            dist.broadcast_object_list(said, src=0)
        value, failed = said[0]
        if failure is not None:
            raise failure
        if failed:
            raise EndedElsewhere("the first process says why")
        decided: Value = value
        return decided


ALONE = Processes()
_now = ALONE
_ready = False


def speaks() -> bool:
    """Whether this process is the one of a run that says what there is to say."""
    return _now.leads


def processes_here() -> int:
    """How many processes of this run are on this machine, and share its cores and its memory."""
    return _now.beside


@contextmanager
def lost_means_ended() -> Iterator[None]:
    """Raises EndedElsewhere where a process that this one waits for is gone."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ResodeError) or not _is_lost(error):
            raise
        raise EndedElsewhere(
            "another process of this run has ended, so this one cannot go on; see what it said. --resume goes on from"
            " what is saved"
        ) from error


def _is_lost(error: RuntimeError) -> bool:
    import torch.distributed as dist

    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection closed", "connection reset")
    )


def several(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes whoever started this one says that there are."""
    given = environment.get("WORLD_SIZE", "").strip()
    return int(given) if given.isdigit() and int(given) > 1 else 1


def refuse_several(what: str) -> None:
    """Raises UsageError under torchrun and its like, for a command that knows one process: each would do all of it."""
    if several() > 1:
        raise UsageError(
            f"WORLD_SIZE is {several()}: {what} knows one process (several are for `finetune`); start it without"
            " torchrun, or unset WORLD_SIZE"
        )


def join(device: str) -> tuple[Processes, str]:
    """Find the other processes of the run, and the device that this one is to use.

    device: as the user asked for it. Raises UsageError for one that they cannot share, and where whoever started them
    did not say which one this is.
    """
    global _now, _ready
    if several() == 1:
        return ALONE, device
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if not os.environ.get(name)]:
        raise UsageError(
            f"WORLD_SIZE is {several()}, and {', '.join(missing)} is not set; start with `torchrun --nproc-per-node"
            f" {several()} -m resode_cli finetune …`, or unset WORLD_SIZE"
        )
    found = _numbered()
    import torch
    import torch.distributed as dist

    try:
        device = _own_device(device, found)
    except UsageError as error:  # which the first process of each machine says
        if not found.here:
            raise
        _now, _ready = found, True
        raise EndedElsewhere(str(error)) from error
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    with lost_means_ended():
        store = _met(found)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=found.place,
        world_size=found.count,
        timeout=LONGEST,
        device_id=torch.device(device) if on_gpu else None,
    )
    _now, _ready = found, False
    return found, device


def _numbered() -> Processes:
    """Which of the processes this one is, as the environment says. Raises UsageError for what cannot be."""
    given = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    place, here, beside = (int(text) if text.isdigit() else -1 for text in given.values())
    if not (0 <= place < several() and 0 <= here < beside <= several()):
        said = ", ".join(f"{name} {text}" for name, text in given.items())
        raise UsageError(f"{said} is no place among the {several()} processes of WORLD_SIZE; start with torchrun")
    return Processes(place, several(), here, beside)


def _met(processes: Processes) -> Store:
    """What the processes share to find each other, once all are there.

    A signal ends this wait, which it does not where torch waits: another process may have been stopped as it started.
    Raises ResodeError where one does not come.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    late = f"the {processes.count} processes of this run have not all started within {LATEST / 60:g} minutes"
    try:  # without torchrun, torch waits here
        shared, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=LATEST)))  # type: ignore[no-untyped-call]
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ResodeError(f"{late}, or do not find each other at {where}") from error
    store = PrefixStore("resode", shared)
    store.set(f"here {processes.place}", "1")
    until = time.monotonic() + LATEST
    while not store.check([f"here {place}" for place in range(processes.count)]):
        if time.monotonic() > until:
            raise ResodeError(late)
        time.sleep(MEETING)
    return store


def _own_device(device: str, processes: Processes) -> str:
    import torch

    if ":" in device:
        raise UsageError(
            f"--device {device}: each of {processes.count} processes takes one of its own; say cuda or cpu"
        )
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if device not in ("auto", "cuda"):
        raise UsageError(f"--device {device}: several processes train on cuda or on cpu")
    if processes.here >= torch.cuda.device_count():
        raise UsageError(
            f"{processes.beside} processes on a machine with {torch.cuda.device_count()} GPUs: start as many as there"
            " are, or give --device cpu"
        )
    return f"cuda:{processes.here}"


def meet() -> None:
    """Wait until every process has come so far in its preparations. Raises an error in all of them where one failed."""
    _meet(last=False)


def begin_together() -> None:
    """The same where all is prepared: from here on each process speaks for itself."""
    _meet(last=True)


def _meet(*, last: bool) -> None:
    failures = _prepared(None, last=last)
    if any(failures):
        raise EndedElsewhere(_first_failure(failures))


def what_to_say(failure: str, *, elsewhere: bool = False) -> str:
    """What this process is to say of how it ended; nothing, mostly, where another one speaks.

    failure: what went wrong here; empty for nothing. elsewhere: it did so in another process. A mistake that all of
    them met before they began is said once, by the first.
    """
    if _now.alone:
        return failure
    if _ready:
        if _now.leads:
            return failure
        return f"process {_now.place} of {_now.count}: {failure}" if failure and not elsewhere else ""
    try:
        failures = _prepared(failure, last=True)
    except EndedElsewhere as error:
        failures = [failure or str(error)]
    return _first_failure(failures) if _now.leads else ""


def _prepared(failure: str | None, *, last: bool) -> list[str]:
    """What went wrong in each process before all of them began; empty for nothing.

    last: nothing is exchanged after it. Nor is it once anything went wrong, of which all know then.
    """
    global _ready
    if _now.alone or _ready:
        return []
    _ready = True
    failures = _now.exchanged(failure or "")
    _ready = last or any(failures)
    return failures


def _first_failure(failures: Sequence[str]) -> str:
    """The first process's, or of the first other one that has one."""
    place = next((place for place, failure in enumerate(failures) if failure), 0)
    return f"process {place} of {_now.count}: {failures[place]}" if place else failures[0]


def leave(code: int) -> None:
    """Leave the other processes, if there are any, and end with this exit code.

    torch.distributed's threads may ask for an interpreter that is shutting down, and abort; so it is not shut down.
    """
    if _now.alone:
        return
    import atexit
    import gc
    import sys
    from contextlib import suppress

    import torch.distributed as dist

    gc.collect()  # what holds the group
    with suppress(Exception):
        dist.destroy_process_group()
    with suppress(Exception):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
