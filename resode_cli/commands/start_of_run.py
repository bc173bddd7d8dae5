"""What a training run starts from: a model file or a source, with a head for the data's classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError, join
from .completion import models_or_sources
from .options import Origin, Reading
from .output import Output

if TYPE_CHECKING:
    from ..data import ImageData
    from ..network.model import OdeResNet
    from ..training.settings import Settings


StartArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL|SOURCE",
        help="Model file, or a SOURCE as `resode convert` takes it (timm:resnet50). With --resume: a run's folder.",
        autocompletion=models_or_sources,
    ),
]
SEVERAL = "images have several labels: each is learned by its own binary cross-entropy, and mAP is measured"


def is_source(text: str) -> bool:
    """Whether a MODEL is a SOURCE, as `convert` takes it, and no file."""
    return not text.endswith(".safetensors") and not Path(text).exists()


def trusting(origin: Origin, source: str | None) -> Origin:
    """The origin for files of a network that the user's own file builds, which the command line names as MODEL."""
    if source is None or origin.source is not None or not source.rpartition(":")[0].endswith(".py"):
        return origin
    return replace(origin, source=source)


def open_start(
    text: str, origin: Origin, *, pretrained: bool, weights: Path | None, seed: int, output: Output
) -> OdeResNet:
    """The model of a file, or of a source, which is converted on the way.

    pretrained: fetch the source's weights, unless `weights` is a file of some; else they are random, by the seed.
    Raises UsageError for a text that is neither.
    """
    if not is_source(text):
        if not pretrained or weights is not None:
            flag = "--no-pretrained" if weights is None else "--weights"
            raise UsageError(f"{flag} is of a SOURCE such as timm:resnet50; {text} is a model file")
        return origin.load(Path(text))
    import torch

    from ..reports.report import verification_line
    from ..sources.registry import open_source
    from ..surgery.convert import convert

    torch.manual_seed(seed)
    try:
        opened = open_source(text, pretrained=pretrained, weights=weights)
    except UsageError as error:
        if ":" in text:
            raise
        raise UsageError(f"{error}; there is no model file {text!r}") from error
    output.notes(note if note.startswith("warning: ") else f"note: {note}" for note in opened.notes)
    model, verification = convert(opened)
    verified = verification.record()
    fresh: dict[str, object] = {"fresh_head": opened.fresh_head} if opened.fresh_head else {}
    how: dict[str, object] = {"scheme": "euler", "form": "exact", "seed": seed, **fresh}
    model.record("convert", source=str(opened.spec), **how, verified=verified)
    output.note(f"converted {text}: {verification_line(verified)}")
    return model


def open_training(
    model: OdeResNet, data: str, reading: Reading, *, new_head: bool, seed: int, output: Output, **more: Any
) -> ImageData:
    """The training images; where their classes are others than an unnamed head's, the model gets a new head for them.

    So it does for images with several labels, of which no head that told classes apart knows.
    new_head: a new one in any case. seed: of its weights. more: arguments of `open_data`.
    """
    import torch

    from ..data import as_labelled
    from ..data.classes import listed

    old = model.info
    if not new_head and old.class_names is not None:
        output.notes([SEVERAL if old.multi_label else None])
        return reading.open(data, model, "train", **more)
    found = reading.open_as_it_is(data, model, "train", **more)
    count = len(found.class_names)
    if count < 2:
        raise UsageError(
            f"{data} has one class alone, {listed(found.class_names)}, so that there is nothing to tell apart"
            + ("; --data is the folder that holds a folder for each class" if Path(data).is_dir() else "")
        )
    if new_head or count != old.num_classes or found.multi_label:
        from ..network.head import head_parameters
        from ..surgery.head import replace_head

        torch.manual_seed(seed)
        layers = replace_head(model, count)
        model.name_classes(found.class_names, multi_label=found.multi_label)
        model.record("new-head", classes=count, seed=seed, fresh_head=head_parameters(model.net))
        before = f"{old.num_classes} classes{'' if old.class_names else ' without names'}"
        output.note(f"a new head ({join(layers)}), random, for the {count} classes of {data}; the old one had {before}")
    output.notes([SEVERAL if found.multi_label else None])
    return as_labelled(found, data, model.info)


LEAST_STEPS, LEAST_PER_EPOCH, SMALLEST_BATCH = 200, 20, 8


def for_few_images(settings: Settings, given: frozenset[str], images: int, output: Output) -> Settings:
    """The defaults that a small data set needs, which is said: 128 images a step and one epoch would train nothing.

    The batch is the largest power of two with which an epoch has 20 steps, but 8 at least; a run has 200 steps.
    given: parameters that the user set, which stay. images: for training.
    """
    said = []
    if "batch_size" not in given:
        size, least = settings.images_per_batch, max(SMALLEST_BATCH, settings.micro_batches)
        while size > least and images // (size * settings.batches_per_step) < LEAST_PER_EPOCH:
            size //= 2
        if size < settings.images_per_batch:
            settings = replace(settings, batch_size=size)
            said.append(f"--batch-size {size}")
    if not {"epochs", "max_steps"} & given and settings.per_epoch(images) < LEAST_STEPS:
        settings = replace(settings, max_steps=LEAST_STEPS)
        said.append(f"--max-steps {LEAST_STEPS} (about {round(LEAST_STEPS / settings.per_epoch(images))} epochs)")
    if said:
        output.note(f"for {images} training images: {join(said)}, unless you say otherwise")
    return settings


@dataclass(frozen=True)
class Call:
    """What a run was given beside its settings: a resumed one reads the same images without being told."""

    data: str
    test_images: int | None
    reading: Reading

    def record(self) -> dict[str, Any]:
        """As a run's state holds it."""
        own = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self.reading).items()}
        return {"data": self.data, "test_images": self.test_images, "reading": own}


def resumed_call(
    saved: Mapping[str, Any] | None, given: frozenset[str], data: str | None, test_images: int | None, reading: Reading
) -> Call:
    """The call of a run that goes on: what the user gives anew, and the run's own for the rest.

    saved: as `Call.record` gave it, None in runs of older versions. given: parameters that the user set.
    Raises UsageError where nobody says what the data is.
    """
    saved = saved or {}
    own = saved.get("reading")
    known = {f.name for f in fields(reading)} - given
    changes = {name: value for name, value in own.items() if name in known} if isinstance(own, dict) else {}
    changes |= {name: Path(changes[name]) for name in ("data_root", "class_map") if changes.get(name) is not None}
    name = data if data is not None else saved.get("data")
    if not isinstance(name, str):
        raise UsageError("an older resode saved this run, which does not know its data; add --data")
    from ..data import NAMES

    if data is None and name not in NAMES and ":" not in name and not Path(name).exists():
        raise UsageError(f"the run read its images from {name!r}, which is not to be found from here; add --data")
    images = saved.get("test_images") if "test_images" not in given else test_images
    return Call(name, images, replace(reading, **changes))


def as_it_read(
    reading: Reading, given: frozenset[str], fingerprint: Mapping[str, Any]
) -> tuple[Reading, dict[str, Any]]:
    """How the images of a run are read again, and further arguments of `open_data` for that.

    Its classes are called what a class map called them when it began: the file may be gone, or say something else.
    given: parameters that the user set. fingerprint: of the run; of no run of an older version it has the names.
    """
    called = fingerprint.get("class_map")
    if not called or "class_map" in given:
        return reading, {}
    return replace(reading, class_map=None), {"renamed": called}
