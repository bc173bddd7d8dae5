"""`resode report RUN…`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..errors import ResodeError, UsageError, one_line, unknown
from ..quantities import COUNT_OR_NONE
from .options import (
    DATA,
    DATA_OPTION,
    BatchSizeOption,
    DeviceOption,
    ForceOption,
    JsonOption,
    Origin,
    Readers,
    Reading,
    RecipeOption,
    number,
)
from .output import Output, start
from .parameters import Fields, Given, takes
from .start_of_run import as_it_read, resumed_call
from .working_folder import NAME, recall, without_remembered

if TYPE_CHECKING:
    from ..data.splits import Split
    from ..reports.html.held_out import HeldOut
    from ..training.run_record import RunRecord

FILE = "report.html"


@dataclass(frozen=True)
class Look:
    """What is asked of the held-out images, of every run alike; None for what is the run's own.

    mistakes: pictures of so many. workers: processes that read images.
    """

    data: str | None
    split: str | None
    reading: Reading
    origin: Origin
    given: Given
    mistakes: int
    batch_size: int
    workers: int | str
    device: str


@takes(reading=Fields(Reading()), readers=Fields(Readers()), origin=Fields(Origin()))
def report_command(
    *,
    ctx: typer.Context,
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN", help="Folders of runs. Default: this folder's last run, as resode.toml says."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help=f"Page to write. Default: RUN/{FILE}; of several runs, {FILE} here."),
    ] = None,
    data: Annotated[str | None, DATA_OPTION] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            help="'val', 'test' or 'train'. Default: the images that chose the run's best model.",
            rich_help_panel=DATA,
        ),
    ] = None,
    reading: Reading,
    predict: Annotated[
        bool,
        typer.Option(
            "--predict/--no-images",
            help="Run the best model on the held-out images, or leave that part of the page out.",
            rich_help_panel=DATA,
        ),
    ] = True,
    mistakes: Annotated[
        int, number("--mistakes", range=COUNT_OR_NONE, help="Pictures of the worst mistakes.", group=DATA)
    ] = 24,
    batch_size: BatchSizeOption = 100,
    device: DeviceOption = "auto",
    readers: Readers,
    origin: Origin,
    recipe: RecipeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
    given: Given,
) -> None:
    """Write a page on training runs: curves, the backward pass, and what the best model takes for what.

    The page is one HTML file that asks for nothing else. A run may be in progress; several are drawn together.
    """
    start()
    from ..machine.atomic import atomic_path
    from ..quantities import finite
    from ..reports.html.page import page
    from ..training.run_record import read_run

    output = Output(json_mode=json)
    given = without_remembered(ctx, given)
    if split is not None and split not in ("train", "val", "test"):
        raise unknown("split", split, ["val", "test", "train"])
    _check_looks(predict, given)
    records = [read_run(folder) for folder in _chosen(runs, output)]
    path = _page_path(out, records, force=force)
    output.notes(note for record in records for note in record.notes)
    look = Look(data, split, reading, origin, given, mistakes, batch_size, readers.workers, device)
    found = [_held_out(record, look, output) if predict else "" for record in records]
    text = page(records, found, now=datetime.now())
    with atomic_path(path, need=len(text)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    output.show(f"wrote {one_line(str(path))}")
    about = [_json(record, each) for record, each in zip(records, found, strict=True)]
    output.json(finite({"report": str(path), "runs": about}))


def _chosen(runs: Sequence[Path] | None, output: Output) -> list[Path]:
    """The runs that are meant, each once. Raises UsageError where none is named, here or by the folder."""
    if runs:
        return list(dict.fromkeys(runs))
    last = recall().kept.get("run")
    if last is None:
        raise UsageError(f"report needs RUN, a run's folder; no {NAME} in this folder names the last one")
    output.note(f"from {NAME}: run {one_line(last)}")
    return [Path(last)]


def _check_looks(look: bool, given: Given) -> None:
    """Raises UsageError for a flag of the images where none are looked at."""
    for name in ("data", "split", "images", "mistakes", "skip_corrupt"):
        if not look and name in given.flags:
            raise UsageError(f"--{name.replace('_', '-')} is of the images, which --no-images leaves out")


def _page_path(out: Path | None, records: Sequence[RunRecord], *, force: bool) -> Path:
    """Where the page goes. A page of ours is replaced; any other file only with --force."""
    from ..machine.atomic import check_output
    from ..reports.html.page import BEGINNING

    path = out or (records[0].folder / FILE if len(records) == 1 else Path(FILE))
    own = False
    if path.is_file():
        with path.open("rb") as file:
            own = file.read(len(BEGINNING)) == BEGINNING.encode()
    check_output(path, force=force or own)
    return path


def _held_out(record: RunRecord, look: Look, output: Output) -> HeldOut | str:
    """What the run's model makes of the images, or why that is not known.

    Raises ResodeError only for data that the user names: what a run used may be gone, and its curves are still there.
    """
    if record.model is None:
        return "No model is saved yet."
    try:
        return _seen(record, look, output)
    except ResodeError as error:
        if "data" in look.given.flags or "split" in look.given.flags:
            raise
        said = f"{record.name}: the images are left out: {error}"
        output.note(one_line(said))
        return said


def _seen(record: RunRecord, look: Look, output: Output) -> HeldOut:
    from ..data import held_out_splits
    from ..measuring.by_image import evaluate_images
    from ..network.model import as_device
    from ..reports.html.held_out import HeldOut
    from ..training.run_folder import BEST
    from .progress import counting

    assert record.model is not None
    reading, given = look.reading, look.given
    fingerprint = {} if record.run is None else record.run["fingerprint"]
    call = resumed_call(fingerprint.get("call"), given.all, look.data, None, replace(reading, images=None))
    again, called = as_it_read(call.reading, given.all, fingerprint)
    model = look.origin.load(record.model)
    chosen = held_out_splits(call.data, call.reading.hold_out(model))[0]
    wanted = cast("Split", look.split or chosen)
    count = reading.images if "images" in given.all else call.test_images if wanted == chosen else None
    images = again.open(call.data, model, wanted, images=count, **called)
    output.notes(images.notes)
    where = as_device(look.device)
    with counting(output, f"predicting for {record.name}", len(images)) as advance:
        results = evaluate_images(
            model.to(where),
            images,
            batch_size=look.batch_size,
            workers=look.workers,
            device=where,
            on_batch=advance,
        )
    output.notes([images.skipped_note()])
    role = {True: ", which chose the best model", False: ""}[wanted == chosen and look.data is None]
    return HeldOut(
        "best" if record.model.name == BEST else "last",
        f"{call.data}, {images.split}{role}",
        images.class_names,
        results,
        _worst(images, results, look.mistakes),
        [note for note in (*images.notes, images.skipped_note()) if note],
    )


def _worst(images: Any, results: Any, most: int) -> list[Any]:
    """The mistakes with the largest losses, with their pictures."""
    from ..data.images import UnreadableImage, shown
    from ..reports.html.held_out import Mistake

    found = []
    for place in results.mistakes(most):
        image = int(results.places[place])
        try:
            picture = images.picture(image)
        except UnreadableImage:
            picture = None
        label, guess, probability = _told(images.class_names, results, place)
        loss = float(results.losses[place])
        found.append(Mistake(shown(images.file_of(image)), label, guess, probability, loss, picture))
    return found


def _told(names: Sequence[str], results: Any, place: int) -> tuple[str, str, float | None]:
    """What an image is, what it is taken for, and how probable that is; of several labels with each one's."""
    from ..measuring.multi_label import LabelResults

    if not isinstance(results, LabelResults):
        label, guess = (names[int(of[place])] for of in (results.labels, results.predictions))
        return label, guess, float(results.probabilities[place])
    label, guess = (
        ", ".join(f"{names[k]} ({results.probabilities[place, k]:.0%})" for k in of[place].nonzero().flatten().tolist())
        for of in (results.labels, results.given)
    )
    return label or "none of the classes", guess or "none of the classes", None


def _json(record: RunRecord, found: HeldOut | str) -> dict[str, Any]:
    about: dict[str, Any] = {
        "run": str(record.folder),
        "standing": record.standing,
        "step": record.step,
        "total_steps": record.total,
        f"best_{record.main}": record.best,
        "images_per_second": record.images_per_second,
        "peak_bytes": record.peak_bytes,
        "images": None,
    }
    if not isinstance(found, str):
        from ..measuring.multi_label import LabelResults

        results = found.results
        figures = (
            results.evaluation.figures
            if isinstance(results, LabelResults)
            else {
                "top1": results.top1,
                "top5": results.top5.double().mean().item(),
                "loss": results.losses.double().mean().item(),
            }
        )
        about["images"] = {
            "data": found.where,
            "images": len(results),
            **figures,
            "classes": [
                {"class": name, **vars(own), "precision": own.precision, "recall": own.recall, "f1": own.f1}
                for name, own in zip(found.class_names, results.by_class(), strict=True)
            ],
        }
    return about
