"""Re-estimate BatchNorm statistics: the usual repair after a network's function was changed."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .data import Batch
from .errors import ResodeError
from .model import OdeResNet


def recalibrate(model: OdeResNet, data: Iterable[Batch], *, device: torch.device | str = "cpu") -> int:
    """Set every BatchNorm's running statistics to the average over the batches; returns their number of images.

    A block that serves several steps averages over all of them. Weights stay as they are.
    Raises ResodeError if the model has no BatchNorm with running statistics.
    """
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    norms = [m for m in norms if m.track_running_stats and m.running_mean is not None]
    if not norms:
        raise ResodeError("the model has no BatchNorm statistics to re-estimate")
    momenta = [norm.momentum for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    images = 0
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()
        with torch.no_grad():
            for batch in data:
                if len(batch.labels) > 1:
                    model(batch.images.to(device))
                    images += len(batch.labels)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    if images == 0:
        raise ResodeError("no image could be read")
    return images
