"""`resode untie MODEL -o OUT`."""

from __future__ import annotations

import typer

from .options import (
    Comparing,
    ForceOption,
    JsonOption,
    ModelArgument,
    Origin,
    OutputOption,
    Reading,
    RecipeOption,
    StageOption,
)
from .output import start
from .parameters import Fields, takes
from .rewrite import Rewrite
from .working_folder import name_of, output_for, remembered


@takes(comparing=Fields(Comparing()), reading=Fields(Reading()), origin=Fields(Origin()))
def untie_command(
    *,
    ctx: typer.Context,
    model: ModelArgument,
    out: OutputOption = None,
    stage: StageOption = None,
    comparing: Comparing,
    reading: Reading,
    origin: Origin,
    recipe: RecipeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Give every step a block of its own. Keeps the function."""
    start()
    from ..surgery.steps import untied

    target = output_for(out, f"{name_of(model)}-untied", force=force)
    known = remembered(ctx, "data")
    rewrite = Rewrite("untie", model, target, comparing, reading, origin, {}, force, json, remembered=known)
    rewrite.stages(stage, untied)
