"""What a run's log says over its steps, drawn; several runs in one plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...quantities import size
from .markup import Markup, paragraph, section
from .plots import Curve, figures, plain, plot

if TYPE_CHECKING:
    from ...training.run_record import RunRecord

EXPLAINED = {
    "drift": "how far a state that the backward pass recomputed is from the true one, ‖x̃ − x‖ / ‖x‖",
    "correction": "how far the last correction of a reversed step moved a state, relative to it",
    "contraction": "how much a step shrinks or stretches differences between states; below 1 a reversal converges",
}


def percent(value: float) -> str:
    return f"{100 * value:.4g} %"


def curve_sections(runs: Sequence[RunRecord], names: Sequence[str]) -> Markup:
    """Loss, accuracy, rate, speed and memory, then the monitor's figures by stage; names: of the runs."""
    if not any(rows for run in runs for rows in run.rows.values()):
        return section("Curves", paragraph("The log has no row yet.", class_="note"))
    parts = [
        plot("Loss", _both(runs, names, "loss")),
        *(plot(title, _both(runs, names, column), show=percent) for title, column in _accuracies(runs)),
        plot("Learning rate", _train(runs, names, "lr")),
        plot("Images per second", _train(runs, names, "images_per_second"), from_zero=True),
        _memory(runs, names),
    ]
    means = "Training rows are means over the steps since the row before; evaluations are of the images held out."
    found = section("Curves", paragraph(means, class_="note"), figures(parts))
    stages = list(dict.fromkeys(stage for run in runs for stage in run.stages))
    return Markup(found + _monitor(runs, names, stages)) if stages else found


def _accuracies(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Titles and columns of the figures by which models are compared, of one class an image and of several labels."""
    there = {run.main for run in runs}
    of_several = [("Mean average precision", "map"), ("Labels that are right", "label_accuracy")]
    return ([("Accuracy (top-1)", "top1")] if "top1" in there else []) + (of_several if "map" in there else [])


def _both(runs: Sequence[RunRecord], names: Sequence[str], column: str) -> list[Curve]:
    """A column of training steps and of evaluations: two colours for one run, dashed and solid for several."""
    found = []
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        alone = len(runs) == 1
        found += [
            Curve("training" if alone else f"{name}, training", run.figures(column), place, dashed=not alone),
            Curve("held out" if alone else f"{name}, held out", run.figures(column, "test"), place + alone),
        ]
    return found


def _train(runs: Sequence[RunRecord], names: Sequence[str], column: str) -> list[Curve]:
    if len(runs) == 1:
        return [Curve("training", runs[0].figures(column), 0)]
    return [Curve(name, run.figures(column), i) for i, (run, name) in enumerate(zip(runs, names, strict=True))]


def _memory(runs: Sequence[RunRecord], names: Sequence[str]) -> Markup | None:
    """In MiB or GiB, so that the axis has round numbers of them."""
    curves = _train(runs, names, "peak_bytes")
    largest = max((value for curve in curves for _, value in curve.points), default=0)
    unit = 2**30 if largest >= 2**30 else 2**20
    curves = [replace(curve, points=[(step, value / unit) for step, value in curve.points]) for curve in curves]
    return plot("Peak memory so far", curves, show=lambda value: size(value * unit), from_zero=True)


def _monitor(runs: Sequence[RunRecord], names: Sequence[str], stages: Sequence[str]) -> Markup:
    """A plot for each figure with the stages in colours; with several runs one for each stage too."""
    parts, said = [], []
    for figure, words in EXPLAINED.items():
        title, logarithmic = figure.capitalize(), figure != "contraction"
        if len(runs) == 1:
            curves = [Curve(stage, runs[0].figures(f"{figure}_{stage}"), i) for i, stage in enumerate(stages)]
            made = [plot(title, curves, show=plain, logarithmic=logarithmic)]
        else:
            made = [
                plot(f"{title}, {stage}", _train(runs, names, f"{figure}_{stage}"), logarithmic=logarithmic)
                for stage in stages
            ]
        if any(made):
            said.append(f"{title}: {words}.")
        parts += made
    note = "The largest since the row before. " + " ".join(said)
    return section("Reversed steps", paragraph(note, class_="note"), figures(parts)) if said else Markup()
