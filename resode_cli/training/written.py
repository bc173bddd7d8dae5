"""Settings of a training run that are written as text: what '1/3,2/3', '0.9,0.95' and 'tensorboard' mean."""

from __future__ import annotations

from fractions import Fraction

from ..errors import UsageError, unknown
from ..quantities import DECAYING, parse_bytes
from .choices import LEAN

TRACKERS, NO_TRACKER = ("tensorboard", "wandb", "mlflow", "trackio"), "none"


def budget_bytes(memory_budget: str | None) -> int | None:
    """A memory budget in bytes; None if there is none, or 'lean'. Raises UsageError for anything else."""
    return None if memory_budget is None or memory_budget == LEAN else parse_bytes(memory_budget)


def parse_milestones(text: str) -> tuple[Fraction, ...]:
    """Shares of the run, each between 0 and 1, ascending. Raises UsageError for anything else."""
    try:
        shares = tuple(Fraction(part.strip()) for part in text.split(","))
    except (ValueError, ZeroDivisionError):
        shares = ()
    if not shares or list(shares) != sorted(set(shares)) or not shares[0] > 0 or not shares[-1] < 1:
        raise UsageError(f"--milestones {text}: shares of the run between 0 and 1, ascending, as in 1/3,2/3 or 0.5,0.9")
    return shares


def parse_betas(text: str) -> tuple[float, ...]:
    """Two or more decays of an optimizer's averages. Raises UsageError for anything else."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if len(found) < 2 or not all(beta in DECAYING for beta in found):
        raise UsageError(f"--opt-betas {text}: write two or more numbers from 0 to below 1, as in 0.9,0.95")
    return found


def parse_trackers(text: str) -> tuple[str, ...]:
    """Names of trackers, each once; none for 'none'. Raises UsageError for a name that none has."""
    if text == NO_TRACKER:
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in TRACKERS:
            raise unknown("tracker", name, [*TRACKERS, NO_TRACKER])
    return names
