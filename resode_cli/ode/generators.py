"""The generators that a block may draw from, to be set back around its re-evaluations.

torch's own of the CPU and of the state's device; numpy's and Python's global ones; and those that the
blocks' modules hold as attributes.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes


def _numpy_random() -> Any:
    """numpy.random, where something has imported it: a block that draws from it has."""
    return sys.modules.get("numpy.random")


@dataclass(frozen=True)
class HostState:
    """State of Python's and numpy's global generators. Asking for numpy's takes some 60 µs."""

    python: tuple[Any, ...]
    numpy: dict[str, Any] | None

    @classmethod
    def now(cls) -> HostState:
        module = _numpy_random()
        return cls(random.getstate(), None if module is None else module.get_state(legacy=False))

    def restore(self) -> None:
        random.setstate(self.python)
        if self.numpy is not None:
            _numpy_random().set_state(self.numpy)


class HostWatch:
    """Whether the host's generators were drawn from since last asked, at a few µs, and their state before that.

    numpy's state is read where it lies in memory: the 624 words and the position of its Mersenne Twister.
    A number that a block takes from numpy's spare normal alone is not seen; the comparison of states is for that.
    """

    def __init__(self) -> None:
        self.state, self.glance = HostState.now(), _glance()

    def drawn(self) -> HostState | None:
        """The state before the draws since the last call; None if there were none."""
        glance = _glance()
        if glance == self.glance:
            return None
        before, self.state, self.glance = self.state, HostState.now(), glance
        return before


def _glance() -> tuple[Any, ...]:
    module = _numpy_random()
    if module is None:
        return random.getstate(), None
    bits = module.mtrand._rand._bit_generator
    if type(bits).__name__ != "MT19937":
        return random.getstate(), repr(bits.state)
    return random.getstate(), ctypes.string_at(bits.ctypes.state_address, 625 * 4)


@dataclass(frozen=True)
class RandomState:
    """State of the generators that layers on `device` may draw from.

    accelerator: state of the device's own generator. held: the generators that modules hold, with their states.
    host: of Python's and numpy's; None where it is not to be touched.
    """

    cpu: Tensor
    accelerator: Tensor | None
    device: torch.device
    held: tuple[tuple[Any, Any], ...] = ()
    host: HostState | None = None

    @classmethod
    def now(cls, device: torch.device, held: Iterable[Any] = ()) -> RandomState:
        """torch's generators and those of `held`."""
        with real_tensors():
            own = None if device.type in ("cpu", "meta") else _random_of(device)
            state = None if own is None else own.get_rng_state(device)
            return cls(torch.get_rng_state(), state, device, tuple((g, _state_of(g)) for g in held))

    @classmethod
    def everywhere(cls, device: torch.device, modules: Iterable[nn.Module] = ()) -> RandomState:
        """The same with the host's generators, and with those that the modules hold."""
        return replace(cls.now(device, generators_in(modules)), host=HostState.now())

    def restore(self) -> None:
        with real_tensors():
            torch.set_rng_state(self.cpu)
            if self.accelerator is not None:
                _random_of(self.device).set_rng_state(self.accelerator, self.device)
            if self.host is not None:
                self.host.restore()
            for generator, state in self.held:
                _set_state(generator, state)

    def equals(self, other: RandomState) -> bool:
        """Whether torch's generators and the held ones stand alike."""
        held = zip(self.held, other.held, strict=True)
        with real_tensors():
            same = (
                self.accelerator is None
                or other.accelerator is None
                or torch.equal(self.accelerator, other.accelerator)
            )
            return same and torch.equal(self.cpu, other.cpu) and all(_same(a, b) for (_, a), (_, b) in held)


def real_tensors() -> AbstractContextManager[Any]:
    """States of generators are numbers, in a simulation too, where tensors have none."""
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext()  # type: ignore


def is_simulated(x: Tensor) -> bool:
    """Whether a tensor has a shape and no numbers."""
    return isinstance(x, FakeTensor)


def _random_of(device: torch.device) -> Any:
    module = torch.get_device_module(device)
    return module if hasattr(module, "get_rng_state") else None


def generators_in(modules: Iterable[nn.Module]) -> list[Any]:
    """The generators that modules hold, as attributes or within lists, tuples and dicts of theirs, each once."""
    found: dict[int, Any] = {}
    for module in modules:
        for value in vars(module).values():
            for item in _items(value):
                if is_generator(item):
                    found[id(item)] = item
    return list(found.values())


def _items(value: Any) -> Iterator[Any]:
    yield value
    if type(value) in (list, tuple):
        yield from value
    elif type(value) is dict:
        yield from value.values()


def is_generator(value: Any) -> bool:
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    module = _numpy_random()
    return module is not None and isinstance(value, (module.Generator, module.RandomState))


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):
        return generator.bit_generator.state
    return generator.get_state(legacy=False)


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return all(_same(a[key], b[key]) for key in a)
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)
