"""`resode eval MODEL --data D`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import unknown
from .options import (
    BatchSizeOption,
    DataOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    Origin,
    Readers,
    Reading,
    RecipeOption,
)
from .output import Output, start
from .parameters import Fields, takes
from .resizing import Resizing


@takes(reading=Fields(Reading()), resizing=Fields(Resizing()), readers=Fields(Readers()), origin=Fields(Origin()))
def eval_command(
    *,
    model: ModelArgument,
    data: DataOption,
    split: Annotated[
        str,
        typer.Option(
            "--split",
            help="'test' (val where there is no labelled one), 'val' (also valid, validation, dev) or 'train'.",
        ),
    ] = "test",
    reading: Reading,
    resizing: Resizing,
    batch_size: BatchSizeOption = 100,
    device: DeviceOption = "auto",
    readers: Readers,
    origin: Origin,
    recipe: RecipeOption = None,
    json: JsonOption = False,
) -> None:
    """Top-1 and top-5 accuracy and cross-entropy of a model."""
    start()
    from ..data import batches
    from ..data.folders import SPLIT_FOLDERS
    from ..measuring.evaluate import evaluate
    from ..network.model import as_device
    from ..quantities import finite
    from ..reports.report import evaluation_json, evaluation_line
    from .progress import counting

    output = Output(json_mode=json)
    meant = {name: each for each, names in SPLIT_FOLDERS.items() for name in names}.get(split.lower())
    if meant is None:
        raise unknown("split", split, ["test", "val", "train"])
    loaded = origin.load(model)
    output.notes([resizing.apply(loaded)])
    images = reading.open(data, loaded, meant)
    output.notes(images.notes)
    where = as_device(device)
    with counting(output, "evaluating", len(images)) as advance:
        result = evaluate(
            loaded.to(where),
            batches(images, batch_size, workers=readers.workers, device=where),
            device=where,
            on_batch=advance,
        )
    output.notes([images.skipped_note()])
    output.show(evaluation_line(result))
    output.json(finite({**evaluation_json(result), "split": images.split}))
