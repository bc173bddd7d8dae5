"""Run a network to look at it: with random numbers that come again, and without a trace in it."""

from __future__ import annotations

import pickle
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from ..ode.generators import is_simulated

Result = TypeVar("Result")


def repeatable(run: Callable[[], Result], seed: int = 0) -> Result:
    """What `run` returns with freshly seeded generators of torch, numpy and Python; these are put back."""
    with generators_kept():
        torch.default_generator.manual_seed(seed)
        if _on_cuda():  # else `torch.manual_seed` would seed the devices for good, once they are used
            torch.cuda.manual_seed_all(seed)
        random.seed(seed)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(seed)
        return run()


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put back the generators of torch on all devices, of numpy and of Python."""
    numpy = sys.modules.get("numpy")
    before = random.getstate(), numpy and numpy.random.get_state(legacy=False)
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if _on_cuda() else ()):
            yield
    finally:
        random.setstate(before[0])
        if numpy:
            numpy.random.set_state(before[1])


def _on_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def generator_states() -> tuple[object, ...]:
    """Where the generators on the host stand, to be compared."""
    numpy = sys.modules.get("numpy")
    of_numpy = pickle.dumps(numpy.random.get_state(legacy=False)) if numpy else b""
    return random.getstate(), torch.get_rng_state().tolist(), of_numpy


def remember(nets: Iterable[nn.Module]) -> Callable[[], None]:
    """What puts back modes, buffers and plain attributes of all modules, and the tensors that they keep as attributes.

    Those may have a history then, with which nothing could be copied any more.
    """
    modules = list(dict.fromkeys(module for net in nets for module in net.modules()))
    training = [(module, module.training) for module in modules]
    held = [(module, dict(module._buffers)) for module in modules]
    buffers = [(b, b.clone()) for _, tensors in held for b in tensors.values() if b is not None]
    plain = [
        (module, {name: value for name, value in module.__dict__.items() if isinstance(value, (*_PLAIN, torch.Tensor))})
        for module in modules
    ]

    def restore() -> None:
        for module, mode in training:
            module.training = mode
        for module, tensors in held:
            module._buffers.update(tensors)
        with torch.no_grad():
            for buffer, value in buffers:
                if not (buffer.is_meta or is_simulated(buffer) or torch.equal(buffer, value)):
                    buffer.copy_(value)
        for module, attributes in plain:
            for name in [name for name, value in module.__dict__.items() if isinstance(value, torch.Tensor)]:
                if name not in attributes:
                    del module.__dict__[name]
            module.__dict__.update(attributes)

    return restore


@contextmanager
def in_eval_mode(net: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; each module's own mode after it, as that of a frozen BatchNorm."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def as_before(net: nn.Module) -> Iterator[None]:
    """Put back modes, buffers and plain attributes of all modules."""
    restore = remember([net])
    try:
        yield
    finally:
        restore()


_PLAIN = (bool, int, float, str, type(None))


def kept_in(net: nn.Module) -> dict[str, object]:
    """What modules keep: buffers by their values, plain attributes too, and collections by how much they hold."""
    found: dict[str, object] = {}
    for path, module in net.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                found[f"{path}.{name}"] = buffer.detach().cpu().numpy(force=True).tobytes() if _fits(buffer) else None
        for name, value in module.__dict__.items():
            if isinstance(value, _PLAIN) and name != "training":
                found[f"{path}.{name}"] = value
            elif isinstance(value, (list, dict, set, deque)) and not name.startswith("_"):
                found[f"{path}.{name}"] = len(value)
    return found


def _fits(buffer: torch.Tensor) -> bool:
    """Whether a buffer is small enough to be compared bit by bit, of a type that numpy knows."""
    return buffer.numel() <= 65536 and buffer.dtype != torch.bfloat16 and buffer.layout == torch.strided
