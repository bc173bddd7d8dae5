"""The moving average of a run's weights (timm's ModelEmaV3), which is what is measured and saved as a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from ..errors import ResodeError
from ..network.model import OdeResNet
from ..simulation.step import optimizer_bytes
from .settings import Settings


def averaged_tensors(model: OdeResNet) -> dict[str, Tensor]:
    """What an average is of: the parameters that are trained, and the running statistics. One that is shared, once."""
    trained = {name: p for name, p in model.net.named_parameters() if p.requires_grad}
    return trained | {name: b for name, b in model.net.named_buffers() if b.is_floating_point()}


class _Tensors(nn.Module):
    """Tensors as timm's average takes them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for place, tensor in enumerate(tensors.values()):
            self.register_parameter(str(place), nn.Parameter(tensor.detach(), requires_grad=False))


class Average:
    """w̄ ← d w̄ + (1 − d) w after every step, d = `settings.ema`; at the first step w̄ = w.

    With `settings.ema_warmup`, d is at most 1 − n^(−2/3) at step n, so that a short run's average is of its own end.
    """

    def __init__(self, model: OdeResNet, settings: Settings) -> None:
        assert settings.ema is not None
        self.model = model
        self.names = tuple(averaged_tensors(model))  # of all that is trained, some of it perhaps only later
        self.average = ModelEmaV3(_Tensors(self._tensors()), decay=settings.ema, use_warmup=settings.ema_warmup)
        self.within = False  # whether the model holds the average, and the average the model's weights

    def _tensors(self) -> dict[str, Tensor]:
        known: dict[str, Tensor] = {**dict(self.model.net.named_parameters()), **dict(self.model.net.named_buffers())}
        return {name: known[name] for name in self.names}

    def update(self, step: int) -> None:
        """Take in the weights after a step, counted from 1."""
        self.average.update(_Tensors(self._tensors()), step=step)

    @property
    def state(self) -> dict[str, Tensor]:
        """The average by the tensors' names in the network."""
        assert not self.within
        return dict(zip(self._tensors(), self.average.module.parameters(), strict=True))

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Raises ResodeError for what is none of this network's."""
        own = self.state
        if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in saved.items()}:
            raise ResodeError("--resume: the saved average of the weights is not of this network; start a new run")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])

    @contextmanager
    def in_place(self, deferred: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """The model holds the average inside the block. deferred: keeps signals from cutting the exchange in two."""
        try:
            with deferred():
                self._exchange(within=True)
            yield
        finally:
            self.put_back(deferred)

    def put_back(self, deferred: Callable[[], AbstractContextManager[None]]) -> None:
        """The model holds its own weights again, if it does not."""
        with deferred():
            self._exchange(within=False)

    @torch.no_grad()
    def _exchange(self, *, within: bool) -> None:
        if within == self.within:
            return
        for own, average in zip(self._tensors().values(), self.average.module.parameters(), strict=True):
            held = own.clone()
            own.copy_(average)
            average.copy_(held)
        self.within = within


def average_bytes(model: OdeResNet, settings: Settings) -> int:
    """What an average takes beside the model."""
    return 0 if settings.ema is None else sum(map(optimizer_bytes, averaged_tensors(model).values()))
