"""Whether the images of a batch see each other in a part of a network: found by asking, not by the class of a layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import ResodeError
from ..ode import fixed_buffers
from .repeat import as_before, repeatable

TOLERANCE = 1e-4  # of the largest number: what another algorithm for the same batch may round differently


def mixes_images(part: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether the result for an image changes with the image beside it. x: a batch that the part takes."""
    if len(x) < 2:
        return False
    other = torch.stack([x[0], x[1].flip(-1) if x.is_floating_point() else x[1]])
    other[1] = other[1] * 0.5 if x.is_floating_point() else other[0]
    with as_before(part), fixed_buffers([part]), torch.no_grad():
        first, second = (repeatable(partial(run, batch))[:1].float() for batch in (x[:2].clone(), other))
    return not torch.allclose(first, second, rtol=0, atol=TOLERANCE * float(first.abs().max()))


def check_apart(what: str, part: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Raises ResodeError for a part that mixes images, and cannot be run in slices of the batch."""
    if mixes_images(part, run, x):
        raise ResodeError(
            f"{what} mixes the images of a batch, as BatchNorm does with the batch's statistics, and cannot be run in"
            " slices; freeze BatchNorm, or leave out the slices"
        )
