"""What `auto` chose and why, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..quantities import counted, finite, number, size
from .tables import plain_table

if TYPE_CHECKING:
    from ..gradients.results import Alternative, ChosenAdjoints

NEAR = 0.005  # of a time: no difference


def choice_table(chosen: ChosenAdjoints) -> Table:
    """The decision for every piece and its figures; the caption gives the memory of a training step."""
    exact = "exact" if all(choice.error is not None for choice in chosen.choices) else "what it chose is exact"
    on = f"calibrated on {counted(chosen.images, 'image')}" if chosen.images else f"{exact}, so nothing was measured"
    found = plain_table(f"adjoint auto: gradient tolerance {chosen.tolerance:g}, {on}")
    found.add_column("piece", no_wrap=True)
    found.add_column("chosen")
    for column in ("gradient\nerror", "evals\nper step", "held", "backprop\nwould hold"):
        found.add_column(column, justify="right", no_wrap=True)
    for choice in chosen.choices:
        found.add_row(
            f"{choice.piece} ({choice.steps})" if choice.steps else choice.piece,
            choice.adjoint.label,
            number(choice.error),
            f"{choice.evaluations_per_step:.2f}",
            size(choice.bytes_held),
            size(choice.backprop_bytes),
        )
    because: dict[str, list[str]] = {}
    for choice in chosen.choices:
        because.setdefault(choice.reason, []).append(choice.piece)
    found.caption = "".join(f"{', '.join(pieces)}: {reason}\n" for reason, pieces in because.items())
    if chosen.micro_batches > 1:
        found.caption += (
            f"every batch is split in {chosen.micro_batches} micro-batches, whose gradients add up: exact, since the"
            " network mixes no images\n"
        )
    budget = "" if chosen.budget is None else f" of a budget of {size(chosen.budget)}"
    found.caption += (
        f"predicted for a step of {counted(chosen.batch_size, 'image')}: {size(chosen.predicted_bytes)}{budget},"
        f" {_slower(chosen.time)}; backprop {size(chosen.backprop_bytes)}"
    )
    for other in chosen.alternatives:
        found.caption += f"\n{_alternative(other)}"
    return found


def _slower(time: float) -> str:
    if abs(time - 1) < NEAR:
        return "in backprop's time"
    return f"in about {time:.2f} times backprop's time"


def _alternative(other: Alternative) -> str:
    """As in '40 % less memory for 20 % more time: --memory-budget 3GiB'."""
    memory = f"{abs(1 - other.memory):.0%} {'less' if other.memory < 1 else 'more'} memory"
    time = "about the same time"
    if abs(other.time - 1) >= NEAR:
        time = f"about {abs(other.time - 1):.0%} {'less' if other.time < 1 else 'more'} time"
    return f"{memory} for {time}: --memory-budget {-(-other.bytes // 2**20)}MiB"


def choice_json(chosen: ChosenAdjoints) -> dict[str, Any]:
    choices = [
        {
            **asdict(choice),
            "label": choice.adjoint.label,
            "tried": [{"adjoint": label, "own_error": error} for label, error in choice.tried],
        }
        for choice in chosen.choices
    ]
    return finite({**asdict(chosen), "choices": choices})
