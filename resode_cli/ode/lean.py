"""Taped evaluations that do not keep the results of cheap expanding layers, but compute them again.

A norm saves its input for the backward pass. Where that is the result of a convolution of one pixel, or of a linear
layer, that makes it larger, what is kept is the layer's own input, which is kept in any case.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from ..errors import ResodeError
from .reentry import Autocast, version

EXPANDS = 2  # by how much a layer's result must be larger than what it is made of


@dataclass
class _Layer:
    """A call of a layer, to be repeated."""

    run: Callable[[], Tensor]
    given: Tensor
    written: int
    autocast: Autocast

    def again(self) -> Tensor:
        if version(self.given) != self.written:
            raise ResodeError("a block writes to a layer's input after that layer; use the adjoint without bits")
        with torch.no_grad(), self.autocast.enter():
            return self.run()


class _Layers(TorchFunctionMode):
    """Notes the expanding layers that run inside, by the storage of their results, for as long as these live."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[weakref.ref[Any], _Layer]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if getattr(func, "__name__", "") in ("conv2d", "linear") and self._expands(args, out):
            given = args[0].detach()
            rest = tuple(a.detach() if isinstance(a, Tensor) else a for a in args[1:])
            layer = _Layer(lambda: func(given, *rest, **kwargs), given, version(given), Autocast.now(given.device.type))
            self.made[out.untyped_storage()._cdata] = (weakref.ref(out.untyped_storage()), layer)
        return out

    @staticmethod
    def _expands(args: tuple[Any, ...], out: Any) -> bool:
        if len(args) < 2 or not isinstance(args[0], Tensor) or not isinstance(args[1], Tensor):
            return False
        one_pixel = args[1].ndim == 2 or args[1].shape[2:].numel() == 1
        return one_pixel and args[0].requires_grad and out.numel() >= EXPANDS * args[0].numel()

    def layer_of(self, storage: torch.UntypedStorage) -> _Layer | None:
        """The layer whose result has this memory."""
        noted = self.made.get(storage._cdata)
        return None if noted is None or noted[0]() is None else noted[1]


@dataclass(frozen=True)
class _Again:
    """A tensor that is not kept: what makes the memory that it is a look at, and which look."""

    make: Callable[[], Tensor]
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def __call__(self) -> Tensor:
        return self.make().as_strided(self.shape, self.stride, self.offset)


def _unpack(kept: Any) -> Tensor:
    return kept() if isinstance(kept, _Again) else kept


@contextmanager
def sparing(state: Tensor, again: Callable[[], Tensor] | None) -> Iterator[None]:
    """Keep inside, for a backward pass, neither a state that can be made again nor the result of an expanding layer.

    again: makes the state; None where it is held in any case, and all is kept then.
    """
    if again is None:
        yield
        return
    own, mode = state.untyped_storage()._cdata, _Layers()

    def pack(tensor: Tensor) -> Tensor | _Again:
        storage = tensor.untyped_storage()
        if storage._cdata == own:
            make = again
        elif (layer := mode.layer_of(storage)) is not None:
            make = layer.again
        else:
            return tensor
        return _Again(make, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    with mode, saved_tensors_hooks(pack, _unpack):
        yield
    mode.made.clear()
