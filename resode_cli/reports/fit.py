"""A fit and what a rewrite did to a network, for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from ..fitting.results import FitResult, PhaseCost, PhaseResult
from ..measuring.comparison import NetworkFigures
from ..quantities import counted, duration, finite, number, size
from .tables import plain_table

ENDED = {
    "done": "",
    "early": "stopped early: no more gain",
    "late": "its time was over",
    "interrupted": "interrupted",
    "settled": "nothing to fit",
    "reverted": "undone: it made things worse",
}


def cost_table(costs: Sequence[PhaseCost], *, images: int, minutes: float) -> Table:
    """minutes: that the fit may take, where no number of steps was given."""
    table = plain_table(f"predicted, from one step of each phase on {counted(images, 'image')}")
    for column in ("phase", "steps per stage"):
        table.add_column(column)
    for column in ("training steps", "time", "memory"):
        table.add_column(column, justify="right")
    table.add_column("backward")
    for cost in costs:
        table.add_row(
            cost.phase,
            _joined(cost.depths.values()),
            "while they gain" if cost.steps is None else str(cost.steps),
            duration(cost.seconds) + (" a step" if cost.steps is None else ""),
            size(cost.bytes),
            cost.adjoint,
        )
    if len(costs) > 1:
        most = size(max(cost.bytes for cost in costs))
        if any(cost.steps is None for cost in costs):
            table.add_row("all", "", "", f"about {duration(60 * minutes)}", most, "")
        else:
            total = sum(cost.seconds for cost in costs)
            table.add_row("all", "", "", duration(total), most, "")
    return table


def _joined(values: Any) -> str:
    return " / ".join(str(v) for v in values)


def phase_line(result: PhaseResult) -> str:
    before, after = result.before, result.after
    name = result.phase if result.round == 1 else f"{result.phase}, round {result.round}"
    line = f"{name}: {counted(result.steps, 'step')} in {duration(result.seconds)}"
    if result.steps:
        line += f" at {number(result.rate)}"
    if before.states:
        line += f", state error {number(math.sqrt(before.state_error))} → {number(math.sqrt(after.state_error))}"
    line += (
        f", loss of the logits {number(before.logits)} → {number(after.logits)},"
        f" agreement {before.agreement:.1%} → {after.agreement:.1%}"
    )
    return line + (f" ({ENDED[result.ended]})" if ENDED[result.ended] else "")


def block_table(result: PhaseResult) -> Table:
    """The state error after each source block, at the end of a phase."""
    table = plain_table("relative error of the state after each source block, on held-out images")
    table.add_column("stage")
    table.add_column("after block")
    table.add_column("error")
    for name, errors in result.after.states.items():
        table.add_row(name, f"0 … {len(errors) - 1}", " ".join(f"{error:.3f}" for error in errors))
    return table


def figures_table(columns: Sequence[NetworkFigures], *, reference: str, noise: bool) -> Table:
    """One column per network. noise: the images are none, and agreement on them says nothing."""
    images = counted(columns[0].images, "random image" if noise else "image")
    table = plain_table(f"against {reference}, on {images}")
    table.add_column("")
    for column in columns:
        table.add_column(column.name, justify="right")

    def row(label: str, show: Callable[[NetworkFigures], str]) -> None:
        table.add_row(label, *(show(column) for column in columns))

    if any(column.top1 is not None for column in columns):
        row("top-1", lambda c: "–" if c.top1 is None else f"{c.top1:.2%}")
    if not noise:
        row("agreement", lambda c: f"{c.agreement:.1%}")
    row("distance of logits", lambda c: number(c.logit_distance))
    row("parameters", lambda c: f"{c.parameters:,}")
    row("steps", lambda c: _joined(c.steps.values()))
    row("branch evaluations per image", lambda c: f"{c.evaluations:,}")
    methods = dict.fromkeys(method for column in columns for method in column.gradient_errors)
    for method in methods:

        def errors(column: NetworkFigures, method: str = method) -> str:
            found = column.gradient_errors.get(method)
            return "–" if found is None else " / ".join(number(e) for e in found.values())

        row(f"gradient error, {method}", errors)
    return table


def figures_json(columns: Sequence[NetworkFigures]) -> list[dict[str, Any]]:
    return finite([asdict(column) for column in columns])


def fit_json(result: FitResult) -> dict[str, Any]:
    phases = [
        {**asdict(phase), "before": _figures(phase, "before"), "after": _figures(phase, "after")}
        for phase in result.phases
    ]
    return finite({**asdict(result), "phases": phases})


def _figures(phase: PhaseResult, when: str) -> dict[str, Any]:
    figures = getattr(phase, when)
    return {**asdict(figures), "state_error": math.sqrt(figures.state_error)}
