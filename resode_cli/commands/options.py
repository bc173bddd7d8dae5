"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..recipe import read_recipe


def fill_from_recipe(ctx: typer.Context, value: Path | None) -> Path | None:
    """Let a recipe supply defaults: flags win wherever they stand, and values are checked as flags are."""
    if value is not None:
        names = [p.name for p in ctx.command.params if p.name not in (None, "recipe", "help", "resume")]
        settings = read_recipe(value, ctx.info_name or "", [name for name in names if name])
        ctx.default_map = {**(ctx.default_map or {}), **settings}
    return value


# Typer reads annotations at run time and needs the names they use.
ModelArgument = Annotated[Path, typer.Argument(help="Model file, as written by `resode convert`.")]
OutputOption = Annotated[Path, typer.Option("--out", "-o", help="Model file to write (.safetensors).")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite the output if it exists.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
RecipeOption = Annotated[
    Path | None,
    typer.Option(
        "--recipe", help="TOML file with defaults for these options.", is_eager=True, callback=fill_from_recipe
    ),
]
SourceOption = Annotated[
    str | None,
    typer.Option("--source", help="FILE.py:FUNCTION, if the network's own file has moved."),
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data", "-d", help="'digits', a torchvision name (cifar10, …) or a folder with train and test (or val)."
    ),
]
OptionalDataOption = Annotated[
    str | None,
    typer.Option("--data", "-d", help="Data on which to measure accuracy before and after (test split)."),
]
ImagesOption = Annotated[int | None, typer.Option("--images", help="Use this many images, evenly spaced.")]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", "-b", help="Images per batch.")]
DeviceOption = Annotated[str, typer.Option("--device", help="'auto', 'cpu', 'cuda', 'cuda:1', …")]
WorkersOption = Annotated[int, typer.Option("--workers", help="Processes that read images; 0: none besides this one.")]
SkipCorruptOption = Annotated[bool, typer.Option("--skip-corrupt", help="Leave unreadable images out, counting them.")]
DataRootOption = Annotated[Path, typer.Option("--data-root", help="Where torchvision data sets are kept.")]
StageOption = Annotated[
    list[str] | None,
    typer.Option(
        "--stage", help="Stages, by name (layer3) or place (3), comma-separated or given again. Default: all."
    ),
]
BatchNormOption = Annotated[
    str, typer.Option("--bn", help="BatchNorm: 'frozen' (running statistics) or 'batch' (the batch's own).")
]
AnchorsOption = Annotated[
    str | None,
    typer.Option(
        "--anchors",
        help="Hold every K-th state; 'auto': as many as --grad-tol needs; 'none'. Default: the method's own.",
    ),
]
CorrectionsOption = Annotated[int, typer.Option("--corrections", help="Extra evaluations per reversed step.")]
SnapshotsOption = Annotated[
    int | None, typer.Option("--snapshots", help="For checkpoint: hold this many states, optimally placed.")
]
GradTolOption = Annotated[
    float, typer.Option("--grad-tol", help="Relative gradient error of a stage that 'auto' may accept.")
]
MemoryBudgetOption = Annotated[
    str | None,
    typer.Option("--memory-budget", help="Of a training step, e.g. 8GiB, for 'auto'. Default: what is free."),
]
GradientsOption = Annotated[
    bool | None,
    typer.Option(
        "--gradients/--no-gradients",
        help="Report the gradient errors of reversals, before and after. Default: where there is a fit.",
    ),
]
DATA_ROOT = Path("~/.cache/resode")


def check_safetensors(path: Path) -> Path:
    """Raises UsageError for an output whose name would say it is something else."""
    if path.suffix != ".safetensors":
        raise UsageError(f"output {str(path)!r}: model files end in .safetensors")
    return path
