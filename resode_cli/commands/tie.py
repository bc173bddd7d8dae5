"""`resode tie MODEL -o OUT`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError, unknown
from ..fitting.settings import TIE_SETTINGS, FitSettings
from .fitting import FitRequest
from .options import (
    Comparing,
    ForceOption,
    HorizonOption,
    JsonOption,
    ModelArgument,
    Origin,
    OutputOption,
    Reading,
    RecipeOption,
    StageOption,
)
from .output import start
from .parameters import Fields, Given, takes
from .rewrite import Rewrite
from .working_folder import name_of, output_for, remembered

if TYPE_CHECKING:
    from ..network.stage import OdeStage

# A tied network has the depth of its source from the start.
OFFERED = Fields(TIE_SETTINGS, but=("refine_steps", "substeps", "clip_grad"))


@takes(
    request=Fields(FitRequest(), but=("no_fit",)),
    settings=OFFERED,
    comparing=Fields(Comparing()),
    reading=Fields(Reading()),
    origin=Fields(Origin()),
)
def tie_command(
    *,
    ctx: typer.Context,
    model: ModelArgument,
    out: OutputOption = None,
    rule: Annotated[
        str, typer.Option("--rule", help="The shared block: 'mean' of the steps' weights, 'first', 'middle' or 'last'.")
    ] = "mean",
    depth_weights: Annotated[
        str,
        typer.Option(
            "--depth-weights",
            help="'tied': one block; 'tied+stats', 'tied+norms': but each step its own BatchNorm statistics, or norms.",
        ),
    ] = "tied",
    horizon: HorizonOption = None,
    stage: StageOption = None,
    request: FitRequest,
    settings: FitSettings,
    comparing: Comparing,
    reading: Reading,
    origin: Origin,
    recipe: RecipeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
    given: Given,
) -> None:
    """Share one block among all steps of a stage. Changes the function; --fit repairs it."""
    start()
    from ..surgery.depth_weights import TIED
    from ..surgery.steps import tied

    if depth_weights not in TIED:
        raise unknown("depth weights", depth_weights, TIED)
    settings = request.check(settings, OFFERED, given)
    if "refine" in settings.phases:
        raise UsageError("--fit-phases refine is for deeper networks: here 'logits' already runs at full depth")
    if depth_weights != "tied" and "fit_bn" not in given.all:  # every step has statistics
        settings = replace(settings, bn="batch")
    if comparing.gradients is None:
        comparing = replace(comparing, gradients=request.fit is not None)
    history: dict[str, object] = {"rule": rule, "depth_weights": depth_weights}
    target = output_for(out, f"{name_of(model)}-tied", force=force)
    known = remembered(ctx, "data")
    rewrite = Rewrite(
        "tie", model, target, comparing, reading, origin, history, force, json, horizon, request.fit, known
    )

    def change(old: OdeStage) -> OdeStage:
        return tied(old, rule=rule, depth_weights=depth_weights)

    rewrite.stages(stage, change, request.plan(rewrite, settings))
