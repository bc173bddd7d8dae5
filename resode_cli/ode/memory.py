"""Bytes that a computation graph keeps for its backward pass, counted exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


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
