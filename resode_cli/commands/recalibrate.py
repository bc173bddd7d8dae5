"""`resode recalibrate MODEL --data D -o OUT`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from ..quantities import COUNT
from .options import (
    DATA,
    Comparing,
    DataOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    Origin,
    OutputOption,
    Reading,
    RecipeOption,
    number,
)
from .output import start
from .parameters import Fields, takes
from .rewrite import Rewrite
from .working_folder import name_of, output_for

if TYPE_CHECKING:
    from ..network.model import OdeResNet

STRIDE = 97


@takes(
    comparing=Fields(Comparing(), but=("data",)),
    reading=Fields(Reading(), but=("images",)),
    origin=Fields(Origin()),
)
def recalibrate_command(
    *,
    model: ModelArgument,
    data: DataOption,
    out: OutputOption = None,
    images: Annotated[
        int, number("--images", range=COUNT, help="Training images to average over, evenly spaced.", group=DATA)
    ] = 2000,
    test_images: Annotated[
        int | None,
        number("--test-images", range=COUNT, help="Evaluate on this many test images; all by default.", group=DATA),
    ] = None,
    comparing: Comparing,
    reading: Reading,
    origin: Origin,
    recipe: RecipeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Re-estimate BatchNorm statistics on training images, as after --form pre. Labels are not used."""
    start()
    from ..data import batches
    from ..surgery.batch_norm import recalibrate

    comparing, reading = replace(comparing, data=data), replace(reading, images=test_images)
    history = {"data": data, "images": images}
    target = output_for(out, f"{name_of(model)}-recalibrated", force=force)
    rewrite = Rewrite("recalibrate", model, target, comparing, reading, origin, history, force, json)
    train = reading.open(data, rewrite.model, "train", images=images)
    rewrite.output.notes(train.notes)
    # Consecutive images of a folder are of one class, and a batch of one class has its own statistics.
    order = [i for start in range(STRIDE) for i in range(start, len(train), STRIDE)]

    def change(loaded: OdeResNet) -> None:
        where = rewrite.device
        read = batches(train, comparing.batch_size, order=order, workers=comparing.workers, device=where)
        recalibrate(loaded, read, device=where)
        rewrite.output.notes([train.skipped_note()])

    rewrite.whole(change)
