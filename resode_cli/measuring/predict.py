"""What a model takes images for: its likeliest classes, with their probabilities."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..data import Batch, batches
from ..data.images import shown
from ..data.selection import open_images, select_images
from ..errors import ResodeError, ResodeWarning, UsageError
from ..network.model import OdeResNet
from ..network.repeat import in_eval_mode
from ..quantities import COUNT, FRACTION
from .multi_label import THRESHOLD

Images = str | Path | Image.Image | Tensor | Sequence[str | Path | Image.Image]


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, the likeliest first, and their probabilities.

    Probabilities are the softmax over all classes; where the model gives an image any number of them, each one's own
    sigmoid, and there may be no class at all.
    path: the image's file; None for an image from memory. classes: the model's names, or numbers from 0 as text where
    it has none. error: why the image could not be read, and then there are no classes.
    """

    path: str | None
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    error: str | None = None


def predict(
    model: OdeResNet,
    images: Images,
    *,
    top: int | None = None,
    threshold: float | None = None,
    batch_size: int = 100,
    workers: int | str = 0,
    on_batch: Callable[[int], None] = lambda images: None,
) -> list[Prediction]:
    """The `top` likeliest classes of each image, in the order of the images, where the model stands, in eval mode.

    top: 1 where nothing is said. A model that gives images any number of labels gives those of `threshold` or more,
    0.5 where nothing is said; or the `top` likeliest, however probable.
    images: a file, folder or pattern, several of these, PIL images, or a preprocessed batch (B, C, H, W).
    An image that cannot be read has its place too, with an `error`.
    Raises UsageError for a name that nothing has and more classes than the model tells apart, ResodeError for folders
    without images and for logits that are no numbers.
    """
    check_chosen(model, top, threshold)
    COUNT.check("--batch-size", batch_size)
    if isinstance(images, Tensor):
        if images.dim() != 4:
            raise UsageError(f"a tensor of shape {tuple(images.shape)}: images are (B, C, H, W)")
        parts = zip(torch.split(images, batch_size), torch.split(torch.arange(len(images)), batch_size), strict=True)
        paths: list[str | None] = [None] * len(images)
        data: Iterable[Batch] = (Batch(part, places) for part, places in parts)
    else:
        given = _files(images)
        paths = [None if isinstance(image, Image.Image) else str(image) for image in given]
        where = next(model.parameters()).device
        data = batches(open_images(given, model.info.preprocessing), batch_size, workers=workers, device=where)
    return _predictions(model, data, paths, top, threshold, on_batch)


def check_chosen(model: OdeResNet, top: int | None, threshold: float | None) -> None:
    """Raises UsageError for more classes than the model tells apart, and a threshold of one that gives one class."""
    COUNT.check("--top", top)
    FRACTION.check("--threshold", threshold)
    check_top(top, model.info.num_classes)
    if threshold is not None and not model.info.multi_label:
        raise UsageError("--threshold is of models that give an image several labels; this one gives one class: --top")
    if threshold is not None and top is not None:
        raise UsageError("--top gives so many labels, --threshold the probable ones: leave out one")


def check_top(top: int | None, classes: int) -> None:
    """Raises UsageError for more classes than the model tells apart."""
    if top is not None and top > classes:
        raise UsageError(f"--top {top}: the model tells {classes} classes apart")


def _files(images: str | Path | Image.Image | Sequence[str | Path | Image.Image]) -> list[str | Path | Image.Image]:
    several = [images] if isinstance(images, (str, os.PathLike, Image.Image)) else list(images)
    if several and all(isinstance(image, Image.Image) for image in several):
        return several
    names = [image for image in several if not isinstance(image, Image.Image)]
    if len(names) < len(several):
        raise UsageError("images are either files or PIL images, not some of each")
    selection = select_images(names)
    for note in selection.notes:
        warnings.warn(note, ResodeWarning, stacklevel=3)
    return list(selection.paths)


def _predictions(
    model: OdeResNet,
    data: Iterable[Batch],
    paths: Sequence[str | None],
    top: int | None,
    threshold: float | None,
    on_batch: Callable[[int], None],
) -> list[Prediction]:
    device = next(model.parameters()).device
    found: dict[int, Prediction] = {}
    unreadable: dict[str, str] = {}
    with in_eval_mode(model), torch.no_grad():
        for batch in data:
            unreadable.update(batch.skipped)
            if len(batch.labels):
                logits = model(batch.on(device)[0]).cpu().double()
                names = _names(model, logits)
                check_top(top, logits.shape[1])
                best, least = _best(logits, top, threshold, several=model.info.multi_label)
                for place, own, values, places in zip(
                    batch.labels.tolist(), logits, best.values.tolist(), best.indices.tolist(), strict=True
                ):
                    if not bool(torch.isfinite(own).all()):
                        what = paths[place] or f"image {place}"
                        raise ResodeError(f"{shown(what)}: the model's logits are no numbers (NaN or infinity)")
                    count = sum(value >= least for value in values)  # they fall
                    found[place] = Prediction(
                        paths[place], tuple(names[k] for k in places[:count]), tuple(values[:count])
                    )
            on_batch(len(found) + len(unreadable))
    return [
        found[place] if place in found else Prediction(path, (), (), unreadable[path or f"image {place}"])
        for place, path in enumerate(paths)
    ]


def _best(
    logits: Tensor, top: int | None, threshold: float | None, *, several: bool
) -> tuple[torch.return_types.topk, float]:
    """The classes that may be told of each image, the likeliest first, and the least probability that is told."""
    if not several:
        return logits.softmax(dim=1).topk(top or 1, dim=1), 0.0
    probabilities = logits.sigmoid()
    if top is not None:
        return probabilities.topk(top, dim=1), 0.0
    return probabilities.topk(logits.shape[1], dim=1), THRESHOLD if threshold is None else threshold


def _names(model: OdeResNet, logits: Tensor) -> Sequence[str]:
    """What the logits (B, K) are of. Raises ResodeError for a head that was changed since the classes were named."""
    names = model.info.class_names
    if names is None:
        return [str(k) for k in range(logits.shape[1])]
    if len(names) != logits.shape[1]:
        raise ResodeError(
            f"the model's head tells {logits.shape[1]} classes apart, and {len(names)} have names;"
            " model.name_classes(names) says what they are called"
        )
    return names
