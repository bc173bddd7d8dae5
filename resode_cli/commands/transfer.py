"""`resode tie`, `untie`, `deepen` and `recalibrate`: rewrite a model file, and say what that did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError, unknown
from ..quantities import COUNT, STEPS
from .fit_options import (
    FIT,
    PHASES,
    PHASES_OF_TIE,
    TIE,
    ContractOption,
    FitAugmentOption,
    FitBatchNormOption,
    FitBatchSizeOption,
    FitImagesOption,
    FitLogitsLrOption,
    FitLrOption,
    FitOption,
    FitPhasesOption,
    FitRefineStepsOption,
    FitStatesOption,
    FitStepsOption,
    FitSubstepsOption,
    FormOption,
    SeedOption,
    SmoothOption,
    TeacherOption,
    TemperatureOption,
    request,
)
from .options import (
    DATA_ROOT,
    BatchSizeOption,
    DataOption,
    DataRootOption,
    DeviceOption,
    ForceOption,
    GradientsOption,
    ImagesOption,
    JsonOption,
    ModelArgument,
    OptionalDataOption,
    OutputOption,
    RecipeOption,
    SkipCorruptOption,
    SourceOption,
    StageOption,
    TestImagesOption,
    TrustSourceOption,
    WorkersOption,
    number,
)
from .output import start
from .rewrite import Rewrite

if TYPE_CHECKING:
    from ..network.model import OdeResNet
    from ..network.stage import OdeStage

TIED = ("tied", "tied+norms")


def tie_command(
    ctx: typer.Context,
    model: ModelArgument,
    out: OutputOption,
    rule: Annotated[
        str, typer.Option("--rule", help="The shared block: 'mean' of the steps' weights, 'first', 'middle' or 'last'.")
    ] = "mean",
    depth_weights: Annotated[
        str,
        typer.Option("--depth-weights", help="'tied': one block; 'tied+norms': the same, but each step its own norms."),
    ] = "tied",
    stage: StageOption = None,
    fit: FitOption = None,
    fit_phases: FitPhasesOption = PHASES_OF_TIE,
    fit_steps: FitStepsOption = TIE.steps,
    fit_images: FitImagesOption = TIE.images,
    fit_batch_size: FitBatchSizeOption = TIE.batch_size,
    fit_lr: FitLrOption = TIE.lr,
    fit_logits_lr: FitLogitsLrOption = TIE.logits_lr,
    fit_bn: FitBatchNormOption = None,
    fit_states: FitStatesOption = TIE.states,
    fit_augment: FitAugmentOption = TIE.augment,
    temperature: TemperatureOption = TIE.temperature,
    smooth: SmoothOption = TIE.smooth,
    contract: ContractOption = TIE.contract,
    teacher: TeacherOption = None,
    form: FormOption = None,
    seed: SeedOption = TIE.seed,
    data: OptionalDataOption = None,
    images: ImagesOption = None,
    batch_size: BatchSizeOption = 100,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    skip_corrupt: SkipCorruptOption = False,
    data_root: DataRootOption = DATA_ROOT,
    gradients: GradientsOption = None,
    source: SourceOption = None,
    trust_source: TrustSourceOption = False,
    recipe: RecipeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Share one block among all steps of a stage. Changes the function; --fit repairs it."""
    start()
    from ..surgery.rewrite import tie

    if depth_weights not in TIED:
        raise unknown("depth weights", depth_weights, TIED)
    wanted = request(ctx, bn="batch" if depth_weights == "tied+norms" else TIE.bn)
    if wanted is not None and "refine" in wanted.settings.phases:
        raise UsageError("--fit-phases refine is for deeper networks: here 'logits' already runs at full depth")
    rewrite = Rewrite(
        "tie",
        model,
        out,
        source=source,
        trust_source=trust_source,
        force=force,
        json=json,
        settings={"rule": rule, "depth_weights": depth_weights},
        gradients=wanted is not None if gradients is None else gradients,
    )
    rewrite.measure_on(data, images, batch_size, device, workers, skip_corrupt, data_root)

    def change(old: OdeStage) -> OdeStage:
        return tie(old, rule=rule, norms=depth_weights == "tied+norms")

    if wanted is None:
        rewrite.stages(stage, change)
    else:
        rewrite.fitted(wanted, stage, change)


