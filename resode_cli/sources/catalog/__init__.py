"""What can be converted: a table of timm's and torchvision's architectures, read without importing either.

`tests/zoo/survey.py` makes it from the installed versions, and a test holds it against them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any

from ...errors import ResodeError, unknown


@dataclass(frozen=True)
class Row:
    """One architecture.

    source: as `convert` takes it. family: the library's module that defines it. steps: residual steps of each
    stage, in the order in which they run. tags: names of pretrained weights, to be put after the source and a dot.
    """

    source: str
    family: str
    parameters: int
    steps: tuple[int, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Refusal:
    """An architecture that cannot be converted, and why."""

    source: str
    family: str
    reason: str


@cache
def _table() -> dict[str, Any]:
    return json.loads(resources.files(__name__).joinpath("catalog.json").read_text())


def versions() -> dict[str, str]:
    """The versions of the libraries that the table was made with."""
    return dict(_table()["versions"])


def rows(pattern: str = "*") -> list[Row]:
    """The architectures whose source, name or family matches.

    Raises UsageError if there is none, and ResodeError if none of them can be converted.
    """
    found = [
        Row(raw["source"], raw["family"], raw["parameters"], tuple(raw["steps"]), tuple(raw["tags"]))
        for raw in _matching(pattern)
        if "reason" not in raw
    ]
    if not found and (others := refusals(pattern)):
        raise ResodeError(f"{others[0].source} cannot be converted: {others[0].reason} (`resode list --refused`)")
    if not found:
        raise unknown("architecture", pattern, [raw["source"].partition(":")[2] for raw in _table()["rows"]])
    return found


def refusals(pattern: str = "*") -> list[Refusal]:
    """The architectures that match and cannot be converted."""
    return [Refusal(raw["source"], raw["family"], raw["reason"]) for raw in _matching(pattern) if "reason" in raw]


def _matching(pattern: str) -> Sequence[dict[str, Any]]:
    """By shell pattern; a word without a star stands for all that begin so."""
    pattern = pattern if any(c in pattern for c in "*?[") else f"{pattern}*"
    raws: list[dict[str, Any]] = _table()["rows"]
    return [
        raw
        for raw in raws
        if any(fnmatchcase(name, pattern) for name in (raw["source"], raw["source"].partition(":")[2], raw["family"]))
    ]
