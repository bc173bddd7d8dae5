"""The exact signs of every rectifier in an evaluation, kept in one bit a number and given back in another evaluation.

Evaluated again at an estimate x̂ of its state, a block rectifies other numbers than it did at x, and the error of its
gradient falls only like the root of that of x̂. With the signs of the forward pass it falls like that error itself.
Smooth activations need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import ResodeError
from .codec import pack_bits, unpack_bits

# Which evaluation inside which step: (n, 0) is r_n at the state, (n, 1) Heun's second evaluation.
EvaluationKey = tuple[int, int]

# The slope below zero of a rectifier, by the name and the arguments of the function.
_SLOPES: dict[str, Callable[..., float]] = {
    "relu": lambda *_, **__: 0.0,
    "relu_": lambda *_, **__: 0.0,
    "leaky_relu": lambda _, negative_slope=0.01, inplace=False: negative_slope,
    "leaky_relu_": lambda _, negative_slope=0.01: negative_slope,
}


@dataclass(frozen=True)
class _Rectifier:
    """A call of one. run: does it."""

    x: Tensor
    slope: float
    in_place: bool
    run: Callable[[], Tensor]


class _Signs(TorchFunctionMode):
    """Sees every rectifier that is evaluated inside."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        slope = _SLOPES.get(name)
        if slope is None or not args or not isinstance(args[0], Tensor):
            return func(*args, **kwargs)
        in_place = name.endswith("_") or any(value is True for value in (*args[1:], kwargs.get("inplace")))
        return self.rectify(_Rectifier(args[0], slope(*args, **kwargs), in_place, lambda: func(*args, **kwargs)))

    def rectify(self, call: _Rectifier) -> Tensor:
        raise NotImplementedError

    def positive(self, x: Tensor) -> Tensor:
        raise NotImplementedError


_OTHERS = (
    "a block evaluated again for the backward pass rectifies other tensors than in the forward pass; use the adjoint"
    " method 'backprop' for its stage"
)


class _Recording(_Signs):
    def __init__(self, found: list[Tensor]) -> None:
        super().__init__()
        self.found = found

    def rectify(self, call: _Rectifier) -> Tensor:
        out = call.run()
        self.positive(out)
        return out

    def positive(self, x: Tensor) -> Tensor:
        positive = x.detach() > 0
        self.found.append(pack_bits(positive.reshape(-1)))
        return positive


class _Repeating(_Signs):
    def __init__(self, signs: Iterator[Tensor]) -> None:
        super().__init__()
        self.signs = signs

    def positive(self, x: Tensor) -> Tensor:
        return _unpacked(x, self._next(x))

    def rectify(self, call: _Rectifier) -> Tensor:
        result: Tensor = _Rectify.apply(call.x, self._next(call.x), call.slope, call.in_place)
        return result

    def _next(self, x: Tensor) -> Tensor:
        packed = next(self.signs, None)
        if packed is None or packed.numel() != -(-x.numel() // 8):
            raise ResodeError(_OTHERS)
        return packed


class _Rectify(torch.autograd.Function):
    """x where the sign is set, slope x elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, slope: float, in_place: bool) -> Tensor:
        ctx.packed, ctx.slope = packed, slope
        if in_place:
            ctx.mark_dirty(x)
            return _rectified_(x, packed, slope)
        return _rectified(x, packed, slope)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = grad_outputs
        return _rectified(gradient, ctx.packed, ctx.slope), None, None, None


def _unpacked(like: Tensor, packed: Tensor) -> Tensor:
    """Truth values. No product with them: for that, torch would first make numbers of them all."""
    return unpack_bits(packed, like.numel()).view(torch.bool).view(like.shape)


def _rectified(x: Tensor, packed: Tensor, slope: float) -> Tensor:
    return torch.where(_unpacked(x, packed), x, x * slope if slope else 0.0)


def _rectified_(x: Tensor, packed: Tensor, slope: float) -> Tensor:
    below = _unpacked(x, packed).logical_not_()
    return x.masked_fill_(below, 0.0) if slope == 0.0 else x.copy_(torch.where(below, x * slope, x))


class Signs:
    """The signs of every evaluation of a forward pass, by its key.

    Recording at first; `again` makes one that gives them back.
    """

    def __init__(self, found: dict[EvaluationKey, list[Tensor]] | None = None) -> None:
        self.repeating = found is not None
        self.found = found or {}
        self.counts: dict[EvaluationKey, int] = {}

    def around(self, key: EvaluationKey, run: Callable[[], Tensor]) -> Tensor:
        """An evaluation with its signs recorded, or repeated."""
        if not self.repeating:
            with _Recording(self.found.setdefault(key, [])):
                return run()
        waiting = iter(self.found.pop(key))
        with _Repeating(waiting):
            result = run()
        if next(waiting, None) is not None:
            raise ResodeError(_OTHERS)
        return result

    def saved(self) -> list[Tensor]:
        """The tensors to save; they are then no longer here."""
        tensors = [packed for signs in self.found.values() for packed in signs]
        self.counts, self.found = {key: len(signs) for key, signs in self.found.items()}, {}
        return tensors

    def again(self, saved: Iterator[Tensor]) -> Signs:
        """The same signs, from the saved tensors, to be given back."""
        return Signs({key: [next(saved) for _ in range(count)] for key, count in self.counts.items()})


def is_positive(x: Tensor) -> Tensor:
    """x > 0, a sign that is recorded and repeated as a rectifier's is."""
    for mode in torch.overrides._get_current_function_mode_stack():  # type: ignore
        if isinstance(mode, _Signs):
            return mode.positive(x)
    return x > 0
