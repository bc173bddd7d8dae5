"""`resode check-grad MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from ..errors import ResodeError
from ..quantities import COUNT, NOT_NEGATIVE
from .options import (
    DATA_ROOT,
    AnchorsOption,
    BatchNormOption,
    CorrectionsOption,
    DataRootOption,
    DeviceOption,
    GradTolOption,
    JsonOption,
    MemoryBudgetOption,
    ModelArgument,
    RecipeOption,
    SkipCorruptOption,
    SnapshotsOption,
    SourceOption,
    TrustSourceOption,
    depth_list,
    number,
)
from .output import Output, start

if TYPE_CHECKING:
    from torch import Tensor

    from ..network.model import OdeResNet


def check_grad_command(
    model: ModelArgument,
    adjoint: Annotated[
        str,
        typer.Option(
            "--adjoint",
            help="Methods, comma-separated: auto, backprop, checkpoint, multistep, pc, euler, heun;"
            " with settings of their own as in pc:anchors=10,checkpoint:snapshots=12.",
        ),
    ] = "auto,checkpoint,multistep,pc,euler,heun",
    anchors: AnchorsOption = None,
    corrections: CorrectionsOption = 0,
    snapshots: SnapshotsOption = None,
    grad_tol: GradTolOption = 0.02,
    memory_budget: MemoryBudgetOption = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Test images to measure on. Default: a fixed random batch.")
    ] = None,
    images: Annotated[int, number("--images", range=COUNT, help="Images in the batch.")] = 32,
    bn: BatchNormOption = "frozen",
    sweep: Annotated[
        str | None, typer.Option("--sweep", help="Depths, e.g. 16,32,64: deepen by replication, error against depth.")
    ] = None,
    tol: Annotated[
        float | None, number("--tol", range=NOT_NEGATIVE, help="Exit with 1 if any relative error is above this.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the errors to this .png, .pdf or .svg.")] = None,
    device: DeviceOption = "auto",
    skip_corrupt: SkipCorruptOption = False,
    data_root: DataRootOption = DATA_ROOT,
    source: SourceOption = None,
    trust_source: TrustSourceOption = False,
    recipe: RecipeOption = None,
    json: JsonOption = False,
) -> None:
    """Measure how far each adjoint method's gradients are from true backprop, stage by stage."""
    start()
    from ..files import model_file
    from ..gradients.adjoint_choice import choose_adjoints
    from ..gradients.check_grad import StageAdjoints, SweepRow, calibrated, check_gradients, sweep_depths
    from ..machine.memory import free_bytes
    from ..measuring.forecast import forecast_gradients
    from ..network.model import as_device
    from ..ode import Adjoint
    from ..quantities import duration, finite, number, parse_bytes, size
    from ..reports.choice import calibration_json, calibration_table
    from ..reports.report import gradient_json, gradient_table, sweep_json, sweep_table

    output = Output(json_mode=json)
    choices = choose_adjoints(adjoint, anchors=anchors, corrections=corrections, snapshots=snapshots)
    budget = parse_bytes(memory_budget) if memory_budget is not None else None
    depths = depth_list("--sweep", sweep, at_least=2) if sweep is not None else None
    if plot is not None:
        from ..reports.plot_gradients import check_plot

        check_plot(plot)
    loaded = model_file.load(model, source=source, trust_source=trust_source).to(where := as_device(device))
    batches_of = _Batches(loaded, data, images, skip_corrupt, data_root, output)
    inputs, labels, what = batches_of.measured()
    if data is None:
        output.note("no --data: measured on a fixed batch of random noise with random labels")
    inputs, labels = inputs.to(where), labels.to(where)
    forecast = forecast_gradients(loaded, inputs, [c.fixed if c.fixed is not None else Adjoint("pc") for c in choices])
    wide = f" at each of {len(depths)} depths" if depths is not None else ""
    tuned = ", and calibration" if any(c.fixed is None for c in choices) else ""
    held = "; a process on the CPU grows by two to three times that" if where.type == "cpu" else ""
    output.note(
        f"predicted{wide}: {duration(forecast.seconds)}{tuned}, {size(forecast.bytes)} of tensors at a time{held}"
    )
    methods: list[Adjoint | StageAdjoints] = []
    calibrations = []
    with output.aside.status("calibrating") as status:
        for choice in choices:
            if choice.fixed is not None:
                methods.append(choice.fixed)
                continue
            calibration = calibrated(
                loaded,
                *(part.to(where) for part in batches_of.calibration()),
                tolerance=grad_tol,
                budget=budget if budget is not None else free_bytes(where),
                methods=choice.methods,
                batch_norm=bn,
                on_stage=lambda stage, tried: status.update(escape(f"calibrating {stage}: {tried}")),
            )
            calibrations.append(calibration)
            methods.append(StageAdjoints(choice.label, calibration.adjoints))
            output.show(calibration_table(calibration))
    fixed = [m for m in methods if isinstance(m, Adjoint) and m.method != "backprop"]
    if depths is not None and len(fixed) < len(methods):
        output.note("the sweep leaves out what is chosen for one depth (auto) and the reference (backprop)")
    with output.aside.status("measuring") as status:
        report = check_gradients(
            loaded,
            inputs,
            labels,
            methods=methods,
            batch_norm=bn,
            data=what,
            on_method=lambda method: status.update(escape(f"measuring {method}")),
        )
        rows: tuple[SweepRow, ...] = ()
        if depths is not None:
            rows = sweep_depths(
                loaded,
                inputs,
                labels,
                depths=depths,
                methods=fixed,
                batch_norm=bn,
                on_depth=lambda depth, method: status.update(escape(f"measuring {method} at {depth} steps")),
            )
    output.show(gradient_table(report))
    for method in report.methods:
        if method.largest_error > 0:
            worst = ", ".join(f"{name} {number(error)}" for name, error in method.worst[:3])
            output.show(f"worst parameters of {method.name}: {worst}")
    if rows:
        output.show(sweep_table(rows))
    if plot is not None:
        from ..reports.plot_gradients import plot_errors, plot_sweep

        if rows:
            plot_sweep(rows, plot)
        else:
            plot_errors(report, plot)
        output.note(f"wrote {plot}")
    failed = [m for m in report.methods if tol is not None and m.largest_error > tol]
    output.json(
        {
            **gradient_json(report),
            "calibrations": [calibration_json(calibration) for calibration in calibrations],
            "sweep": sweep_json(rows) if depths is not None else None,
            "tolerance": finite(tol),
            "within_tolerance": None if tol is None else not failed,
        }
    )
    if failed:
        names = ", ".join(f"{m.name} {number(m.largest_error)}" for m in failed)
        output.note(f"above --tol {tol:g}: {names}")
        raise typer.Exit(1)


