"""`resode eval MODEL --data D`."""

from __future__ import annotations

from typing import Annotated

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
    WorkersOption,
)
from .output import Output, start


def eval_command(
    model: ModelArgument,
    data: DataOption,
    split: Annotated[str, typer.Option("--split", help="'test' (or val) or 'train'.")] = "test",
    images: ImagesOption = None,
    batch_size: BatchSizeOption = 100,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    skip_corrupt: SkipCorruptOption = False,
    data_root: DataRootOption = DATA_ROOT,
    source: SourceOption = None,
    recipe: RecipeOption = None,
    json: JsonOption = False,
) -> None:
    """Top-1 and top-5 accuracy and cross-entropy of a model."""
    start()
    from .. import model_file
    from ..data import batches, check_classes, open_data
    from ..errors import first_few, unknown
    from ..evaluate import evaluate
    from ..model import as_device
    from ..report import evaluation_json, evaluation_line
    from ..tables import finite
    from .progress import counting

    output = Output(json_mode=json)
    if split not in ("train", "test"):
        raise unknown("split", split, ["test", "train"])
    loaded = model_file.load(model, source=source)
    images_of = open_data(
        data,
        loaded.info.preprocessing,
        "train" if split == "train" else "test",
        images=images,
        skip_corrupt=skip_corrupt,
        root=data_root,
    )
    check_classes(images_of, loaded.info.num_classes, loaded.info.class_names)
    where = as_device(device)
    with counting(output, "evaluating", len(images_of)) as advance:
        result = evaluate(
            loaded.to(where), batches(images_of, batch_size, workers=workers), device=where, on_batch=advance
        )
    if result.skipped:
        output.note(f"skipped {len(result.skipped)} corrupt files: {first_few(list(result.skipped))}")
    output.show(evaluation_line(result))
    output.json(finite(evaluation_json(result)))
