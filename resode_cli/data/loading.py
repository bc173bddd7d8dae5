"""What a model is fed: images and labels, transformed, in batches.

Augmentation draws from a generator seeded by (seed, epoch, image), so a run is the same whatever the number of
workers and wherever it was resumed. The epoch comes with the place of each image that is asked for: a worker has a copy
of the data of its own, and reads for one epoch while the model still trains on the one before.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..errors import ResodeError, first_few
from ..machine.processes import ALONE, Processes
from ..quantities import counted
from .holding_out import Division
from .images import UnreadableImage, shown, to_rgb
from .named import labels_of
from .splits import Split
from .workers import loader_arguments, read_in_workers, worker_count

Key = tuple[int, int]  # an epoch, and the place of an image in the data


@dataclass(frozen=True)
class Batch:
    """images: (B, C, H, W) float32, normalised; labels: (B,), or where images have several (B, K) of 0 and 1.

    skipped: corrupt files left out, and why. failure: what kept a worker from reading it; `batches` raises it.
    whole: images of the batch of all processes, of which this is one's part; None: these are all.
    """

    images: Tensor
    labels: Tensor
    skipped: Mapping[str, str] = field(default_factory=dict)
    failure: ResodeError | None = None
    whole: int | None = None

    def on(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Images and labels on a device. To a GPU they are on their way: what is run there next waits for them."""
        return self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True)

    def pin_memory(self) -> Batch:
        """The same in memory that a GPU copies from by itself. A DataLoader calls it, by this name."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


@dataclass(frozen=True)
class Skipped:
    """A corrupt file that is left out, and why it cannot be read."""

    file: str
    reason: str


Label = int | Tensor  # a class; or (K,) float32, 1 for each class that an image has, where it may have several


class ImageData(Dataset[tuple[Tensor, Label] | Skipped]):
    """One split of a data set, preprocessed for a model.

    samples: (image, number) pairs. labels: for each number its place in class_names; None: the number itself.
    sets: where images have several labels, for each number the places of its classes in class_names.
    partial: classes that some split lacks. notes: what the user should know of it. division: how images were held
    out, where the data have no val split of their own. renamed: the data's own names of classes that are shown under
    others, and which. skipped: the corrupt files that
    `batches` met, each once, and why they cannot be read.
    """

    def __init__(
        self,
        name: str,
        samples: Any,
        class_names: Sequence[str],
        *,
        transform: Callable[[Image.Image], Tensor],
        indices: Sequence[int] | None = None,
        seed: int | None = None,
        skip_corrupt: bool = False,
        labels: Sequence[int] | None = None,
        sets: Sequence[Sequence[int]] | None = None,
        split: Split = "test",
        partial: Sequence[str] = (),
        notes: Sequence[str] = (),
        division: Division | None = None,
        renamed: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.samples = samples
        self.class_names = tuple(class_names)
        self.transform = transform
        self.indices = range(len(samples)) if indices is None else indices
        self.seed = seed  # None: the transform draws nothing
        self.skip_corrupt = skip_corrupt
        self.labels = labels
        self.sets = sets
        self.split = split
        self.partial = tuple(partial)
        self.notes = tuple(notes)
        self.division = division
        self.renamed = dict(renamed or {})
        self.skipped: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels, and none."""
        return self.sets is not None

    def label_counts(self) -> list[int]:
        """How many images in use have each class."""
        numbers = labels_of(self.samples)
        found = [0] * len(self.class_names)
        for number, count in Counter(numbers[i] for i in self.indices).items():
            for label in self._classes(number):
                found[label] += count
        return found

    def image_labels(self) -> list[int]:
        """The label of each image in use, in order; none is read for it where the data have a list of labels."""
        numbers = labels_of(self.samples)
        return [numbers[i] if self.labels is None else self.labels[numbers[i]] for i in self.indices]

    def files(self) -> Iterator[tuple[str, int]]:
        """Name, within the folder that holds them all, and bytes of each image in use, in order.

        Of images that are no files: their place, and -1.
        """
        names = [os.path.split(self._file(index)) for index in self.indices]
        folders = {folder for folder, _ in names}
        try:
            root = os.path.commonpath(folders)
            within = {folder: os.path.relpath(folder, root) if root else folder for folder in folders}
        except ValueError:  # none, or some under / and some not
            within = {folder: folder for folder in folders}
        for index, (folder, name) in zip(self.indices, names, strict=True):
            try:
                size = self._size(index, os.path.join(folder, name))
            except (OSError, ValueError):
                size = -1
            yield os.path.join(within[folder], name), size

    def file_of(self, i: int) -> str:
        """The file of an image; of one that is no file: its number in the data set, in words."""
        return self._file(self.indices[i])

    def picture(self, i: int) -> Image.Image:
        """An image as it is before any transform. Raises UnreadableImage."""
        return self._read(self.indices[i])[0]

    def first_bytes(self, i: int, count: int) -> bytes:
        """The beginning of an image's file; nothing where it is no file, or cannot be read."""
        index = self.indices[i]
        try:
            if hasattr(self.samples, "first_bytes"):  # images that are stored otherwise than each in a file
                return bytes(self.samples.first_bytes(index, count))
            with Path(self._file(index)).open("rb") as file:
                return file.read(count)
        except (OSError, ValueError):
            return b""

    def __getitem__(self, key: int | Key) -> tuple[Tensor, Label] | Skipped:
        """The image and its label, or a corrupt file that is skipped.

        key: its place, in epoch 0; or an epoch and its place.
        """
        epoch, i = (0, key) if isinstance(key, int) else key
        index = self.indices[i]
        try:
            image, label = self._read(index)
        except UnreadableImage as error:
            if self.skip_corrupt:
                return Skipped(self._file(index), str(error))
            raise ResodeError(
                f"{shown(self._file(index))}: not a readable image ({shown(str(error))});"
                " --skip-corrupt leaves such files out"
            ) from error
        except MemoryError as error:
            raise ResodeError(f"{shown(self._file(index))}: not enough memory to read this image") from error
        if self.seed is None:
            return self.transform(image), label
        with _seeded(((self.seed * 1_000_003 + epoch) * 10_000_019 + index) % 2**64):
            return self.transform(image), label

    def __getitems__(self, chosen: Sequence[int | Key]) -> list[tuple[Tensor, Label] | Skipped | ResodeError]:
        """Items for a loader. An error comes as the last of them: raised in a worker it would arrive as a traceback."""
        items: list[tuple[Tensor, Label] | Skipped | ResodeError] = []
        for key in chosen:
            try:
                items.append(self[key])
            except ResodeError as error:
                items.append(error)
                break
        return items

    def received(self, batch: Batch) -> Batch:
        """The batch, once it is in the main process. Raises the error that reading it met; notes what was skipped."""
        if batch.failure is not None:
            raise batch.failure
        self.skipped.update(batch.skipped)
        return batch

    def skipped_note(self) -> str | None:
        """What to say of the corrupt files that were left out so far."""
        if not self.skipped:
            return None
        files = first_few([shown(name) for name in self.skipped])
        return f"skipped {counted(len(self.skipped), 'corrupt file')} of {shown(self.name)}, {self.split}: {files}"

    def _read(self, index: int) -> tuple[Image.Image, Label]:
        try:
            image, number = self.samples[index]
            image = to_rgb(image)
        except (UnreadableImage, ResodeError, MemoryError):
            raise
        except Exception as error:  # whatever a decoder of torchvision's stumbles over
            raise UnreadableImage(str(error) or type(error).__name__) from error
        return image, self._label(int(number))

    def _classes(self, number: int) -> Sequence[int]:
        if self.sets is not None:
            return self.sets[number]
        return [number if self.labels is None else self.labels[number]]

    def _label(self, number: int) -> Label:
        if self.sets is None:
            return self._classes(number)[0]
        label = torch.zeros(len(self.class_names))
        label[list(self.sets[number])] = 1
        return label

    def _size(self, index: int, file: str) -> int:
        return int(self.samples.stored(index)) if hasattr(self.samples, "stored") else os.stat(file).st_size

    def _file(self, index: int) -> str:
        return str(self.samples.samples[index][0]) if hasattr(self.samples, "samples") else f"image {index}"


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """What transforms draw from, torch's generator of the CPU, starts from the seed, and stands as before at the end.

    torch.manual_seed seeds every GPU too, or, where none was used yet, notes the whole call stack for that: some 100 µs
    of each image.
    """
    generator = torch.default_generator
    before = generator.get_state()
    try:
        generator.manual_seed(seed)
        yield
    finally:
        generator.set_state(before)


