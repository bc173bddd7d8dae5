"""`resode eval MODEL --data D`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from .options import (
    DATA_ROOT,
    BatchSizeOption,
    DataOption,
    DataRootOption,
    DeviceOption,
    ImagesOption,
    JsonOption,
    ModelArgument,
    RecipeOption,
    SkipCorruptOption,
    SourceOption,
    TrustSourceOption,
    WorkersOption,
)
from .output import Output, start

if TYPE_CHECKING:
    from ..data.folders import Split


def eval_command(
    model: ModelArgument,
    data: DataOption,
    split: Annotated[
        str, typer.Option("--split", help="'test' (val where there is no labelled one), 'val' or 'train'.")
    ] = "test",
    images: ImagesOption = None,
    batch_size: BatchSizeOption = 100,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    skip_corrupt: SkipCorruptOption = False,
    data_root: DataRootOption = DATA_ROOT,
    source: SourceOption = None,
    trust_source: TrustSourceOption = False,
    recipe: RecipeOption = None,
    json: JsonOption = False,
) -> None:
    """Top-1 and top-5 accuracy and cross-entropy of a model."""
    start()
    from ..data import batches, open_labelled
    from ..errors import unknown
    from ..files import model_file
    from ..measuring.evaluate import evaluate
    from ..network.model import as_device
    from ..quantities import finite
    from ..reports.report import evaluation_json, evaluation_line
    from .progress import counting

    output = Output(json_mode=json)
    if split not in ("train", "val", "test"):
        raise unknown("split", split, ["test", "val", "train"])
    loaded = model_file.load(model, source=source, trust_source=trust_source)
    images_of = open_labelled(
        data,
        loaded.info,
        cast("Split", split),
        images=images,
        skip_corrupt=skip_corrupt,
        root=data_root,
    )
    output.notes(images_of.notes)
    where = as_device(device)
    with counting(output, "evaluating", len(images_of)) as advance:
        result = evaluate(
            loaded.to(where), batches(images_of, batch_size, workers=workers), device=where, on_batch=advance
        )
    output.notes([images_of.skipped_note()])
    output.show(evaluation_line(result))
    output.json(finite({**evaluation_json(result), "split": images_of.split}))
