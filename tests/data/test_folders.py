"""Image folders as people have them: which folder is which split, and which files are images."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from resode_cli.data import ImageData, batches, held_out_splits, named, open_data
from resode_cli.errors import ResodeError, UsageError
from resode_cli.network.parts import Preprocessing

PLAIN = Preprocessing(size=16, crop_fraction=1.0)
Make = Callable[..., Path]


def labels(data: ImageData) -> list[int]:
    return [int(label) for batch in batches(data, 64) for label in batch.labels]


def files(data: ImageData, folder: Path) -> list[str]:
    return [os.path.relpath(file, folder) for file, _ in data.samples.samples]


# splits


@pytest.mark.parametrize("split, size", [("train", 1437), ("test", 360)])
def test_the_embedded_digits_have_their_sizes(split: str, size: int):
    data = open_data("digits", PLAIN, split)
    assert len(data) == size and data.class_names == tuple("0123456789")
    assert set(labels(data)) == set(range(10))
    image = data[0][0]
    assert isinstance(image, torch.Tensor)
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32


@pytest.mark.parametrize("name", ["test", "val", "validation", "valid", "dev", "Test", "VAL"])
def test_a_folder_has_a_train_split_and_a_held_out_one(name: str, make_folder: Make):
    folder = make_folder(splits=("train", name), each=2)
    train, test = (open_data(str(folder), PLAIN, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (6, 6)
    assert train.class_names == test.class_names == ("cat", "dog", "owl")
    assert labels(test) == [0, 0, 1, 1, 2, 2]
    assert not torch.equal(train[0][0], test[0][0])
    assert (train.split, test.split) == ("train", "test" if name.lower() == "test" else "val")
    assert bool(test.notes) == (test.split == "val")  # said: what was asked for is not what was measured


@pytest.mark.parametrize(
    "splits, held_out, asked",
    [
        (("train", "val", "test"), ("val", "test"), {"val": "val", "test": "test"}),
        (("train", "valid", "test"), ("val", "test"), {"val": "valid", "test": "test"}),
        (("train", "test"), ("test",), {"test": "test"}),
        (("train", "dev"), ("test",), {"val": "dev", "test": "dev"}),
    ],
)
def test_val_chooses_and_test_is_left_for_the_end(splits, held_out, asked, make_folder: Make):
    folder = make_folder(splits=splits, each=1)
    assert held_out_splits(str(folder)) == held_out
    for split, name in asked.items():
        data = open_data(str(folder), PLAIN, split)
        assert files(data, folder) == [f"{name}/{label}/0.png" for label in ("cat", "dog", "owl")]


@pytest.mark.parametrize("inside", ["", "unknown"])
def test_a_test_set_without_labels_leaves_the_measuring_to_val(inside: str, make_folder: Make):
    folder = make_folder(splits=("train", "val"), each=1)
    (folder / "test" / inside).mkdir(parents=True)
    for i in range(2):
        shutil.copy(folder / "val" / "cat" / "0.png", folder / "test" / inside / f"{i}.png")
    data = open_data(str(folder), PLAIN, "test")
    assert data.split == "val" and len(data) == 3
    but = " (but unknown)" if inside else ""
    assert any(f"test has no labels{but}: measured on" in note for note in data.notes)
    assert held_out_splits(str(folder)) == ("test",)


def test_of_two_folders_for_one_split_the_other_is_named(make_folder: Make):
    folder = make_folder(splits=("train", "val", "validation", "Val"), each=1)
    data = open_data(str(folder), PLAIN, "val")
    assert files(data, folder)[0].startswith("val/")
    assert any("val is the val split, validation and Val left alone" in note for note in data.notes)


def test_a_folder_of_results_is_no_val_split(make_folder: Make):
    folder = make_folder(each=1)
    (folder / "dev" / "run1").mkdir(parents=True)
    assert held_out_splits(str(folder)) == ("test",)
    assert open_data(str(folder), PLAIN, "test").class_names == ("cat", "dog", "owl")


def test_splits_that_are_one_folder_are_named(make_folder: Make):
    folder = make_folder(splits=("train",), each=1)
    (folder / "test").symlink_to("train")
    assert any("are the same folder: nothing is held out" in n for n in open_data(str(folder), PLAIN, "test").notes)


# what is no image folder


@pytest.mark.parametrize(
    "there, asked, message",
    [
        (
            "train",
            "test",
            r"test, testing, val, validation, valid or dev; --val-split 0.2 holds a share of \S*train out",
        ),
        (
            "test",
            "train",
            "train or training; image folders are laid out as pictures/CLASS/IMAGE, .* pictures/train/CLASS",
        ),
    ],
)
def test_a_missing_split_is_named(there: str, asked: str, message: str, make_folder: Make):
    folder = make_folder(splits=(there,))
    with pytest.raises(ResodeError, match=f"pictures has no folder {message}"):
        open_data(str(folder), PLAIN, asked)


def an_empty_folder(folder: Path) -> Path:
    shutil.rmtree(folder / "train")
    shutil.rmtree(folder / "test")
    return folder


def a_split(folder: Path) -> Path:
    return folder / "train"


def a_class(folder: Path) -> Path:
    return folder / "train" / "cat"


def the_folder_above(folder: Path) -> Path:
    return folder.parent


def loose_images(folder: Path) -> Path:
    for name in ("cat", "dog", "owl"):
        shutil.rmtree(folder / "train" / name)
    Image.new("RGB", (8, 8)).save(folder / "train" / "0.png")
    return folder


def no_classes(folder: Path) -> Path:
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    return folder


def no_images(folder: Path) -> Path:
    for file in (folder / "train").rglob("*.png"):
        file.rename(file.with_suffix(".heic"))
    return folder


def one_class_twice(folder: Path) -> Path:
    (folder / "train" / "kitten").symlink_to("cat")
    return folder


@pytest.mark.parametrize(
    "lay_out, message",
    [
        (an_empty_folder, r"pictures holds no images; image folders are laid out as pictures/CLASS/IMAGE, of which"),
        (a_split, r"train has no folder .*; pass the folder of the splits: \S*/pictures$"),
        (a_class, r"cat has no folder .*; pass the folder of the splits: \S*/pictures$"),
        (the_folder_above, r"has no folder .*; did you mean \S*/pictures\?"),
        (loose_images, r"train holds 1 images and no class folders; sort the images into train/CLASS/IMAGE"),
        (no_classes, r"train holds no class folders; sort"),
        (no_images, r"train: no images in its class folders \(left out: 9 \.heic\)"),
        (one_class_twice, r"train: the classes cat and kitten are one folder"),
    ],
)
def test_a_folder_laid_out_otherwise_is_one_line(lay_out, message: str, make_folder: Make):
    folder = lay_out(make_folder())
    with pytest.raises(ResodeError, match=message):
        open_data(str(folder), PLAIN, "train")


@pytest.mark.parametrize(
    "name, message",
    [
        ("", "the name of the data is empty"),
        ("images.zip", "is a file; unpack it if it is an archive"),
        ("nowhere/at/all", "data folder 'nowhere/at/all' does not exist"),
        ("digit", "unknown data set .*'digit'; did you mean .*digits"),
        ("cifar-10", "unknown data set .*'cifar-10'; did you mean .*cifar10"),
        ("flower102", "unknown data set .*'flower102'; did you mean .*flowers102"),
        ("torchvision:cifar11", "unknown data set of torchvision 'cifar11'; did you mean cifar10"),
        ("torchvision:digits", "unknown data set of torchvision 'digits'"),
    ],
)
def test_a_name_that_means_nothing_is_a_usage_error(name: str, message: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("images.zip").write_bytes(b"")
    with pytest.raises(UsageError, match=message):
        open_data(name, PLAIN, "train")


def test_a_folder_that_cannot_be_listed_is_an_error(make_folder: Make, monkeypatch):
    folder, scandir = make_folder(), os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for labelled in (True, False):
        with pytest.raises(ResodeError, match="dog cannot be listed: Permission denied"):
            open_data(str(folder), PLAIN, "train", labelled=labelled)


# names of data sets


@pytest.mark.parametrize("name", ["digits", "cifar10", "flowers102"])
def test_a_folder_called_like_a_data_set_is_the_folder(name: str, make_folder: Make, monkeypatch):
    folder = make_folder(name)
    monkeypatch.chdir(folder.parent)
    data = open_data(name, PLAIN, "train")
    assert data.class_names == ("cat", "dog", "owl")
    assert any(f"the folder {name} here, not" in note for note in data.notes)


def test_a_folder_without_splits_does_not_hide_a_data_set(tmp_path: Path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    data = open_data("digits", PLAIN, "test")
    assert len(data) == 360 and any("the folder digits here holds no folder train" in note for note in data.notes)


@pytest.mark.parametrize("name", ["cifar10", "torchvision:cifar10"])
@pytest.mark.parametrize("error", [RuntimeError("Dataset not found"), OSError("Network is unreachable")])
def test_a_download_that_fails_is_one_line(error: Exception, name: str, make_folder: Make, monkeypatch, tmp_path):
    def fail(root, download, train):
        raise error

    if ":" in name:
        make_folder("cifar10")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(named.datasets, "CIFAR10", fail)  # type: ignore[attr-defined]
    with pytest.raises(ResodeError, match=f"cifar10 is not in .* cannot be downloaded .{error}.; connect"):
        open_data(name, PLAIN, "train", root=tmp_path)


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_a_data_set_has_only_its_own_splits(name: str):
    with pytest.raises(ResodeError, match=f"{name} has no val split"):
        open_data(name, PLAIN, "val")
    assert held_out_splits(name) == ("test",)


# which files


def both(folder: Path) -> list[ImageData]:
    """The train split as labelled images, and as images alone."""
    return [open_data(str(folder), PLAIN, "train", labelled=labelled) for labelled in (True, False)]


HIDDEN = [".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git", "__pycache__"]


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("where", ["", "dog"])
def test_hidden_folders_are_neither_classes_nor_images(name: str, where: str, make_folder: Make):
    folder = make_folder(each=1)
    shutil.copytree(folder / "train" / "cat", folder / "train" / where / name)
    for data in both(folder):
        assert files(data, folder) == [f"train/{label}/0.png" for label in ("cat", "dog", "owl")]
        assert any(f"left out of {folder / 'train'}: hidden folders ({name})" in note for note in data.notes)


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "desktop.ini", "._0.png"])
def test_what_a_file_manager_leaves_is_passed_over(name: str, make_folder: Make):
    folder = make_folder(each=1)
    for where in ("", "cat"):
        (folder / "train" / where / name).write_bytes(b"x")
    for data in both(folder):
        assert len(data) == 3 and not data.notes


@pytest.mark.parametrize(
    "name, note",
    [
        ("photo.heic", "1 .heic"),
        ("labels.CSV", "1 .csv"),
        ("image", "1 without an extension"),
        (".secret.png", "1 hidden images"),
        ("a.\x1b[31m", r"1 '.\x1b[31m'"),
        ("drawing.eps", "1 .eps"),
    ],
)
def test_what_is_left_out_is_counted_by_extension(name: str, note: str, make_folder: Make):
    folder = make_folder(each=1)
    (folder / "train" / "cat" / name).write_bytes(b"x")
    for data in both(folder):
        assert len(data) == 3 and data.notes == (f"left out of {folder / 'train'}: {note}",)


def test_images_beside_the_class_folders_are_counted(make_folder: Make):
    folder = make_folder(each=1)
    shutil.copy(folder / "train" / "cat" / "0.png", folder / "train" / "0.png")
    data = open_data(str(folder), PLAIN, "train")
    assert len(data) == 3 and "1 images outside the class folders" in data.notes[0]


def link_to_itself(train: Path) -> None:
    (train / "cat" / "loop").symlink_to("loop")


def link_upwards(train: Path) -> None:
    (train / "cat" / "up").symlink_to("..")
    (train / "dog" / "up").symlink_to("../..")


def link_in_a_subfolder(train: Path) -> None:
    (train / "cat" / "more").mkdir()
    (train / "cat" / "more" / "same").symlink_to("../more")
    (train / "cat" / "more" / "above").symlink_to("..")


def link_to_another_class(train: Path) -> None:
    (train / "cat" / "friend").symlink_to("../dog")


def link_beside_the_classes(train: Path) -> None:
    (train / "everything").symlink_to(".")


def links_to_each_other(train: Path) -> None:
    for here, there in (("a", "b"), ("b", "a")):
        (train / here).mkdir()
        (train / here / "x").symlink_to(f"../{there}", target_is_directory=True)
    shutil.move(train / "a", train / "cat" / "a")
    shutil.move(train / "b", train / "dog" / "b")


def link_to_a_file_of_the_class(train: Path) -> None:
    (train / "cat" / "again.png").symlink_to("0.png")


@pytest.mark.parametrize(
    "link",
    [
        link_to_itself,
        link_upwards,
        link_in_a_subfolder,
        link_to_another_class,
        link_beside_the_classes,
        links_to_each_other,
        link_to_a_file_of_the_class,
    ],
)
def test_links_in_a_circle_add_nothing(link, make_folder: Make):
    folder = make_folder(each=2)
    link(folder / "train")
    for data in both(folder):
        real = [os.path.realpath(file) for file, _ in data.samples.samples]
        assert len(real) == len(set(real)) == 6
        for file, label in data.samples.samples if len(data.class_names) == 3 else ():
            assert Path(file).parts[-2] == data.class_names[label]
    assert len(open_data(str(folder), PLAIN, "train").class_names) == 3


def test_links_to_elsewhere_are_followed_once(make_folder: Make, tmp_path: Path):
    folder, pool = make_folder(each=1), make_folder("pool", splits=("train",), each=2)
    (folder / "train" / "cat" / "more").symlink_to(pool / "train" / "cat")
    (folder / "train" / "dog" / "linked.png").symlink_to(pool / "train" / "dog" / "1.png")
    (folder / "train" / "yak").symlink_to(pool / "train" / "owl")
    expected = ["cat/0.png", "cat/more/0.png", "cat/more/1.png", "dog/0.png", "dog/linked.png", "owl/0.png"]
    data = open_data(str(folder), PLAIN, "train")
    assert files(data, folder / "train") == [*expected, "yak/0.png", "yak/1.png"]
    assert labels(data) == [0, 0, 0, 1, 1, 2, 3, 3]


def test_a_class_that_is_a_link_to_nowhere_is_named(make_folder: Make):
    folder = make_folder(each=1)
    (folder / "train" / "yak").symlink_to("/nowhere/at/all")
    assert any("links that lead nowhere (yak)" in note for note in open_data(str(folder), PLAIN, "train").notes)


def test_images_of_a_class_may_lie_deeper(make_folder: Make):
    folder = make_folder(each=2)
    for name in ("b/x", "a", "a-b"):
        (folder / "train" / "cat" / name).mkdir(parents=True)
        shutil.copy(folder / "train" / "cat" / "0.png", folder / "train" / "cat" / name / "z.png")
    from torchvision.datasets import ImageFolder

    data = open_data(str(folder), PLAIN, "train")
    assert data.samples.samples == ImageFolder(str(folder / "train")).samples
