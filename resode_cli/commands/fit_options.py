"""The options of a fit, which `deepen` and `tie` share."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import UsageError
from ..fitting.settings import END_TO_END, TIE_SETTINGS, TO_STATES, FitSettings
from .fit_job import FitRequest

FIT, TIE = FitSettings(), TIE_SETTINGS  # the defaults
PHASES, PHASES_OF_TIE = ",".join(FIT.phases), ",".join(TIE.phases)

FitOption = Annotated[
    str | None,
    typer.Option("--fit", help="Fit to the source network on these images (a data set or a folder); no labels needed."),
]
FitPhasesOption = Annotated[
    str,
    typer.Option(
        "--fit-phases",
        help="Of 'blocks' (each block's states), 'stages' (each stage's), 'logits' (end to end),"
        " 'refine' (the same at full depth).",
    ),
]
FitStepsOption = Annotated[int, typer.Option("--fit-steps", help="Training steps of each phase; 0: no fit.")]
FitRefineStepsOption = Annotated[int, typer.Option("--fit-refine-steps", help="Training steps of 'refine'.")]
FitImagesOption = Annotated[
    int | None, typer.Option("--fit-images", help="Fit on this many images, evenly spaced; all by default.")
]
FitBatchSizeOption = Annotated[int, typer.Option("--fit-batch-size", help="Images per training step.")]
FitLrOption = Annotated[
    float, typer.Option("--fit-lr", help="Largest learning rate, of Adam, where states are matched.")
]
FitLogitsLrOption = Annotated[float, typer.Option("--fit-logits-lr", help="The same in 'logits' and 'refine'.")]
FitSubstepsOption = Annotated[
    int, typer.Option("--fit-substeps", help="Steps per source block before 'refine'; 0: full depth throughout.")
]
FitBatchNormOption = Annotated[
    str | None,
    typer.Option(
        "--fit-bn",
        help="BatchNorm statistics: 'recalibrate' (once, then frozen), 'keep' or 'batch'. Default: 'recalibrate';"
        " 'batch' in `tie --depth-weights tied+norms`, whose steps have statistics of their own.",
    ),
]
FitStatesOption = Annotated[
    float, typer.Option("--fit-states", help="Weight of the states beside the logits, end to end.")
]
FitAugmentOption = Annotated[
    bool,
    typer.Option(
        "--fit-augment/--no-fit-augment",
        help="Random crops, and mirror images where fit: for many passes over few images.",
    ),
]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="Of the logits that are distilled.")]
SmoothOption = Annotated[
    float, typer.Option("--smooth", help="Weight of a penalty on differences between neighbouring blocks' weights.")
]
ContractOption = Annotated[
    float, typer.Option("--contract", help="Weight of a penalty on the contraction h‖J‖, which makes steps reversible.")
]
TeacherOption = Annotated[
    str | None,
    typer.Option("--teacher", help="Model file or SOURCE to learn from. Default of --fit: the model as it was."),
]
FormOption = Annotated[
    str | None,
    typer.Option("--form", help="'exact' or 'pre'. Default: as it is; with --fit, 'pre' where blocks allow."),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Of the fit: order and augmentation of images.")]

# What a fit alone reads: given without --fit, it would be ignored.
NAMES = (
    "fit_phases",
    "fit_steps",
    "fit_refine_steps",
    "fit_images",
    "fit_batch_size",
    "fit_lr",
    "fit_logits_lr",
    "fit_substeps",
    "fit_bn",
    "fit_states",
    "fit_augment",
    "temperature",
    "smooth",
    "contract",
    "teacher",
    "seed",
)

# What some phases alone read.
READ_BY = {
    "fit_lr": TO_STATES,
    "fit_logits_lr": END_TO_END,
    "fit_states": END_TO_END,
    "fit_refine_steps": ("refine",),
}


def request(ctx: typer.Context, *, bn: str) -> FitRequest | None:
    """The fit that a command's options ask for; None without --fit. bn: without --fit-bn.

    Raises UsageError for an option of a fit without one, and for a flag that none of its phases reads. A recipe's
    value is no flag: flags may choose other phases than the recipe's.
    """
    from ..network.residual import as_form

    given = ctx.params
    if given["fit"] is None:
        for name in NAMES:
            origin = ctx.get_parameter_source(name) if name in given else None
            if origin is not None and origin.name != "DEFAULT":
                raise UsageError(f"--{name.replace('_', '-')} is a setting of a fit; add --fit DATA")
        if given["form"] is not None:
            raise UsageError("--form changes the function; add --fit DATA, or use it with `resode convert`")
        return None
    settings = FitSettings(
        phases=tuple(part.strip() for part in given["fit_phases"].split(",")),
        steps=given["fit_steps"],
        refine_steps=given.get("fit_refine_steps", FIT.refine_steps),
        images=given["fit_images"],
        batch_size=given["fit_batch_size"],
        lr=given["fit_lr"],
        logits_lr=given["fit_logits_lr"],
        temperature=given["temperature"],
        states=given["fit_states"],
        smooth=given["smooth"],
        contract=given["contract"],
        bn=given["fit_bn"] or bn,
        substeps=given.get("fit_substeps", 0),
        augment=given["fit_augment"],
        seed=given["seed"],
        workers=given["workers"],
    )
    for name, phases in READ_BY.items():
        origin = ctx.get_parameter_source(name) if name in given else None
        if origin is not None and origin.name == "COMMANDLINE" and not set(phases) & set(settings.phases):
            raise UsageError(
                f"--{name.replace('_', '-')} is read in {' and '.join(phases)}; --fit-phases has"
                f" {','.join(settings.phases)}"
            )
    form = as_form(given["form"]) if given["form"] is not None else None
    return FitRequest(given["fit"], given["teacher"], form, settings, trust_source=given["trust_source"])
