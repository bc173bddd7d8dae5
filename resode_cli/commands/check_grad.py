"""`resode check-grad MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .options import (
    DATA_ROOT,
    BatchNormOption,
    DataRootOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    RecipeOption,
    SkipCorruptOption,
    SourceOption,
)
from .output import Output, start


def check_grad_command(
    model: ModelArgument,
    adjoint: Annotated[
        str, typer.Option("--adjoint", help="Methods, comma-separated: backprop, checkpoint, euler, heun, pc.")
    ] = "checkpoint,euler,heun,pc",
    anchors: Annotated[
        int | None, typer.Option("--anchors", help="Hold every K-th state (checkpoint alone holds each by default).")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Test images to measure on. Default: a fixed random batch.")
    ] = None,
    images: Annotated[int, typer.Option("--images", help="Images in the batch.")] = 32,
    bn: BatchNormOption = "frozen",
    sweep: Annotated[
        str | None, typer.Option("--sweep", help="Depths, e.g. 16,32,64: deepen by replication, error against depth.")
    ] = None,
    tol: Annotated[float | None, typer.Option("--tol", help="Exit with 1 if any relative error is above this.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the errors to this .png, .pdf or .svg.")] = None,
    device: DeviceOption = "auto",
    skip_corrupt: SkipCorruptOption = False,
    data_root: DataRootOption = DATA_ROOT,
    source: SourceOption = None,
    recipe: RecipeOption = None,
    json: JsonOption = False,
) -> None:
    """Measure how far each adjoint method's gradients are from true backprop, stage by stage."""
    start()
    import torch

    from .. import model_file
    from ..check_grad import SweepRow, check_gradients, sweep_depths
    from ..conversion import random_batch
    from ..data import batches, check_classes, open_data
    from ..model import as_device
    from ..ode import Adjoint
    from ..report import finite, gradient_json, gradient_table, number, sweep_json, sweep_table

    output = Output(json_mode=json)
    methods = [Adjoint(name.strip(), None if name.strip() == "backprop" else anchors) for name in adjoint.split(",")]
    depths = _depths(sweep) if sweep is not None else None
    if plot is not None:
        from ..plot import check_plot

        check_plot(plot)
    if images < 1:
        raise UsageError(f"--images {images}: must be 1 or more")
    loaded = model_file.load(model, source=source).to(where := as_device(device))
    if data is not None:
        samples = open_data(
            data, loaded.info.preprocessing, "test", images=images, skip_corrupt=skip_corrupt, root=data_root
        )
        check_classes(samples, loaded.info.num_classes, loaded.info.class_names)
        batch = next(batches(samples, len(samples)))
        inputs, labels, what = batch.images, batch.labels, f"{data}, test"
    else:
        inputs, what = random_batch(loaded.info.preprocessing, images), "random noise"
        labels = torch.randint(loaded.info.num_classes, (images,), generator=torch.Generator().manual_seed(0))
        output.note("no --data: measured on a fixed batch of random noise with random labels")
    inputs, labels = inputs.to(where), labels.to(where)
    with output.aside.status("measuring") as status:
        report = check_gradients(
            loaded,
            inputs,
            labels,
            methods=methods,
            batch_norm=bn,
            data=what,
            on_method=lambda method: status.update(f"measuring {method}"),
        )
        rows: tuple[SweepRow, ...] = ()
        if depths is not None:
            rows = sweep_depths(
                loaded,
                inputs,
                labels,
                depths=depths,
                methods=[m for m in methods if m.method != "backprop"],
                batch_norm=bn,
                on_depth=lambda depth, method: status.update(f"measuring {method} at {depth} steps"),
            )
    output.show(gradient_table(report))
    for method in report.methods:
        if method.largest_error > 0:
            worst = ", ".join(f"{name} {number(error)}" for name, error in method.worst[:3])
            output.show(f"worst parameters of {method.name}: {worst}")
    if rows:
        output.show(sweep_table(rows))
    if plot is not None:
        from ..plot import plot_errors, plot_sweep

        if rows:
            plot_sweep(rows, plot)
        else:
            plot_errors(report, plot)
        output.note(f"wrote {plot}")
    failed = [m for m in report.methods if tol is not None and m.largest_error > tol]
    output.json(
        {
            **gradient_json(report),
            "sweep": sweep_json(rows) if depths is not None else None,
            "tolerance": finite(tol),
            "within_tolerance": None if tol is None else not failed,
        }
    )
    if failed:
        names = ", ".join(f"{m.name} {number(m.largest_error)}" for m in failed)
        output.note(f"above --tol {tol:g}: {names}")
        raise typer.Exit(1)


def _depths(text: str) -> list[int]:
    try:
        depths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        depths = []
    if len(depths) < 2 or depths[0] < 1:
        raise UsageError(f"--sweep {text!r}: write two or more depths, as in 16,32,64")
    return depths
