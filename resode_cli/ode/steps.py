"""The forward rule, step by step."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..errors import ResodeError
from .field import Evaluator
from .reentry import version
from .schemes import Scheme


def trajectory(r: Evaluator, scheme: Scheme, x: Tensor, start: int, stop: int) -> Iterator[Tensor]:
    """The states x_{start+1} … x_stop of the forward rule."""
    for n in range(start, stop):
        before = version(x)
        following = scheme.advance(r, n, x)
        if version(x) != before:
            raise ResodeError(
                f"{r.field.describe(n)} of step {n} writes to its input; make that operation out of place"
            )
        x = following
        yield x
