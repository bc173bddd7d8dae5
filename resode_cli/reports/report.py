"""Results for people (rich tables) and for programs (JSON-ready dictionaries).

JSON holds fractions, bytes and seconds; a figure that is not finite is null.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..quantities import counted, finite, number, size
from .choice import choice_json
from .tables import plain_table

if TYPE_CHECKING:
    from ..gradients.gradient_errors import GradientReport, StageGradient, SweepRow
    from ..measuring.evaluate import Measured
    from ..network.model import OdeResNet
    from ..training.results import FinetuneResult


@dataclass(frozen=True)
class StageRow:
    """One line of the stage table. parameters: how many the distinct residual blocks have."""

    stage: str
    transition: tuple[str, ...]
    blocks: int
    steps: int
    weights: str
    horizon: float
    step_size: float
    parameters: int
    transition_parameters: int
    scheme: str
    form: str
    activation: str


def stage_rows(model: OdeResNet) -> list[StageRow]:
    rows = []
    for name, stage in model.stages.items():
        spec = stage.spec
        transition = sum(p.numel() for block in stage.transition for p in block.parameters())
        rows.append(
            StageRow(
                stage=name,
                transition=spec.transition,
                blocks=len(spec.blocks),
                steps=spec.depth,
                weights=spec.kind if spec.depth else "none",
                horizon=float(spec.horizon),
                step_size=spec.step_size,
                parameters=sum(p.numel() for p in stage.parameters()) - transition,
                transition_parameters=transition,
                scheme=spec.scheme,
                form=spec.form,
                activation=stage.activation,
            )
        )
    return rows


def stage_table(rows: Sequence[StageRow], *, title: str) -> Table:
    table = plain_table(title)
    table.add_column("stage")
    table.add_column("transition")
    for column in ("blocks", "steps", "T", "h", "parameters"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("rule")
    table.add_column("form")
    for row in rows:
        transition = ", ".join(row.transition)
        table.add_row(
            row.stage,
            f"{transition} ({row.transition_parameters:,})" if transition else "–",
            str(row.blocks),
            str(row.steps),
            f"{row.horizon:g}",
            f"{row.step_size:.4g}",
            f"{row.parameters:,}",
            row.scheme,
            row.form,
        )
    return table


def verification_line(verified: Mapping[str, Any]) -> str:
    """One line on a Verification's record.

    Noise can show that a function is kept, and that it is not; how good a changed one is it does not show.
    """
    where = f"on {verified['images']} {verified['batch']}"
    if verified["identical"]:
        return f"verified {where}: logits identical"
    difference = f"logits differ by up to {verified['max_difference']:.3g}"
    if verified["function_kept"]:
        return f"verified {where}: {difference} (rounding)"
    return f"the function has changed ({where} {difference}); nothing is known of its accuracy"


# What figures of an evaluation are called.
CALLED = {"top1": "top-1", "top5": "top-5", "map": "mAP", "exact_match": "exact match"}
CALLED |= {"micro_f1": "micro-F1", "macro_f1": "macro-F1", "loss": "loss"}


def _figures(evaluation: Measured) -> dict[str, str]:
    """By what they are called."""
    own = evaluation.figures.items()
    return {CALLED[name]: f"{value:.4f}" if name == "loss" else f"{value:.2%}" for name, value in own}


def evaluation_line(evaluation: Measured) -> str:
    figures = ", ".join(f"{name} {value}" for name, value in _figures(evaluation).items())
    line = f"{figures} on {counted(evaluation.images, 'image')}"
    return line + (f" ({counted(len(evaluation.skipped), 'corrupt file')} skipped)" if evaluation.skipped else "")


def evaluation_table(found: Mapping[str, Measured], data: str) -> Table:
    """Evaluations by split, and how many corrupt files each left out where one did."""
    table = plain_table(f"{data}, by split")
    table.add_column("split", no_wrap=True)
    skipped = any(evaluation.skipped for evaluation in found.values())
    for column in ("images", *_figures(next(iter(found.values()))), *(["skipped"] if skipped else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for split, own in found.items():
        more = [f"{len(own.skipped):,}"] if skipped else []
        table.add_row(split, f"{own.images:,}", *_figures(own).values(), *more)
    return table


def adjoints_line(adjoints: Mapping[str, str]) -> str:
    """Each part's method, by its label."""
    return "adjoints: " + "; ".join(f"{part} {label}" for part, label in adjoints.items())