def untie_command(
    model: ModelArgument,
    out: OutputOption,
    stage: StageOption = None,
    data: OptionalDataOption = None,
    images: ImagesOption = None,
    batch_size: BatchSizeOption = 100,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    skip_corrupt: SkipCorruptOption = False,
    data_root: DataRootOption = DATA_ROOT,
    gradients: GradientsOption = None,
    source: SourceOption = None,
    trust_source: TrustSourceOption = False,
    recipe: RecipeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Give every step a block of its own. Keeps the function."""
    start()
    from ..surgery.rewrite import untie

    rewrite = Rewrite(
        "untie",
        model,
        out,
        source=source,
        trust_source=trust_source,
        force=force,
        json=json,
        settings={},
        gradients=gradients,
    )
    rewrite.measure_on(data, images, batch_size, device, workers, skip_corrupt, data_root)
    rewrite.stages(stage, untie)


def deepen_command(
    ctx: typer.Context,
    model: ModelArgument,
    blocks: Annotated[int, number("--blocks", range=STEPS, help="Steps of each stage afterwards.")],
    out: OutputOption,
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
            " knots), 'tied', 'tied+norms' (each step its own norms) or 'free'. Default: as --mode leaves them.",
        ),
    ] = None,
    stage: StageOption = None,
    fit: FitOption = None,
    fit_phases: FitPhasesOption = PHASES,
    fit_steps: FitStepsOption = FIT.steps,
    fit_refine_steps: FitRefineStepsOption = FIT.refine_steps,
    fit_substeps: FitSubstepsOption = FIT.substeps,
    fit_images: FitImagesOption = FIT.images,
    fit_batch_size: FitBatchSizeOption = FIT.batch_size,
    fit_lr: FitLrOption = FIT.lr,
    fit_logits_lr: FitLogitsLrOption = FIT.logits_lr,
    fit_bn: FitBatchNormOption = None,
    fit_states: FitStatesOption = FIT.states,
    fit_augment: FitAugmentOption = FIT.augment,
    temperature: TemperatureOption = FIT.temperature,
    smooth: SmoothOption = FIT.smooth,
    contract: ContractOption = FIT.contract,
    teacher: TeacherOption = None,
    form: FormOption = None,
    seed: SeedOption = FIT.seed,
    data: OptionalDataOption = None,
    images: ImagesOption = None,
    batch_size: BatchSizeOption = 100,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    skip_corrupt: SkipCorruptOption = False,
    data_root: DataRootOption = DATA_ROOT,
    gradients: GradientsOption = None,
    source: SourceOption = None,
    trust_source: TrustSourceOption = False,
    recipe: RecipeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Take stages to more steps. Without --stage: all that have any. With --fit: and keep what the network knows."""
    start()
    from ..surgery.rewrite import deepen

    wanted = request(ctx, bn=FIT.bn)
    if wanted is not None and mode != "replicate":
        raise UsageError(f"--fit starts from equal weights in a block's run of steps, not from --mode {mode}")
    rewrite = Rewrite(
        "deepen",
        model,
        out,
        source=source,
        trust_source=trust_source,
        force=force,
        json=json,
        settings={"blocks": blocks, "mode": mode, "depth_weights": depth_weights},
        gradients=wanted is not None if gradients is None else gradients,
    )
    rewrite.measure_on(data, images, batch_size, device, workers, skip_corrupt, data_root)

    def change(old: OdeStage) -> OdeStage:
        return deepen(old, blocks, mode=mode, depth_weights=depth_weights)

    if wanted is None:
        rewrite.stages(stage, change)
        return
    own = {name: picked.spec.depth for name, picked in rewrite.pick(stage).items()}
    for picked in rewrite.pick(stage).values():
        change(picked)  # refuses what cannot be before anything is computed
    coarse = {name: min(depth * fit_substeps, blocks) if fit_substeps else blocks for name, depth in own.items()}
    depths = dict.fromkeys(own, blocks)
    rewrite.fitted(
        wanted, stage, change, deepening={"coarse": coarse, "depths": depths, "depth_weights": depth_weights}
    )


def recalibrate_command(
    model: ModelArgument,
    data: DataOption,
    out: OutputOption,
    images: Annotated[
        int, number("--images", range=COUNT, help="Training images to average over, evenly spaced.")
    ] = 2000,
    test_images: TestImagesOption = None,
    batch_size: BatchSizeOption = 100,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    skip_corrupt: SkipCorruptOption = False,
    data_root: DataRootOption = DATA_ROOT,
    gradients: GradientsOption = None,
    source: SourceOption = None,
    trust_source: TrustSourceOption = False,
    recipe: RecipeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Re-estimate BatchNorm statistics on training images, as after --form pre. Labels are not used."""
    start()
    from ..data import batches, open_labelled
    from ..surgery.batch_norm import recalibrate

    rewrite = Rewrite(
        "recalibrate",
        model,
        out,
        source=source,
        trust_source=trust_source,
        force=force,
        json=json,
        settings={"data": data, "images": images},
        gradients=gradients,
    )
    train = open_labelled(data, rewrite.model.info, "train", images=images, skip_corrupt=skip_corrupt, root=data_root)
    # Consecutive images of a folder are of one class, and a batch of one class has its own statistics.
    order = [i for start in range(_STRIDE) for i in range(start, len(train), _STRIDE)]
    rewrite.output.notes(train.notes)
    rewrite.measure_on(data, test_images, batch_size, device, workers, skip_corrupt, data_root)

    def change(loaded: OdeResNet) -> None:
        recalibrate(loaded, batches(train, batch_size, order=order, workers=workers), device=rewrite.device)
        rewrite.output.notes([train.skipped_note()])

    rewrite.whole(change)


_STRIDE = 97