def batches(
    data: ImageData,
    batch_size: int,
    *,
    order: Sequence[int] | None = None,
    epoch: int = 0,
    workers: int | str = 0,
    device: torch.device | str = "cpu",
    processes: Processes = ALONE,
) -> Generator[Batch, None, None]:
    """The data in batches, in the given order, augmented as in an epoch. workers, device: see `read`.

    processes: give this one's part of each batch, which may be empty.
    """
    order = range(len(data)) if order is None else order
    workers = worker_count(workers, len(order), device)
    parts = (processes.share(order[first : first + batch_size]) for first in range(0, len(order), batch_size))
    chosen = ([(epoch, i) for i in part] for part in parts)
    return read(data, chosen, workers=workers, device=device)


def read(
    data: ImageData, chosen: Iterable[Sequence[Key]], *, workers: int | str = 0, device: torch.device | str = "cpu"
) -> Generator[Batch, None, None]:
    """A batch for each sequence of keys, which may go on without end: workers read ahead of what is asked for.

    workers: processes that read; 0: none besides this one; 'auto': as many as pay where a whole epoch is read.
    device: where the batches go. From workers to a GPU, they come in memory that it copies from by itself.
    """
    count = worker_count(workers, len(data), device)
    own = torch.Generator()  # a loader draws a seed for its workers; not from the generator that dropout uses
    loader: DataLoader[Any] = DataLoader(
        data,
        batch_sampler=chosen,  # type: ignore[arg-type]  # which has no length where it has no end
        collate_fn=_collate,
        generator=own,
        pin_memory=count > 0 and torch.device(device).type == "cuda",
        **loader_arguments(count),
    )
    for batch in read_in_workers(loader) if count else loader:
        yield data.received(batch)


@contextmanager
def ending(data: Iterable[Batch]) -> Iterator[None]:
    """Batches that are read end with the block, by whatever that ends: workers that are left to be found end late."""
    try:
        yield
    finally:
        if isinstance(data, Generator):
            data.close()


def _collate(items: Sequence[tuple[Tensor, Label] | Skipped | ResodeError]) -> Batch:
    good = [item for item in items if isinstance(item, tuple)]
    skipped = {item.file: item.reason for item in items if isinstance(item, Skipped)}
    failure = next((item for item in items if isinstance(item, ResodeError)), None)
    if not good or failure is not None:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), skipped, failure)
    images, labels = default_collate(good)  # in a worker, straight into the memory that both processes share
    return Batch(images, labels, skipped)
