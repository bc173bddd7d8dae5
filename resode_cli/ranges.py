"""Which numbers a setting takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import UsageError


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`. `above`: `low` itself is left out; `below`: `high` is."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        # Written so that NaN, which compares as false with everything, is in no range; nor is infinity.
        from_below = value > self.low if self.above else value >= self.low
        from_above = value < self.high if self.below else value <= self.high
        return from_below and from_above and abs(value) < math.inf

    def __str__(self) -> str:
        low, high = (f"{bound:g}" if isinstance(bound, float) else str(bound) for bound in (self.low, self.high))
        if self.low == -math.inf:
            return "a finite number"
        if self.high == math.inf:
            return f"above {low}, and finite" if self.above else f"{low} or more, and finite"
        if self.above or self.below:
            return f"{'above' if self.above else 'at least'} {low} and {'below' if self.below else 'at most'} {high}"
        return f"from {low} to {high}"

    def check(self, flag: str, value: float | None) -> None:
        """Raises UsageError for a number outside, and for what is no finite number. None stands for an unset option."""
        if value is None or value in self:
            return
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        # The upper end of a count is there for what overflows; who wrote 0 need not hear of it.
        allowed = f"{self.low} or more" if self.high == LARGEST_COUNT and value < self.low else str(self)
        raise UsageError(f"{flag} {shown}: must be {allowed}")


# Far above what anybody can compute, and far below what overflows somewhere inside.
LARGEST_COUNT = 10**9
COUNT = Range(1, LARGEST_COUNT)
COUNT_OR_NONE = Range(0, LARGEST_COUNT)
FINITE = Range(-math.inf)
POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
FRACTION = Range(0, 1)
DECAYING = Range(0, 1, below=True)  # the factor of a running average
LONGEST_STAGE = 100_000
STEPS = Range(1, LONGEST_STAGE)  # of a stage
WORKERS = Range(0, 1024)
SEED = Range(-(2**63), 2**63 - 1)  # what a generator of torch takes, with room for the number of an epoch


def ranged(default: Any, range: Range, *, flag: str | None = None) -> Any:
    """A dataclass field that takes the numbers of a range. flag: where it is not spelled like the field."""
    return field(default=default, metadata={"range": range, "flag": flag})


def check_ranges(settings: Any) -> None:
    """Raises UsageError, by the name of its flag, for the first field of a dataclass outside its range."""
    for each in fields(settings):
        allowed = each.metadata.get("range")
        if allowed is not None:
            allowed.check(flag_of(each.name, each.metadata), getattr(settings, each.name))


def flag_of(name: str, metadata: Mapping[str, Any]) -> str:
    return metadata.get("flag") or f"--{name.replace('_', '-')}"
