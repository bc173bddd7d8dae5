"""What `auto` chose and why, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..quantities import counted, finite, number, size
from .tables import plain_table

if TYPE_CHECKING:
    from ..gradients.choose import ChosenAdjoints


def choice_table(calibration: ChosenAdjoints) -> Table:
    """The decision for every stage and its figures; the caption gives the memory of a training step."""
    found = plain_table(
        f"adjoint auto: gradient tolerance {calibration.tolerance:g}, calibrated on"
        f" {counted(calibration.images, 'image')}"
    )
    found.add_column("stage", no_wrap=True)
    found.add_column("chosen")
    for column in ("gradient\nerror", "evals\nper step", "held", "backprop\nwould hold"):
        found.add_column(column, justify="right", no_wrap=True)
    for choice in calibration.choices:
        found.add_row(
            f"{choice.stage} ({choice.steps})",
            choice.adjoint.label,
            number(choice.error),
            f"{choice.evaluations_per_step:.2f}",
            size(choice.bytes_held),
            size(choice.backprop_bytes),
        )
    because: dict[str, list[str]] = {}
    for choice in calibration.choices:
        because.setdefault(choice.reason, []).append(choice.stage)
    found.caption = "".join(f"{', '.join(stages)}: {reason}\n" for reason, stages in because.items())
    found.caption += (
        f"predicted for a step of {counted(calibration.batch_size, 'image')}: {size(calibration.predicted_bytes)}"
        f" of a budget of {size(calibration.budget)}; backprop {size(calibration.backprop_bytes)}"
        + (", which fits: --adjoint backprop takes less time" if calibration.backprop_fits else "")
    )
    return found


def choice_json(calibration: ChosenAdjoints) -> dict[str, Any]:
    choices = [
        {
            **asdict(choice),
            "label": choice.adjoint.label,
            "tried": [{"adjoint": label, "own_error": error} for label, error in choice.tried],
        }
        for choice in calibration.choices
    ]
    return finite({**asdict(calibration), "choices": choices})