class _Batches:
    """The batch that is measured, and another one to calibrate on: `auto` must not choose on what it is judged by."""

    def __init__(
        self, model: OdeResNet, data: str | None, images: int, skip_corrupt: bool, root: Path, output: Output
    ) -> None:
        self.output = output
        self.model, self.data, self.images, self.skip_corrupt, self.root = model, data, images, skip_corrupt, root

    def measured(self) -> tuple[Tensor, Tensor, str]:
        return self._noise(0) + ("random noise",) if self.data is None else (*self._of("test"), f"{self.data}, test")

    def calibration(self) -> tuple[Tensor, Tensor]:
        if self.data is None:
            return self._noise(1)
        try:
            return self._of("train")
        except ResodeError as error:
            self.output.note(f"calibrating on the images that are measured: {error}")
            return self._of("test")

    def _of(self, split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        from ..data import batches, open_labelled

        assert self.data is not None
        info = self.model.info
        samples = open_labelled(
            self.data, info, split, images=self.images, skip_corrupt=self.skip_corrupt, root=self.root
        )
        self.output.notes(samples.notes)
        batch = next(batches(samples, len(samples)))
        self.output.notes([samples.skipped_note()])
        return batch.images, batch.labels

    def _noise(self, seed: int) -> tuple[Tensor, Tensor]:
        import torch

        from ..surgery.convert import random_batch

        labels = torch.randint(
            self.model.info.num_classes, (self.images,), generator=torch.Generator().manual_seed(seed)
        )
        return random_batch(self.model.info.preprocessing, self.images, seed=seed), labels
