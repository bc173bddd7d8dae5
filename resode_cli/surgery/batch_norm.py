"""Re-estimate BatchNorm statistics: the usual repair after a network's function was changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..data import Batch
from ..errors import ResodeError, UsageError
from ..network.model import OdeResNet


def batch_norms(model: nn.Module) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    """Every BatchNorm that keeps statistics."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            yield module


def recalibrate(model: OdeResNet, data: Iterable[Batch], *, device: torch.device | str = "cpu") -> int:
    """Set every BatchNorm's running statistics to the average over the batches; returns their number of images.

    A block that serves several steps averages over all of them. Where weights are linear in depth, the
    knots' statistics are moved, less and less from batch to batch, until those of the steps fit.
    Weights stay as they are. Raises ResodeError if the model has no BatchNorm with running statistics.
    """
    norms = list(batch_norms(model))
    if not norms:
        raise ResodeError("the model has no BatchNorm statistics to re-estimate")
    momenta = [norm.momentum for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    knots = {
        id(norm)
        for stage in model.stages.values()
        if stage.spec.blends
        for block in stage.blocks
        for norm in batch_norms(block)
    }
    images = seen = single = 0
    model.eval()
    try:
        for norm in norms:
            if id(norm) not in knots:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
            norm.train()
        with torch.no_grad():
            for batch in data:
                single += len(batch.labels) == 1
                if len(batch.labels) > 1:
                    seen += 1
                    lowest = []
                    for norm in norms:
                        if id(norm) in knots:
                            norm.momentum = 1 / (1 + seen)
                            if norm.running_var is not None:
                                lowest.append((norm.running_var, norm.running_var / 2))
                    model(batch.images.to(device))
                    images += len(batch.labels)
                    for variance, bound in lowest:  # a line through variances may go below 0 at its ends
                        variance.clamp_(min=bound)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    if images == 0 and single:
        raise UsageError("batches of one image have no variance: statistics need a batch size of 2 or more")
    if images == 0:
        raise ResodeError("no image could be read")
    return images
