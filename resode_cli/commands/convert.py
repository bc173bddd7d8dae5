"""`resode convert SOURCE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..quantities import COUNT, CROPS, FINITE, POSITIVE, SEED
from .completion import sources
from .options import ForceOption, HorizonOption, JsonOption, OutputOption, RecipeOption, check_safetensors, number
from .output import Output, start
from .working_folder import output_for, remember, source_name

_LEFT_OUT = 3  # that many kinds of blocks are named


def convert_command(
    *,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            autocompletion=sources,
            help="timm:NAME, torchvision:NAME, cifar:resnet20|32|44|56|110|1202 or FILE.py:FUNCTION.",
        ),
    ],
    out: OutputOption = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", help="Weights to load: .safetensors, .pth, .pt, .th, .tar, .bin or .ckpt."),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option("--prefix", help="Of the network's names in the weights, where several would do: 'encoder_q'."),
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--no-pretrained", help="Fetch the library's pretrained weights.")
    ] = True,
    num_classes: Annotated[
        int | None,
        number("--num-classes", range=COUNT, help="Classes of the head; another number starts it at random."),
    ] = None,
    stem: Annotated[
        str | None, typer.Option("--stem", help="'cifar': a 3×3 stem of stride 1, no pooling, for small images.")
    ] = None,
    shortcut: Annotated[
        str | None, typer.Option("--shortcut", help="Of cifar: networks: A (parameter-free) or B (projection).")
    ] = None,
    scheme: Annotated[
        str,
        typer.Option(
            "--scheme",
            help="Forward rule: 'euler' (the source's own), 'heun', 'heunnet' (the paper's), 'midpoint' or 'rk4'.",
        ),
    ] = "euler",
    form: Annotated[
        str, typer.Option("--form", help="'exact', or 'pre': drop the activation after each addition.")
    ] = "exact",
    horizon: HorizonOption = None,
    input_size: Annotated[
        str | None,
        typer.Option(
            "--input-size", help="Pixels: 224, or height and width, 256x128. Up to 64, images are not cropped."
        ),
    ] = None,
    crop_fraction: Annotated[
        float | None,
        number("--crop-fraction", "--crop-pct", range=CROPS, help="Part of the resized image's side that is kept."),
    ] = None,
    mean: Annotated[
        str | None, typer.Option("--mean", help="Of RGB in [0, 1], e.g. 0.485,0.456,0.406; of grey, one number.")
    ] = None,
    std: Annotated[
        str | None, typer.Option("--std", help="Of RGB in [0, 1], e.g. 0.229,0.224,0.225; of grey, one number.")
    ] = None,
    seed: Annotated[int, number("--seed", range=SEED, help="Of weights that start at random.")] = 0,
    recipe: RecipeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Write a ResNet as stages of 1/N-scaled residual steps, and verify that it is the same function."""
    start()
    import torch

    from ..files import model_file
    from ..machine.atomic import check_output
    from ..measuring.forecast import forecast_conversion
    from ..network.parts import PreprocessingChoice, parse_size
    from ..network.specs import as_horizon
    from ..quantities import duration, finite, size
    from ..reports.report import stage_rows, stage_table, verification_line
    from ..sources.registry import open_source
    from ..surgery.convert import VERIFIED, check_scheme_and_form, convert, like, random_batch

    output = Output(json_mode=json)
    out = output_for(out, source_name(source), force=force)
    check_output(check_safetensors(out), force=force)
    time = None if horizon is None else as_horizon(horizon)
    check_scheme_and_form(scheme, form)  # before anything is downloaded
    preprocessing = PreprocessingChoice(
        size=None if input_size is None else parse_size(input_size),
        mean=None if mean is None else _numbers("mean", mean),
        std=None if std is None else _numbers("std", std),
        crop_fraction=crop_fraction,
    )
    torch.manual_seed(seed)
    opened = open_source(
        source,
        pretrained=pretrained,
        weights=weights,
        num_classes=num_classes,
        stem=stem,
        shortcut=shortcut,
        preprocessing=preprocessing,
        prefix=prefix,
    )
    for note in opened.notes:
        output.note(note if note.startswith("warning: ") else f"note: {note}")
    image = like(random_batch(opened.preprocessing, 1), opened.net)
    opened.net.eval()
    forecast = forecast_conversion(opened.net, image, VERIFIED)
    if forecast is not None and forecast.bytes is not None:
        output.note(
            f"predicted: {duration(forecast.seconds)}, about {size(forecast.bytes)} of memory"
            " beside what Python and torch take"
        )
    model, verification = convert(opened, scheme=scheme, form="pre" if form == "pre" else "exact", horizon=time)
    verified = verification.record()
    settings: dict[str, object] = {"scheme": scheme, "form": form, "seed": seed}
    settings |= {} if time is None else {"horizon": str(time)}
    settings |= {"fresh_head": opened.fresh_head} if opened.fresh_head else {}
    model.record("convert", source=str(opened.spec), **settings, verified=verified)
    model_file.write(model, out)
    rows = stage_rows(model)
    output.show(stage_table(rows, title=str(opened.spec)))
    for block in model.info.left_out[:_LEFT_OUT]:
        output.note(f"left as it is: {block}")
    if len(model.info.left_out) > _LEFT_OUT:
        output.note(f"… and {len(model.info.left_out) - _LEFT_OUT} more kinds of blocks: resode info {out}")
    output.show(verification_line(verified))
    output.note(f"wrote {out}")
    remember(output, source=source, model=out, run=None)
    output.json(
        finite(
            {
                "source": str(opened.spec),
                "out": str(out),
                "stages": [vars(row) for row in rows],
                "verified": verified,
                "notes": list(opened.notes),
                "left_out": list(model.info.left_out),
            }
        )
    )


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    allowed = POSITIVE if name == "std" else FINITE
    if len(values) not in (1, 3) or not all(value in allowed for value in values):
        raise UsageError(f"--{name} {text!r}: write three numbers, as in 0.5,0.5,0.5, or one for grey images")
    return values
