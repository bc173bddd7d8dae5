"""What the operations of a step hold and cost: bytes alive at a time, and seconds by the roofline model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..ode.memory import LiveBytes
from .recall import Call, Cost, Key, call_of, key_of


@dataclass(frozen=True)
class Machine:
    """A device, as far as time depends on it: operations a second, bytes a second, and seconds to start an operation.

    An operation takes the longest of what its arithmetic, its traffic and its start take (Williams, Waterman and
    Patterson 2009). Times of one device are compared with each other alone, so their ratios are what matters.

    copies: whether a convolution brings its tensors into an order of its own first, as the library for processors does.
    """

    arithmetic: float
    traffic: float
    start: float
    copies: bool = False


# Orders of magnitude: a few cores of a server, and a data centre's GPU with its tensor cores.
CPU = Machine(arithmetic=1e11, traffic=1e10, start=5e-6, copies=True)
CUDA = Machine(arithmetic=1e14, traffic=2e12, start=5e-6)

_DEVICE = torch.ops.prim.device.default
_CONVOLUTIONS = ("convolution", "convolution_backward")
# Operations that move no numbers, whatever they return.
_FREE = frozenset("empty empty_strided empty_like new_empty detach alias new_empty_strided lift_fresh".split())


class Ledger(LiveBytes):  # type: ignore[no-untyped-call]
    """Counts, as operations go by, the bytes alive and the seconds spent.

    now, peak: bytes, as `LiveBytes` counts them; on a machine that copies, with the copies while they are made.
    seconds: so far.
    """

    def __init__(
        self, machine: Machine, exclude: Iterable[Tensor], mode: FakeTensorMode, calls: dict[Key, Call]
    ) -> None:
        super().__init__(exclude)
        self.machine, self.mode, self.calls = machine, mode, calls
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # more than half of all calls: autograd asks for each gradient's
            return args[0].fake_device
        tensors: list[FakeTensor] = []
        key = key_of(self.mode, func, args, kwargs or {}, tensors)
        call = self.calls.get(key) if key is not None else None
        if call is not None:
            out, cost = call.repeat(self.mode, tensors), call.cost
            self._count(out if call.sequence is not None else (out,))
        else:
            out = super().__torch_dispatch__(func, types, args, kwargs)
            cost = _cost_of(func, args, kwargs or {}, out)
            call = call_of(key, tensors, out, cost) if key is not None else None
            if key is not None and call is not None:
                self.calls[key] = call
        if cost is not None:
            machine = self.machine
            if machine.copies and cost.copied:
                self.peak = max(self.peak, self.now + cost.copied)
            self.seconds += max(cost.flops / machine.arithmetic, cost.moved / machine.traffic, machine.start)
        return out

    def restart_peak(self) -> None:
        """Take the peak from here on."""
        self.peak = self.now


def _cost_of(func: Any, args: Any, kwargs: Any, out: Any) -> Cost | None:
    packet = func._overloadpacket
    if func.is_view or packet.__name__ in _FREE:
        return None
    tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
    sizes = {id(t): t.nbytes for t in tensors}
    flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
    return Cost(sum(sizes.values()), flops, _copied(tensors) if packet.__name__ in _CONVOLUTIONS else 0)


def _copied(tensors: list[Tensor]) -> int:
    """Bytes of the copies that a convolution makes at a time: of what has not its channels last in memory."""
    images = [t for t in tensors if t.ndim > 3]
    return sum(t.nbytes for t in images if not t.is_contiguous(memory_format=torch.channels_last))
