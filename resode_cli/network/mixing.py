"""Whether the images of a batch see each other in a part of a network: found by asking, not by the class of a layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import ResodeError
from ..ode import fixed_buffers
from .repeat import as_before, repeatable

PARTS = 0.005  # the same for whole networks, in which another batch size may take other kernels
TOLERANCE = 1e-4  # of the largest number: what another algorithm for the same batch may round differently
SAMPLE = 4096  # numbers of each gradient that are compared, beside its length


def mixes_images(part: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether what an image gives, its result or its gradient, changes with the image beside it.

    The gradient is asked for too: a norm whose scale is zero, as the last ones of fresh blocks are, shows nothing in
    the result. A part that writes to its buffers does so for the whole batch at once. x: a batch that the part takes.
    """
    if len(x) < 2:
        return False
    x = x.detach()
    other = torch.stack([x[0], x[1].flip(-1)])
    if x.is_floating_point():
        other[1] *= 0.5
    trained = [p for p in part.parameters() if p.requires_grad]

    def look(batch: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            first = repeatable(partial(run, batch))[0]
            if not first.requires_grad:
                return [first]
            weights = torch.randn(first.shape, generator=torch.Generator().manual_seed(0)).to(first)
            return [first.detach(), *_samples((first * weights).sum(), trained)]

    with as_before(part), fixed_buffers([part]):
        before = [buffer.clone() for buffer in part.buffers()]
        pairs = list(zip(look(x[:2].clone()), look(other), strict=True))
        written = any(not torch.equal(a, b) for a, b in zip(before, part.buffers(), strict=True))
    return written or any(
        not torch.allclose(a.float(), b.float(), rtol=0, atol=TOLERANCE * float(a.abs().max())) for a, b in pairs
    )


def _samples(loss: Tensor, trained: list[nn.Parameter]) -> list[Tensor]:
    """Numbers of the gradient of each parameter, and its length. One gradient is held at a time, never all of them."""
    found: dict[int, Tensor] = {}

    def shorten(index: int, gradient: Tensor) -> Tensor:
        flat = gradient.detach().reshape(-1)
        some = flat[:: max(len(flat) // SAMPLE, 1)][:SAMPLE].float()
        found[index] = torch.cat([some, flat.norm().float()[None]])
        return torch.zeros((), dtype=gradient.dtype, device=gradient.device).expand_as(gradient)

    hooks = [p.register_hook(partial(shorten, index)) for index, p in enumerate(trained)]  # type: ignore[no-untyped-call]
    try:
        torch.autograd.grad(loss, trained, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return [numbers for _, numbers in sorted(found.items())]


def differs_in_parts(run: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether a network gives another result for a batch than for its parts: it may mix images from some number on.

    One that draws random numbers, as drop path does, draws others for parts: it is asked with all but its norms in eval
    mode.
    """
    if len(x) < 4 or not isinstance(run, nn.Module):
        return False  # of a part of a network the caller keeps what it writes

    def look(batch: Tensor, seed: int = 0) -> Tensor:
        with torch.no_grad(), fixed_buffers([run]):
            return repeatable(partial(run, batch), seed)

    with as_before(run):
        whole = look(x)
        if not torch.equal(whole, look(x, seed=1)):
            for module in run.modules():
                module.training = module.training and isinstance(module, nn.modules.batchnorm._NormBase)
            whole = look(x)
        for count in (2, 4):
            parts = torch.cat([look(part) for part in x.chunk(count)])
            spread = float((whole - whole.mean(0)).abs().max())  # of the images: all that they could give each other
            few_digits = whole.dtype in (torch.float16, torch.bfloat16)
            if not torch.allclose(whole, parts, rtol=0, atol=(4 if few_digits else 1) * PARTS * spread):
                return True
    return False


def check_apart(
    what: str, part: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, *, into: str = "slices"
) -> None:
    """Raises ResodeError for a part that mixes images, and cannot be run in slices of the batch."""
    if mixes_images(part, run, x) or differs_in_parts(run, x[: len(x) // 4 * 4]):
        raise ResodeError(
            f"{what} mixes the images of a batch, as BatchNorm does with the batch's statistics, and cannot be run in"
            f" {into}; freeze BatchNorm, or leave out the {into}"
        )
