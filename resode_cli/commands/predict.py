"""`resode predict MODEL IMAGE|FOLDER|PATTERN…`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ResodeError, UsageError
from ..quantities import COUNT, FRACTION
from .options import (
    DATA,
    BatchSizeOption,
    DeviceOption,
    JsonOption,
    Origin,
    Readers,
    Reading,
    RecipeOption,
    check_writable,
    name_outputs,
    number,
)
from .output import Output, start
from .parameters import Fields, takes
from .resizing import Resizing
from .working_folder import current_model

if TYPE_CHECKING:
    from ..network.model import OdeResNet

SHOWN = 10  # images in the table where a file has them all


@takes(
    naming=Fields(Reading(), only=("class_map",)),
    resizing=Fields(Resizing()),
    readers=Fields(Readers()),
    origin=Fields(Origin()),
)
def predict_command(
    *,
    model: Annotated[
        Path | None,
        typer.Argument(help="Model file (.safetensors). Default: this folder's current one, as resode.toml says."),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE|FOLDER|PATTERN",
            help="Images, folders (with all below them) and patterns in quotes, as '*.jpg' or 'photos/**/*.png'.",
        ),
    ] = None,
    top: Annotated[
        int | None,
        number(
            "--top",
            range=COUNT,
            help="Classes for each image, the likeliest first; at most all. Default: 1, or where the model gives an"
            " image several labels, those of --threshold.",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        number(
            "--threshold",
            range=FRACTION,
            help="Of a model that gives an image several labels: the probability from which on one is given."
            " Default: 0.5.",
        ),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(
            "--csv", help="Write path, class_1, probability_1, class_2, … of every image to this file, replacing it."
        ),
    ] = None,
    skip_corrupt: Annotated[
        bool,
        typer.Option(
            "--skip-corrupt",
            help="Exit with 0 although images could not be read. They are named and left out either way.",
            rich_help_panel=DATA,
        ),
    ] = False,
    naming: SimpleNamespace,
    resizing: Resizing,
    batch_size: BatchSizeOption = 100,
    device: DeviceOption = "auto",
    readers: Readers,
    origin: Origin,
    recipe: RecipeOption = None,
    json: JsonOption = False,
) -> None:
    """Name the likeliest classes of images, or their labels, in the order in which they are found, with probabilities.

    The exit code is 1 where an image could not be read; all others are predicted.
    """
    start()
    from ..data.images import shown
    from ..data.selection import select_images
    from ..machine.atomic import atomic_path
    from ..measuring.predict import check_chosen, predict
    from ..network.model import as_device
    from ..quantities import counted
    from ..reports.predictions import MOST_LABELS, prediction_table, predictions_csv, predictions_json
    from .progress import counting

    output = Output(json_mode=json)
    if csv is not None:
        check_writable("--csv", csv)
    if model is None or not _may_be_model(model):  # it is the first of the images then
        images = [*([] if model is None else [str(model)]), *(images or [])]
        model = current_model("the first word is no model file (.safetensors)", output)
    if not images:
        raise UsageError("predict needs images: files, folders, or patterns in quotes; see `resode predict --help`")
    loaded = origin.load(model)
    _name(loaded, naming.class_map)
    check_chosen(loaded, top, threshold)
    found = select_images(images)
    if csv is not None:
        _check_apart(csv, [str(model), *found.paths])
    output.notes([*found.notes, resizing.apply(loaded)])
    if loaded.info.class_names is None:
        output.note("the model names no classes: they are numbered from 0, in the order of its outputs")
    with counting(output, "predicting", len(found.paths)) as advance:
        result = predict(
            loaded.to(as_device(device)),
            found.paths,
            top=top,
            threshold=threshold,
            batch_size=batch_size,
            workers=readers.workers,
            on_batch=advance,
        )
    predicted = [p for p in result if p.error is None]
    unreadable = [p for p in result if p.error is not None]
    if predicted:
        output.show(
            prediction_table(predicted, rows=SHOWN if csv is not None else None, labels=None if top else MOST_LABELS)
        )
    if predicted and csv is not None:
        with atomic_path(csv) as temporary:
            # A path that is no text is written as the bytes that it is.
            temporary.write_text(predictions_csv(predicted), encoding="utf-8", errors="surrogateescape")
        output.note(f"wrote {shown(csv)}: {counted(len(predicted), 'image')}")
    for p in unreadable:
        output.note(f"{shown(p.path or '')}: not a readable image ({shown(p.error or '')})")
    if not predicted:
        raise ResodeError("no image could be read")
    named, several = loaded.info.class_names is not None, loaded.info.multi_label
    output.json(predictions_json(predicted, unreadable, named=named, several=several))
    if unreadable:
        output.note(f"{len(unreadable)} of {counted(len(result), 'image')} left out, as they could not be read")
        if not skip_corrupt:
            raise typer.Exit(1)


def _may_be_model(path: Path) -> bool:
    """Whether a word is meant as a model: a file of models, or a folder with some, which loading then names."""
    return path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors")))


def _name(model: OdeResNet, class_map: Path | None) -> None:
    """Raises UsageError for a class map of another number of classes than a model that names none."""
    name_outputs(model, class_map)
    if class_map is not None and model.info.class_names is None:
        raise UsageError(
            f"--class-map {str(class_map)!r}: it is of another number of classes than the model, which has"
            f" {model.info.num_classes}, without names"
        )


def _check_apart(csv: Path, read: Sequence[str]) -> None:
    """Raises UsageError for a table that would take the place of what is read."""
    if os.path.realpath(csv) in {os.path.realpath(path) for path in read}:
        raise UsageError(f"--csv {str(csv)!r}: that is the model, or one of the images; name another file")
