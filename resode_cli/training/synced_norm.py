"""BatchNorm over the batch of all processes (Zhang et al. 2018, section 3.2), on any device.

torch's own SyncBatchNorm knows GPUs alone, and takes the place of a module; here a module keeps its class, its
parameters and its names, and gets another forward in training.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from ..errors import UsageError
from ..machine.processes import lost_means_ended

_apart = 0  # how many blocks are entered in which this process computes alone

Norm = nn.modules.batchnorm._BatchNorm


@contextmanager
def apart() -> Iterator[None]:
    """Inside the block BatchNorms look at this process's images alone: it does what the others do not."""
    global _apart
    _apart += 1
    try:
        yield
    finally:
        _apart -= 1


def check_synchronises(model: nn.Module) -> None:
    """Raises UsageError for a kind of BatchNorm that computes in a way of its own."""
    for name, module in model.named_modules():
        if isinstance(module, Norm) and type(module).forward not in (Norm.forward, BatchNormAct2d.forward):
            raise UsageError(
                f"--bn sync: {name or 'the network'} is a {type(module).__name__}, which computes in a way of its own;"
                " take --bn batch or frozen"
            )


def synchronise(model: nn.Module) -> None:
    """Let every BatchNorm in training normalise by the statistics of all processes' images.

    Raises UsageError where that cannot be.
    """
    check_synchronises(model)
    for module in model.modules():
        if isinstance(module, Norm):
            module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(self: Any, x: Tensor) -> Tensor:
    if _apart or not self.training:
        found: Tensor = type(self).forward(self, x)
        return found
    self._check_input_dim(x)
    y = _normalised(self, x)
    if isinstance(self, BatchNormAct2d):
        y = self.act(self.drop(y))
    return y


def _normalised(norm: Any, x: Tensor) -> Tensor:
    factor = 0.0 if norm.momentum is None else norm.momentum
    if norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            factor = 1.0 / float(norm.num_batches_tracked)
    y, mean, variance, count = _Normalise.apply(x, norm.weight, norm.bias, norm.eps)
    if norm.track_running_stats and norm.running_mean is not None:
        with torch.no_grad():
            norm.running_mean.lerp_(mean.to(norm.running_mean), factor)
            unbiased = variance * (count / (count - 1).clamp(min=1))
            norm.running_var.lerp_(unbiased.to(norm.running_var), factor)
    result: Tensor = y
    return result


class _Normalise(torch.autograd.Function):
    """y = γ (x − m) / √(v + ε) + β, with mean m and biased variance v of each channel over all processes' images.

    With x̂ = (x − m) / √(v + ε), g = ∂L/∂y and means over all n numbers of a channel, those of all processes:
    ∂L/∂x = γ / √(v + ε) (g − mean(g) − x̂ mean(g x̂)), ∂L/∂γ = Σ g x̂, ∂L/∂β = Σ g (Ioffe and Szegedy 2015, section 3);
    of γ and β this process's part. Also given out: m, v and n, which have no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        dims = [0, *range(2, x.ndim)]
        n = x.numel() // x.shape[1]
        variance, mean = torch.var_mean(x.to(exact), dims, correction=0)
        everyone = _gathered(torch.cat([mean.new_full((1,), n), mean, variance]))
        counts, means, variances = torch.split_with_sizes(everyone, [1, len(mean), len(mean)], dim=1)
        count = counts.sum()
        share = counts / count
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean).square())).sum(0)
        scale = (variance + eps).rsqrt()
        y = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, mean, scale, count = ctx.saved_tensors
        dims, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
        g = gradients[0].to(mean.dtype)
        normal = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        own = torch.stack([g.sum(dims), (g * normal).sum(dims)])
        everywhere = own.clone()
        with lost_means_ended():
            dist.all_reduce(everywhere)
        shift, slope = (everywhere / count).unbind()
        factor = scale if weight is None else scale * weight.to(scale.dtype)
        into = (g - shift.view(shape) - normal * slope.view(shape)) * factor.view(shape)
        of_weight = own[1].to(weight.dtype) if weight is not None and ctx.needs_input_grad[1] else None
        of_bias = own[0].to(g.dtype) if ctx.needs_input_grad[2] else None
        return into.to(x.dtype), of_weight, of_bias, None


def _gathered(own: Tensor) -> Tensor:
    """The same of every process, as rows."""
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    with lost_means_ended():
        dist.all_gather(found, own)
    return torch.stack(found)
