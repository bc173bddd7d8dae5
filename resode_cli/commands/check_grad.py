"""`resode check-grad MODEL`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from ..errors import ResodeError, UsageError
from ..options import ADJOINT_SETTINGS
from ..quantities import COUNT, NOT_NEGATIVE
from ..training.choices import of_one_process
from ..training.settings import Settings
from ..training.written import budget_bytes
from .completion import adjoints
from .options import (
    DATA,
    DeviceOption,
    JsonOption,
    ModelArgument,
    Origin,
    Reading,
    RecipeOption,
    check_auto,
    check_writable,
    depth_list,
    number,
)
from .output import Output, start
from .parameters import Fields, Given, takes

if TYPE_CHECKING:
    from torch import Tensor

    from ..network.model import OdeResNet


BACKWARD = (*ADJOINT_SETTINGS, "grad_tol", "memory_budget", "bn")


@takes(
    backward=Fields(Settings(), only=BACKWARD),
    reading=Fields(Reading(), but=("images",)),
    origin=Fields(Origin()),
)
def check_grad_command(
    *,
    model: ModelArgument,
    adjoint: Annotated[
        str,
        typer.Option(
            "--adjoint",
            autocompletion=adjoints,
            help="Methods, comma-separated: auto, backprop, checkpoint, multistep, pc, euler, heun, heunnet, midpoint,"
            " rk4; with settings of their own as in pc:anchors=10,checkpoint:snapshots=12.",
        ),
    ] = "auto,checkpoint,multistep,pc,euler,heun",
    backward: Any,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", "-d", help="Test images to measure on. Default: a fixed random batch.", rich_help_panel=DATA
        ),
    ] = None,
    images: Annotated[int, number("--images", range=COUNT, help="Images in a batch.", group=DATA)] = 32,
    batches: Annotated[
        int, number("--batches", range=COUNT, help="Batches: errors are their median, with the range.", group=DATA)
    ] = 1,
    sweep: Annotated[
        str | None, typer.Option("--sweep", help="Depths, e.g. 16,32,64: deepen by replication, error against depth.")
    ] = None,
    tol: Annotated[
        float | None, number("--tol", range=NOT_NEGATIVE, help="Exit with 1 if any relative error is above this.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the errors to this .png, .pdf or .svg.")] = None,
    per_parameter: Annotated[
        Path | None,
        typer.Option("--per-parameter", help="Write error and cosine of every parameter's gradient to this .csv."),
    ] = None,
    device: DeviceOption = "auto",
    reading: Reading,
    origin: Origin,
    recipe: RecipeOption = None,
    json: JsonOption = False,
    given: Given,
) -> None:
    """Measure how far each adjoint method's gradients are from true backprop, stage by stage."""
    start()
    from ..gradients.adjoint_choice import parse_adjoints
    from ..gradients.check_grad import StageAdjoints, check_batches, choose_as_measured, sweep_depths
    from ..gradients.gradient_errors import SweepRow
    from ..machine.atomic import atomic_path
    from ..measuring.forecast import forecast_gradients
    from ..network.model import as_device
    from ..ode import Adjoint
    from ..quantities import duration, finite, number, size
    from ..reports.choice import choice_json, choice_table
    from ..reports.report import gradient_json, gradient_table, parameters_csv, sweep_json, sweep_table
    from ..simulation.step import CannotSimulate

    output = Output(json_mode=json)
    budget = budget_bytes(backward.memory_budget)
    choices = parse_adjoints(adjoint, **{name: getattr(backward, name) for name in ADJOINT_SETTINGS})
    check_auto(given, chooses=any(choice.fixed is None for choice in choices))
    depths = depth_list("--sweep", sweep, at_least=2) if sweep is not None else None
    if plot is not None:
        from ..reports.plot_gradients import check_plot

        check_plot(plot)
    if per_parameter is not None:
        check_writable("--per-parameter", per_parameter)
    loaded = origin.load(model).to(where := as_device(device))
    batches_of = _Batches(loaded, data, replace(reading, images=images), batches, output)
    measured, what = batches_of.measured()
    if data is None:
        output.note("no --data: measured on a fixed batch of random noise with random labels")
    measured = [(inputs.to(where), labels.to(where)) for inputs, labels in measured]
    forecast = forecast_gradients(
        loaded, measured[0][0], [c.fixed if c.fixed is not None else Adjoint("pc") for c in choices]
    )
    wide = f" at each of {len(depths)} depths" if depths is not None else ""
    tuned = ", and calibration" if any(c.fixed is None for c in choices) else ""
    held = "; a process on the CPU grows by two to three times that" if where.type == "cpu" else ""
    tensors = "its memory cannot be predicted"
    if forecast.bytes is not None:
        tensors = f"{size(forecast.bytes)} of tensors at a time{held}"
    output.note(f"predicted{wide}: {duration(forecast.seconds * batches)}{tuned}, {tensors}")
    methods: list[Adjoint | StageAdjoints] = []
    chosen = []
    with output.aside.status("calibrating") as status:
        for choice in choices:
            if choice.fixed is not None:
                methods.append(choice.fixed)
                continue
            try:
                found = choose_as_measured(
                    loaded,
                    *(part.to(where) for part in batches_of.to_choose_on()),
                    tolerance=backward.grad_tol,
                    budget=budget,
                    methods=choice.methods,
                    batch_norm=of_one_process(backward.bn),
                    on_stage=lambda stage, tried: status.update(escape(f"calibrating {stage}: {tried}")),
                )
            except CannotSimulate as reason:
                raise ResodeError(f"{reason}; name methods, as in --adjoint checkpoint,pc") from reason
            chosen.append(found)
            methods.append(StageAdjoints(choice.label, found.adjoints))
            output.show(choice_table(found))
    fixed = [m for m in methods if isinstance(m, Adjoint) and m.replays]
    if depths is not None and len(fixed) < len(methods):
        output.note("the sweep leaves out what is chosen for one depth (auto) and the reference (backprop)")
    with output.aside.status("measuring") as status:
        report = check_batches(
            loaded,
            measured,
            methods=methods,
            batch_norm=of_one_process(backward.bn),
            data=what,
            on_method=lambda method: status.update(escape(f"measuring {method}")),
        )
        rows: tuple[SweepRow, ...] = ()
        if depths is not None:
            rows = sweep_depths(
                loaded,
                measured,
                depths=depths,
                methods=fixed,
                batch_norm=of_one_process(backward.bn),
                on_depth=lambda depth, method: status.update(escape(f"measuring {method} at {depth} steps")),
            )
    output.show(gradient_table(report))
    for method in report.methods:
        if method.largest_error > 0:
            worst = ", ".join(f"{name} {number(error)}" for name, error in method.worst[:3])
            output.show(f"worst parameters of {method.name}: {worst}")
    if rows:
        output.show(sweep_table(rows))
    if per_parameter is not None:
        with atomic_path(per_parameter) as temporary:
            temporary.write_text(parameters_csv(report))
        output.note(f"wrote {per_parameter}")
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
            "calibrations": [choice_json(found) for found in chosen],
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
    """The batches that are measured, and another one to choose on: `auto` must not choose on what it is judged by."""

    def __init__(self, model: OdeResNet, data: str | None, reading: Reading, count: int, output: Output) -> None:
        reading.check_used(data)
        self.model, self.data, self.reading, self.count, self.output = model, data, reading, count, output

    def measured(self) -> tuple[list[tuple[Tensor, Tensor]], str]:
        if self.data is None:
            return [self._noise(seed) for seed in (0, *range(2, self.count + 1))], "random noise"
        return self._of("test", self.count), f"{self.data}, test"

    def to_choose_on(self) -> tuple[Tensor, Tensor]:
        if self.data is None:
            return self._noise(1)
        try:
            return self._of("train", 1)[0]
        except ResodeError as error:
            self.output.note(f"calibrating on the images that are measured: {error}")
            return self._of("test", 1)[0]

    def _of(self, split: Literal["train", "test"], count: int) -> list[tuple[Tensor, Tensor]]:
        """So many batches, each evenly spaced over the data, no image in two of them."""
        from ..data import batches

        assert self.data is not None and self.reading.images is not None
        wanted = replace(self.reading, images=self.reading.images * count)
        samples = wanted.open(self.data, self.model, split)
        self.output.notes(samples.notes)
        if count > 1 and len(samples) < count * self.reading.images:
            raise UsageError(
                f"--batches {count} of {self.reading.images} images need {count * self.reading.images}, but {self.data}"
                f" has {len(samples)} for testing; lower one of --batches and --images"
            )
        order = [i for first in range(count) for i in range(first, len(samples), count)]
        found = list(batches(samples, -(-len(samples) // count), order=order))
        self.output.notes([samples.skipped_note()])
        return [(batch.images, batch.labels) for batch in found]

    def _noise(self, seed: int) -> tuple[Tensor, Tensor]:
        import torch

        from ..surgery.convert import random_batch

        info, images = self.model.info, self.reading.images
        assert images is not None
        labels = torch.randint(info.num_classes, (images,), generator=torch.Generator().manual_seed(seed))
        return random_batch(info.preprocessing, images, seed=seed), labels
