"""Images and labels: folders with splits, the embedded digits, and torchvision's data sets.

What a model's preprocessing asks for is what every command feeds it. Augmentation draws from a
generator seeded by (seed, epoch, image), so a run is the same whatever the number of workers and
wherever it was resumed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, UnidentifiedImageError
from safetensors.torch import load as load_safetensors
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets

from .errors import ResodeError, UsageError, first_few, unknown
from .parts import Preprocessing
from .transforms import transform

Split = Literal["train", "test"]
SPLIT_FOLDERS: dict[str, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val", "validation")}
N_TRAIN_DIGITS = 1437
DEFAULT_ROOT = Path("~/.cache/resode")

# torchvision data sets by the name a user types: the class, and its arguments for a split.
_TORCHVISION: dict[str, tuple[str, Callable[[str], dict[str, Any]]]] = {
    "cifar10": ("CIFAR10", lambda split: {"train": split == "train"}),
    "cifar100": ("CIFAR100", lambda split: {"train": split == "train"}),
    "mnist": ("MNIST", lambda split: {"train": split == "train"}),
    "fashionmnist": ("FashionMNIST", lambda split: {"train": split == "train"}),
    "svhn": ("SVHN", lambda split: {"split": split}),
    "stl10": ("STL10", lambda split: {"split": split}),
    "food101": ("Food101", lambda split: {"split": split}),
    "flowers102": ("Flowers102", lambda split: {"split": split}),
    "oxfordiiitpet": ("OxfordIIITPet", lambda split: {"split": "trainval" if split == "train" else "test"}),
    "imagenette": ("Imagenette", lambda split: {"split": "train" if split == "train" else "val"}),
}
NAMES = ("digits", *_TORCHVISION)
# A mirrored or strongly cropped digit is another symbol, or none.
_NOT_FLIPPED = {"digits", "mnist", "svhn"}


@dataclass(frozen=True)
class Batch:
    """images: (B, C, H, W) float32, normalised; labels: (B,); skipped: corrupt files left out."""

    images: Tensor
    labels: Tensor
    skipped: tuple[str, ...] = ()


class ImageData(Dataset[tuple[Tensor, int] | str]):
    """One split of a data set, preprocessed for a model."""

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
    ) -> None:
        self.name = name
        self.samples = samples
        self.class_names = tuple(class_names)
        self.transform = transform
        self.indices = range(len(samples)) if indices is None else indices
        self.seed = seed  # None: the transform draws nothing
        self.epoch = 0
        self.skip_corrupt = skip_corrupt

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Tensor, int] | str:
        """The image and its label, or the name of a corrupt file that is skipped."""
        index = self.indices[i]
        try:
            image, label = self.samples[index]
            image = image.convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            where = self.samples.samples[index][0] if hasattr(self.samples, "samples") else f"image {index}"
            if self.skip_corrupt:
                return str(where)
            raise ResodeError(
                f"{where}: not a readable image ({error}); --skip-corrupt leaves such files out"
            ) from error
        if self.seed is None:
            return self.transform(image), int(label)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed * 1_000_003 + self.epoch) * 10_000_019 + index)
            return self.transform(image), int(label)


def open_data(
    name: str,
    preprocessing: Preprocessing,
    split: Split,
    *,
    augment: bool = False,
    seed: int = 0,
    images: int | None = None,
    skip_corrupt: bool = False,
    root: Path = DEFAULT_ROOT,
    labelled: bool = True,
) -> ImageData:
    """One split of `name`: 'digits', a torchvision data set, or a folder of train and test (or val) folders.

    images: take this many, evenly spaced through the split, so that sorted classes are all seen.
    labelled: False takes any folder of images, however they are sorted into it; all labels are then 0.
    root: where torchvision data sets are downloaded to.
    Raises UsageError for a name or folder that does not exist, ResodeError for one without the split.
    """
    samples: Any
    if name == "digits":
        samples, classes = _Digits(split), [str(d) for d in range(10)]
    elif name in _TORCHVISION:
        samples, classes = _torchvision(name, split, root.expanduser())
    elif Path(name).is_dir():
        samples, classes = _folder(Path(name), split) if labelled else _unlabelled(Path(name), split)
    elif "/" in name or Path(name).suffix or Path(name).exists():
        raise UsageError(f"data folder {name!r} does not exist, or is not a folder")
    else:
        raise unknown("data set (and there is no such folder)", name, NAMES)
    indices = None
    if images is not None:
        if images < 1:
            raise UsageError(f"--images {images}: must be 1 or more")
        n = min(images, len(samples))
        indices = [i * len(samples) // n for i in range(n)]
    return ImageData(
        name,
        samples,
        classes,
        transform=transform(preprocessing, augment=augment, flip=name not in _NOT_FLIPPED),
        indices=indices,
        seed=seed if augment else None,
        skip_corrupt=skip_corrupt,
    )


def check_classes(data: ImageData, num_classes: int, class_names: Sequence[str] | None) -> None:
    """Raises ResodeError unless the data's classes are the ones that the model's head tells apart."""
    n = len(data.class_names)
    if n != num_classes:
        raise ResodeError(
            f"{data.name} has {n} classes and the model's head {num_classes};"
            f" convert the source again with --num-classes {n}"
        )
    if class_names is not None and tuple(class_names) != data.class_names:
        mine, theirs = first_few(list(class_names)), first_few(list(data.class_names))
        raise ResodeError(f"the model tells other classes apart ({mine}) than {data.name} has ({theirs})")


def batches(
    data: ImageData,
    batch_size: int,
    *,
    order: Sequence[int] | None = None,
    workers: int = 0,
    drop_last: bool = False,
    skip: int = 0,
) -> Iterator[Batch]:
    """The data in batches, in the given order; `skip` batches are left out without being read."""
    order = range(len(data)) if order is None else order
    chunks = [list(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    if drop_last and len(chunks) > 1 and len(chunks[-1]) < batch_size:
        chunks.pop()
    own = torch.Generator()  # a loader draws a seed for its workers; not from the generator that dropout uses
    loader: DataLoader[Any] = DataLoader(
        data, batch_sampler=chunks[skip:], num_workers=workers, collate_fn=_collate, generator=own
    )
    yield from loader


def _collate(items: Sequence[tuple[Tensor, int] | str]) -> Batch:
    good = [item for item in items if not isinstance(item, str)]
    skipped = tuple(item for item in items if isinstance(item, str))
    if not good:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), skipped)
    return Batch(torch.stack([image for image, _ in good]), torch.tensor([label for _, label in good]), skipped)


class _Digits:
    """The embedded digits as (PIL image, label)."""

    def __init__(self, split: Split) -> None:
        content = resources.files("resode_cli.digits").joinpath("digits.safetensors").read_bytes()
        tensors = load_safetensors(content)
        part = slice(0, N_TRAIN_DIGITS) if split == "train" else slice(N_TRAIN_DIGITS, None)
        self.images, self.labels = tensors["images"][part], tensors["labels"][part]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        pixels = (self.images[i].float() * (255 / 16)).round().to(torch.uint8)
        return Image.fromarray(pixels.numpy()), int(self.labels[i])


def _folder(path: Path, split: Split) -> tuple[Any, list[str]]:
    names = SPLIT_FOLDERS[split]
    folder = next((path / name for name in names if (path / name).is_dir()), None)
    if folder is None:
        raise ResodeError(
            f"{path} has no folder {' or '.join(names)}; an image folder is {path.name}/train/CLASS/IMAGE"
            f" and {path.name}/test/CLASS/IMAGE (or val)"
        )
    try:
        samples = datasets.ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise ResodeError(f"{folder}: {str(error).splitlines()[0]}") from error
    return samples, samples.classes


class _Unlabelled:
    """Image files as (PIL image, 0)."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.samples = [(str(file), 0) for file in files]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        path, label = self.samples[i]
        return datasets.folder.default_loader(path), label


def _unlabelled(path: Path, split: Split) -> tuple[_Unlabelled, list[str]]:
    folder = next((path / name for name in SPLIT_FOLDERS[split] if (path / name).is_dir()), path)
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in datasets.folder.IMG_EXTENSIONS)
    if not files:
        raise ResodeError(f"{folder} holds no images ({', '.join(datasets.folder.IMG_EXTENSIONS)})")
    return _Unlabelled(files), ["unlabelled"]


def _torchvision(name: str, split: Split, root: Path) -> tuple[Any, list[str]]:
    class_name, arguments = _TORCHVISION[name]
    dataset = getattr(datasets, class_name)
    try:
        with redirect_stdout(sys.stderr):
            samples = dataset(str(root), download=True, **arguments(split))
    except (RuntimeError, OSError) as error:
        raise ResodeError(
            f"{name} is not in {root} and cannot be downloaded ({str(error).splitlines()[0]});"
            " connect to the network or pass a folder of images"
        ) from error
    classes = getattr(samples, "classes", None)
    if classes is None:  # data sets that number their classes
        classes = [str(k) for k in sorted({int(label) for label in getattr(samples, "labels", range(10))})]
    return samples, [c if isinstance(c, str) else ", ".join(c) for c in classes]
