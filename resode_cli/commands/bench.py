"""`resode bench MODEL` or `resode bench --stage-shape C,H,W`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..errors import UsageError, unknown
from ..options import ADJOINT_SETTINGS
from ..quantities import COUNT, SEED
from ..training.choices import of_one_process
from ..training.settings import Settings
from .completion import adjoints
from .options import (
    BatchSizeOption,
    DeviceOption,
    JsonOption,
    Origin,
    RecipeOption,
    check_writable,
    depth_list,
    number,
)
from .output import Output, start
from .parameters import Fields, takes
from .working_folder import current_model

if TYPE_CHECKING:
    from ..bench.stage_shape import StageShape
    from ..bench.workload import Workload
    from ..ode import Adjoint


BACKWARD = (*ADJOINT_SETTINGS, "bn", "amp", "compile", "channels_last")


@takes(backward=Fields(Settings(bn="batch"), only=BACKWARD), origin=Fields(Origin()))
def bench_command(
    *,
    model: Annotated[Path | None, typer.Argument(help="Model file, as written by `resode convert`.")] = None,
    stage_shape: Annotated[
        str | None, typer.Option("--stage-shape", help="Instead of a model: one stage of random blocks, C,H,W.")
    ] = None,
    block: Annotated[
        str | None, typer.Option("--block", help="Of --stage-shape: 'basic' (default) or 'bottleneck', pre-activation.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Of --stage-shape: 'tied' (default), 'untied' or 'smooth' in depth.")
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme", help="Forward rule of --stage-shape: 'euler' (default), 'heun', 'heunnet', 'midpoint' or 'rk4'."
        ),
    ] = None,
    adjoint: Annotated[
        str,
        typer.Option(
            "--adjoint",
            autocompletion=adjoints,
            help="Methods, comma-separated, each with settings of its own if need be: multistep,pc:anchors=10."
            " Plain backprop and torch.utils.checkpoint are always measured too.",
        ),
    ] = "multistep,pc,checkpoint",
    backward: Any,
    depths: Annotated[
        str | None,
        typer.Option("--depths", help="Steps per stage, e.g. 16,64. Default: a model's own; 16,64 of --stage-shape."),
    ] = None,
    batch_size: BatchSizeOption = 64,
    input_size: Annotated[
        str | None,
        typer.Option("--input-size", help="Pixels: 224, or height and width: 256x128. Default: the model's."),
    ] = None,
    repeats: Annotated[
        int, number("--repeats", range=COUNT, help="Timed steps of each method, after one warm-up.")
    ] = 5,
    rivals: Annotated[
        bool,
        typer.Option(
            "--rivals",
            help="Also what people do to the network unconverted: timm's checkpointing, torch.compile with a memory"
            " budget, micro-batches, activations on the host.",
        ),
    ] = False,
    largest_batch: Annotated[
        bool, typer.Option("--largest-batch", help="On a GPU: also find the largest batch that fits, to within 2 %.")
    ] = False,
    simulate: Annotated[
        str | None,
        typer.Option(
            "--simulate",
            help="'cuda' or 'cpu': predict the peak memory of plain backprop and of the methods there, without running"
            " them. The device need not be there.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    seed: Annotated[int, number("--seed", range=SEED, help="Of random weights, labels and layers.")] = 0,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write the rows to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw memory, error and time to this .png, .pdf or .svg.")
    ] = None,
    origin: Origin,
    recipe: RecipeOption = None,
    json: JsonOption = False,
) -> None:
    """Measure time, memory, evaluations and gradient error of the methods, against backprop and torch checkpoint."""
    if model is not None and stage_shape is not None:
        raise UsageError("give either a model file or --stage-shape C,H,W, not both")
    if model is None and stage_shape is None:
        model = current_model("give either a model file or --stage-shape C,H,W", Output(json_mode=json))
    methods = _methods(adjoint, **{name: getattr(backward, name) for name in ADJOINT_SETTINGS})
    steps = depth_list("--depths", depths) if depths is not None else None
    if simulate is not None:
        others = {"--rivals": rivals, "--largest-batch": largest_batch, "--csv": csv, "--plot": plot}
        _check_simulation(simulate, model, others)
    _check_files(csv, plot)
    start()
    from ..bench.run import bench
    from ..bench.workload import Workload
    from ..network.model import as_device
    from ..network.parts import parse_size
    from ..reports.bench import bench_csv, bench_json, bench_table

    output = Output(json_mode=json)
    shape = _shape(stage_shape, {"block": block, "weights": weights, "scheme": scheme})
    if shape is not None and (input_size is not None or origin.source is not None):
        raise UsageError(f"--{'input-size' if input_size is not None else 'source'} goes with a model file")
    workload = Workload(
        model=None if model is None else str(model),
        source=origin.source,
        trust_source=origin.trust_source,
        input_size=None if input_size is None else parse_size(input_size),
        shape=shape,
        batch_size=batch_size,
        bn=of_one_process(backward.bn),
        amp=backward.amp,
        channels_last=backward.channels_last,
        compiled=backward.compile,
        device=str(as_device(device)),
        seed=seed,
    )
    if simulate is not None:
        _simulate(output, workload, methods, simulate, steps)
        return
    with output.aside.status("measuring") as status:
        report = bench(
            workload,
            methods,
            depths=steps or ((16, 64) if shape is not None else None),
            repeats=repeats,
            find_largest_batch=largest_batch,
            rivals=rivals,
            on_progress=lambda what: status.update(escape(f"measuring {what}")),
        )
    output.show(bench_table(report))
    if csv is not None:
        from ..machine.atomic import atomic_path

        with atomic_path(csv) as temporary:
            temporary.write_text(bench_csv(report))
        output.note(f"wrote {csv}")
    if plot is not None:
        from ..reports.plot_bench import plot_bench

        plot_bench(report, plot)
        output.note(f"wrote {plot}")
    output.json(bench_json(report))


def _check_simulation(device: str, model: Path | None, others: dict[str, Any]) -> None:
    """Raises UsageError for what cannot be simulated."""
    if device not in ("cpu", "cuda"):
        raise unknown("device to simulate", device, ("cpu", "cuda"))
    if model is None:
        raise UsageError("--simulate needs a model file: a stage by itself is measured")
    for flag, value in others.items():
        if value:
            raise UsageError(f"{flag} is for what is measured, and --simulate runs nothing: leave out one")


def _simulate(
    output: Output, workload: Workload, methods: list[Adjoint], device: str, depths: list[int] | None
) -> None:
    from dataclasses import asdict

    from ..bench.simulated import simulate
    from ..reports.bench import simulated_table

    with output.aside.status("simulating") as status:
        report = simulate(
            workload,
            methods,
            device=device,
            depths=depths,
            on_progress=lambda what: status.update(escape(f"simulating {what}")),
        )
    output.show(simulated_table(report))
    output.json(asdict(report))


def _methods(adjoint: str, **settings: Any) -> list[Adjoint]:
    """The adjoints of a list such as 'multistep,pc:anchors=10'."""
    from ..gradients.adjoint_choice import parse_adjoints

    methods: list[Adjoint] = []
    for choice in parse_adjoints(adjoint, **settings):
        if choice.fixed is None:
            raise UsageError(
                f"--adjoint {choice.label}: bench times fixed methods; `resode check-grad` says what auto would choose"
            )
        if choice.fixed in methods:
            raise UsageError(f"--adjoint {adjoint!r}: {choice.label} is there twice")
        methods.append(choice.fixed)
    return methods


def _shape(text: str | None, settings: dict[str, str | None]) -> StageShape | None:
    from ..bench.stage_shape import StageShape

    given = {name: value for name, value in settings.items() if value is not None}
    if text is None:
        if given:
            raise UsageError(f"--{next(iter(given))} goes with --stage-shape; a model file has its own")
        return None
    try:
        channels, height, width = (int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--stage-shape {text!r}: write channels, height and width, as in 32,32,32") from None
    return StageShape(channels, height, width, **given)


def _check_files(csv: Path | None, plot: Path | None) -> None:
    """Refuse, before any work is done, files that cannot be written."""
    if csv is not None:
        check_writable("--csv", csv)
    if plot is not None:
        from ..reports.plot_gradients import check_plot

        check_plot(plot)
