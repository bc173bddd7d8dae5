"""`resode deepen MODEL --blocks N -o OUT`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from ..fitting.settings import FitSettings
from ..quantities import STEPS
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
    number,
)
from .output import Output, start
from .parameters import Fields, Given, takes
from .rewrite import Rewrite
from .working_folder import name_of, output_for, remembered

if TYPE_CHECKING:
    from ..network.stage import OdeStage

OFFERED = Fields(FitSettings(), but=("clip_grad",))


@takes(
    request=Fields(FitRequest()),
    settings=OFFERED,
    comparing=Fields(Comparing()),
    reading=Fields(Reading()),
    origin=Fields(Origin()),
)
def deepen_command(
    *,
    ctx: typer.Context,
    model: ModelArgument,
    blocks: Annotated[int, number("--blocks", range=STEPS, help="Steps of each stage afterwards.")],
    out: OutputOption = None,
    mode: Annotated[
        str,
        typer.Option(
            "--mode",
            help="'replicate': a finer discretisation of the same ODE; 'interpolate': weights linear in depth;"
            " 'identity': insert steps that do nothing yet (keeps the function).",
        ),
    ] = "replicate",
    depth_weights: Annotated[
        str | None,
        typer.Option(
            "--depth-weights",
            help="How steps share weights: 'replicate' (a run of equal ones per source block), 'linear' (between"
            " knots), 'tied', 'tied+stats' or 'tied+norms' (each step its own BatchNorm statistics, or norms), 'free'."
            " Default: as --mode leaves them.",
        ),
    ] = None,
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
    """Take stages to more steps. Without --stage: all that have any. With --fit: and keep what the network knows."""
    start()
    from ..surgery.steps import deepened

    if mode == "replicate":
        request = request.by_default(comparing.data, Output(json_mode=json))
    settings = request.check(settings, OFFERED, given)
    if request.fit is not None and mode != "replicate":
        raise UsageError(f"--fit starts from equal weights in a block's run of steps, not from --mode {mode}")
    if comparing.gradients is None:
        comparing = replace(comparing, gradients=request.fit is not None)
    if horizon is not None and mode == "identity":
        raise UsageError("--mode identity keeps the function; --horizon changes it")
    history: dict[str, object] = {"blocks": blocks, "mode": mode, "depth_weights": depth_weights}
    target = output_for(out, f"{name_of(model)}-{blocks}", force=force)
    known = remembered(ctx, "data")
    rewrite = Rewrite(
        "deepen", model, target, comparing, reading, origin, history, force, json, horizon, request.fit, known
    )

    def change(old: OdeStage) -> OdeStage:
        return deepened(old, blocks, mode=mode, depth_weights=depth_weights)

    depths = dict.fromkeys(rewrite.pick(stage), blocks)
    deepening = {"depths": depths, "depth_weights": depth_weights}
    rewrite.stages(stage, change, request.plan(rewrite, settings, deepening))
