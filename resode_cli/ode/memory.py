"""Bytes of tensors, counted exactly: what computation graphs keep for their backward passes, and what is alive."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextmanager
def kept_bytes(exclude: Iterable[Tensor], *, enabled: bool = True) -> Iterator[Callable[[], int | None]]:
    """Count the bytes of the distinct storages saved for backward inside the block.

    The storages of `exclude` (parameters) are left out: they exist whatever the method. Yields a
    function that returns the count so far, or None if not enabled.
    """
    if not enabled:
        yield lambda: None
        return
    ignored = {t.untyped_storage().data_ptr() for t in exclude}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address could be handed out again and be missed

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(sizes.values())
    alive.clear()


@contextmanager
def peak_kept_bytes(exclude: Iterable[Tensor]) -> Iterator[Callable[[], int]]:
    """The same where graphs come and go inside the block: the most that is kept at a time."""
    meter = _Meter({t.untyped_storage().data_ptr() for t in exclude})
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Kept(tensor, meter), lambda kept: kept.tensor):
        yield lambda: meter.peak


class _Meter:
    def __init__(self, ignored: set[int]) -> None:
        self.ignored = ignored
        self.holders: Counter[int] = Counter()
        self.now = self.peak = 0

    def take(self, address: int, size: int) -> None:
        if address not in self.ignored:
            self.holders[address] += 1
            if self.holders[address] == 1:
                self.now += size
                self.peak = max(self.peak, self.now)

    def release(self, address: int, size: int) -> None:
        if address not in self.ignored:
            self.holders[address] -= 1
            if self.holders[address] == 0:
                self.now -= size


class _Kept:
    """A saved tensor, counted for as long as its graph holds it."""

    def __init__(self, tensor: Tensor, meter: _Meter) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self.meter = tensor, meter
        self.address, self.size = storage.data_ptr(), storage.nbytes()
        meter.take(self.address, self.size)

    def __del__(self) -> None:
        self.meter.release(self.address, self.size)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make inside the block, each for as long as it lives.

    peak: the most that was alive at a time. The storages of `exclude` (parameters, inputs) are left out, and so is
    what a library allocates for itself while an operation runs.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap each call in one that turns its compiler off, which takes longer than counting

    def __init__(self, exclude: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, object] = {t.untyped_storage()._cdata: t for t in exclude}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._count(tree_leaves(out))
        return out

    def _count(self, returned: Iterable[Any]) -> None:
        for tensor in returned:
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._take(storage)

    def _take(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: object) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
