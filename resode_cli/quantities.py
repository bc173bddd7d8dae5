"""Numbers as users write and read them: which of them a setting takes, and bytes, seconds and counts in words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
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

    @property
    def words(self) -> str:
        """As help says it; empty for what nobody needs to be told."""
        if self.high == LARGEST_COUNT:
            return f"{self.low} or more"
        return "" if abs(self.low) > LARGEST_COUNT else str(self).removesuffix(", and finite")

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
TEMPERATURE = Range(0.001, 1000)  # beyond, a softmax is one class or none, and the square of τ is no number
CORRECTIONS = Range(0, 1000)
BITS = Range(2, 8)  # of a coded number
NOT_NEGATIVE = Range(0)
FRACTION = Range(0, 1)
SHARES = Range(0, 1, above=True, below=True)  # of images, some of which go to either side
DECAYING = Range(0, 1, below=True)  # the factor of a running average
AVERAGING = Range(0, 1, above=True, below=True)
LAYER_DECAY = Range(0, 1, above=True)
CROPS = Range(0.05, 1)  # the part of an image's side that is kept; of less, the rest would fill the memory
LONGEST_STAGE = 100_000
STEPS = Range(1, LONGEST_STAGE)  # of a stage
WORKERS = Range(0, 1024)
SEED = Range(-(2**63), 2**63 - 1)  # what a generator of torch takes, with room for the number of an epoch


UNITS = {"": 1, "B": 1}
UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
MEANT_AS_MORE, MOST = 2**20, 2**60  # bytes; nobody means a number below a MiB as bytes, and no machine has an EiB


def parse_bytes(text: str) -> int:
    """The bytes that '8GiB', '512 MiB' or '2e9' stand for. Raises UsageError for anything else."""
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(match[2].upper()) if match else None
    try:
        count = float(match[1]) * unit if match and unit else 0.0
    except ValueError:
        count = 0.0
    if 1 <= count < MEANT_AS_MORE and match and not match[2]:
        raise UsageError(f"memory budget {text!r}: that is {count:g} bytes; add the unit, as in {match[1]}GiB")
    if not 1 <= count <= MOST:
        raise UsageError(f"memory budget {text!r}: write a size such as 8GiB or 512MiB")
    return round(count)


def parse_duration(text: str) -> float:
    """The seconds that '90s', '30m', '2h' or '1h30m' stand for. Raises UsageError for anything else."""
    match = re.fullmatch(r"\s*(?:(\d{1,6})h)?\s*(?:(\d{1,6})m)?\s*(?:(\d{1,6})s)?\s*", text)
    counts = match.groups(default="0") if match else ()
    seconds = sum(int(count) * unit for count, unit in zip(counts, (3600, 60, 1), strict=False))
    if not seconds:
        raise UsageError(f"time {text!r}: write hours, minutes or seconds, as in 2h, 30m, 1h30m or 90s")
    return float(seconds)


def number(value: float | None) -> str:
    """A figure to two significant digits; '–' where there is none."""
    if value is None:
        return "–"
    return "not finite" if not math.isfinite(value) else "0" if value == 0 else f"{value:.2g}"


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 999.5 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    minutes, rest = divmod(round(seconds), 60)
    return f"{rest + 60 * minutes} s" if seconds < 90 else f"{minutes} min {rest:02} s"


def counted(count: int, noun: str) -> str:
    """'1 image', '5,000 images'."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def finite(value: Any) -> Any:
    """The same with every figure that is not finite replaced by None, which JSON can say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value