def evaluation_json(evaluation: Measured) -> dict[str, Any]:
    return {**evaluation.figures, "images": evaluation.images, "skipped": list(evaluation.skipped)}


def gradient_table(report: GradientReport) -> Table:
    images = counted(report.images, "image")
    if report.batches > 1:
        images = f"median of {report.batches} batches of {images}, with the range"
    table = plain_table(f"gradients against backprop: {images} ({report.data}), BatchNorm {report.batch_norm}")
    table.add_column("method")
    table.add_column("stage")
    for column in (
        "steps",
        "relative\nerror",
        "cosine",
        "transition\nerror",
        "drift",
        "evals\nper step",
    ):
        table.add_column(column, justify="right")
    table.add_column("kept", justify="right", no_wrap=True)
    for method in report.methods:
        name = f"{method.name} ({method.scheme} rule)" if method.scheme_switched else method.name
        for row in method.stages:
            if row.adjoint not in (None, method.name):
                name = f"  {row.adjoint}"
            table.add_row(
                name,
                row.stage,
                str(row.steps) if row.steps else "–",
                _with_range(row),
                f"{row.cosine:.5f}" if math.isfinite(row.cosine) else "not finite",
                number(row.transition_error),
                number(row.drift),
                "–" if row.evaluations_per_step is None else f"{row.evaluations_per_step:.2f}",
                "–" if row.bytes_kept is None else size(row.bytes_kept),
            )
            name = ""
        table.add_section()
    return table


def _with_range(row: StageGradient) -> str:
    error = number(row.relative_error)
    return error if row.least_error is None else f"{error}\n{number(row.least_error)}–{number(row.largest_error)}"


def gradient_json(report: GradientReport) -> dict[str, Any]:
    methods = []
    for method in report.methods:
        worst = [{"parameter": name, "relative_error": error} for name, error in method.worst]
        described = asdict(method)
        del described["parameters"]  # hundreds, for --per-parameter
        methods.append({**described, "worst": worst, "largest_error": method.largest_error})
    return finite({**asdict(report), "methods": methods})


def parameters_csv(report: GradientReport) -> str:
    """Every method's gradient of every parameter, as a table with a header: figure 3c of the paper has such points."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "scheme", "parameter", "relative_error", "cosine"])
    for method in report.methods:
        for own in method.parameters:
            writer.writerow([method.name, method.scheme, own.parameter, own.relative_error, own.cosine])
    return text.getvalue()


def sweep_table(rows: Sequence[SweepRow]) -> Table:
    table = plain_table("relative gradient error against depth")
    table.add_column("method")
    table.add_column("stage")
    for depth in rows[0].depths:
        table.add_column(f"N={depth}", justify="right")
    table.add_column("slope", justify="right")
    for row in rows:
        slope = "–" if row.slope is None else f"{row.slope:.2f}"
        slope += "" if row.slope_error is None else f" ± {row.slope_error:.2f}"
        table.add_row(row.method, row.stage, *(number(e) for e in row.errors), slope)
    return table


def sweep_json(rows: Iterable[SweepRow]) -> list[dict[str, Any]]:
    return finite([{**asdict(row), "slope": row.slope, "slope_error": row.slope_error} for row in rows])


def finetune_json(result: FinetuneResult) -> dict[str, Any]:
    record = {k: v for k, v in vars(result).items() if k not in ("before", "after", "chosen", "main", "best_top1")}
    record[f"best_{result.main}"] = result.best_top1
    for name in ("before", "after"):
        evaluation = getattr(result, name)
        record[name] = None if evaluation is None else evaluation_json(evaluation)
    record["calibration"] = None if result.chosen is None else choice_json(result.chosen)
    return finite(record)
