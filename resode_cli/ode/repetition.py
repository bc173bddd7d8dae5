"""Whether the backward sweep's evaluations repeat the forward pass's.

Where a step's state is the forward pass's own, x_n + h Φ_n(x_n) on the tape must be the x_{n+1} of the forward
pass. If it is not, the block depends on what is not set back: tensors or numbers that it writes, a generator
that cannot be seen, whether gradients are recorded. Its gradient would then be another function's.
A few numbers of each state are kept for that, of every image.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ResodeError
from .field import Field
from .generators import is_simulated

SAMPLES = 256  # numbers of a state; but of each image, FEWEST at least
FEWEST = 16
# TF32, which convolutions on a GPU use unasked, has a mantissa of 10 bits.
TF32_ROUNDOFF = 2.0**-10


def sample(x: Tensor) -> Tensor:
    """Numbers of every image of a state, at the same places in each, spread over it; a copy, without dimensions."""
    if x.ndim < 2:
        return x.detach().clone()
    count = max(SAMPLES // max(len(x), 1), FEWEST)
    if is_simulated(x):  # its places would be no numbers either, and are not to be remembered
        return x.detach().flatten()[: len(x) * len(_strided(math.prod(x.shape[1:]), count))].clone()
    places: Any = (slice(None), *_places(tuple(x.shape[1:]), count, x.device))
    return x.detach()[places].flatten()


@lru_cache(maxsize=256)
def _places(shape: tuple[int, ...], count: int, device: torch.device) -> tuple[Tensor, ...]:
    """Indices of `count` numbers, or of all. Images differ by random masks of the whole image, so none is left out."""
    chosen = _strided(math.prod(shape), count)
    flat = torch.arange(0, chosen.stop, chosen.step, device=device)
    return torch.unravel_index(flat, shape)


def _strided(numbers: int, count: int) -> range:
    """Places spread over `numbers`. Their distance is odd, so that they do not all come from a few columns."""
    return range(0, numbers, max(numbers // count, 1) | 1)


def tolerance(x: Tensor) -> float:
    """Half of the digits of what the steps compute in, for other algorithms may round otherwise."""
    device = x.device.type
    dtype = x.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    roundoff = torch.finfo(dtype).eps
    if device != "cpu" and dtype == torch.float32:
        roundoff = TF32_ROUNDOFF
    return float(roundoff**0.5)


@dataclass
class Repetition:
    """The comparison of one backward sweep with its forward pass.

    passed: samples of the states that the forward pass went through, x_1 first. slack: what they may
        be off by where the states are estimates.
    """

    field: Field
    passed: list[Tensor]
    slack: float = 0.0
    steps: list[int] = dataclasses.field(default_factory=list)
    errors: list[Tensor] = dataclasses.field(default_factory=list)
    limit: float = 0.0
    values: Tensor | None = None
    arrived: torch.cuda.Event | None = None

    def watch_step(self, n: int, state: Tensor, following: Tensor) -> None:
        """Take the taped evaluation of x_{n+1} into account, at the state of the forward pass or near to it."""
        self.limit = max(tolerance(state), self.slack)
        if not len(state) or not len(following):
            return
        found, truth = (t.view(len(following), -1) for t in (sample(following), self.passed[n]))
        norm = partial(torch.linalg.vector_norm, dim=1)
        # Where all of a state's samples are zero, rounding is small against what it comes from.
        size = norm(truth) + norm(found) + norm(sample(state).view(len(state), -1)).mean()
        error = norm(found.sub_(truth)) / size.clamp_min(torch.finfo(size.dtype).tiny)
        self.errors.append(error.max())
        self.steps.append(n)

    def watch(self, n: int, state: Tensor, increment: Tensor, h: float) -> None:
        """Take the taped evaluation of step n, at a state of the forward pass, into account."""
        self.limit = tolerance(state)
        images = len(state)
        if not images:
            return
        truth, x, step = (t.view(images, -1) for t in (self.passed[n], sample(state), sample(increment).mul_(h)))
        norm = partial(torch.linalg.vector_norm, dim=1)
        size = norm(truth) + norm(x) + norm(step)
        error = norm(x.add_(step).sub_(truth)) / size.clamp_min(torch.finfo(size.dtype).tiny)
        self.errors.append(error.max())
        self.steps.append(n)

    def finish(self) -> None:
        """Raise on a CPU; elsewhere send the figures to the host without waiting, for `check`."""
        if self.errors and not is_simulated(self.errors[0]):
            values = torch.stack(self.errors).float()
            self.values = torch.empty(values.shape, pin_memory=values.is_cuda).copy_(values, non_blocking=True)
            if values.is_cuda:
                self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self.arrived.record()
        self.errors.clear()
        self.passed = []
        if self.arrived is None:
            self.check()

    def check(self, *, wait: bool = True) -> None:
        """Raises ResodeError if an evaluation was not the forward pass's. Without `wait`, only once it is known."""
        if self.values is None or (self.arrived is not None and not wait and not self.arrived.query()):  # type: ignore[no-untyped-call]
            return
        if self.arrived is not None:
            self.arrived.synchronize()
        found = dict(zip(self.steps, self.values.tolist(), strict=True))
        self.values = None
        bad = [n for n, error in found.items() if error > self.limit]
        if bad:
            first = min(bad)
            raise ResodeError(
                f"{self.field.describe(first)}, step {first}: evaluated again for the backward pass, it gives another"
                f" result than in the forward pass (off by {found[first]:.2g} of its size), so the gradient would be"
                " wrong: it depends on something that it writes, on random numbers that cannot be drawn again, or on"
                " whether gradients are recorded; use the adjoint method 'backprop' for its stage"
            )
