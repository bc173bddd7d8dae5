"""What `auto` chose and why, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..quantities import counted, finite, number, size
from .tables import plain_table

if TYPE_CHECKING:
    from ..gradients.choose import ChosenAdjoints


def choice_table(chosen: ChosenAdjoints) -> Table:
    """The decision for every stage and its figures; the caption gives the memory of a training step."""
    found = plain_table(
        f"adjoint auto: gradient tolerance {chosen.tolerance:g}, calibrated on {counted(chosen.images, 'image')}"
    )
    found.add_column("stage", no_wrap=True)
    found.add_column("chosen")
    for column in ("gradient\nerror", "evals\nper step", "held", "backprop\nwould hold"):
        found.add_column(column, justify="right", no_wrap=True)
    for choice in chosen.choices:
        found.add_row(
            f"{choice.stage} ({choice.steps})",
            choice.adjoint.label,
            number(choice.error),
            f"{choice.evaluations_per_step:.2f}",
            size(choice.bytes_held),
            size(choice.backprop_bytes),
        )
    because: dict[str, list[str]] = {}
    for choice in chosen.choices:
        because.setdefault(choice.reason, []).append(choice.stage)
    found.caption = "".join(f"{', '.join(stages)}: {reason}\n" for reason, stages in because.items())
    found.caption += (
        f"predicted for a step of {counted(chosen.batch_size, 'image')}: {size(chosen.predicted_bytes)}"
        f" of a budget of {size(chosen.budget)}; backprop {size(chosen.backprop_bytes)}"
        + (", which fits: --adjoint backprop takes less time" if chosen.backprop_fits else "")
    )
    return found


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
