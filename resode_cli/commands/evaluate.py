"""`resode eval MODEL --data D`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import unknown
from .completion import splits
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

if TYPE_CHECKING:
    from ..measuring.evaluate import Measured

ALL = "all"


@takes(reading=Fields(Reading()), resizing=Fields(Resizing()), readers=Fields(Readers()), origin=Fields(Origin()))
def eval_command(
    *,
    model: ModelArgument,
    data: DataOption,
    split: Annotated[
        str,
        typer.Option(
            "--split",
            help="'test' (val where there is no labelled one), 'val' (also valid, validation, dev) or 'train'; 'all':"
            " every one that the data have.",
            autocompletion=splits,
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
    from ..data import batches, labelled_splits
    from ..data.splits import MEANT
    from ..measuring.evaluate import evaluate
    from ..network.model import as_device
    from ..quantities import finite
    from ..reports.report import evaluation_json, evaluation_line, evaluation_table
    from .progress import counting

    output = Output(json_mode=json)
    meant = MEANT.get(split.lower())
    if meant is None and split.lower() != ALL:
        raise unknown("split", split, ["test", "val", "train", ALL])
    loaded = origin.load(model)
    output.notes([resizing.apply(loaded)])
    # Of data without any the one that is asked for by default says what they lack.
    splits = [meant] if meant is not None else labelled_splits(data, reading.hold_out(loaded)) or ("test",)
    opened = [reading.open(data, loaded, each) for each in splits]
    where = as_device(device)
    loaded = loaded.to(where)
    found: dict[str, Measured] = {}
    for images in opened:
        output.notes(images.notes)
        with counting(output, f"evaluating {images.split}", len(images)) as advance:
            found[images.split] = evaluate(
                loaded,
                batches(images, batch_size, workers=readers.workers, device=where),
                device=where,
                on_batch=advance,
            )
        output.notes([images.skipped_note()])
    if meant is None:
        output.show(evaluation_table(found, data))
        output.json(finite({"splits": {each: evaluation_json(result) for each, result in found.items()}}))
        return
    for each, result in found.items():
        output.show(evaluation_line(result))
        output.json(finite({**evaluation_json(result), "split": each}))
