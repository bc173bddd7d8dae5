"""Labels mean the model's classes, whatever folders, file systems and alphabets make of their names."""

from __future__ import annotations

import random
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from resode_cli.data import ImageData, check_classes, named, open_data, open_labelled
from resode_cli.errors import ResodeError
from resode_cli.network.model import ModelInfo
from resode_cli.network.parts import Preprocessing, SourceSpec

PLAIN = Preprocessing(size=16, crop_fraction=1.0)
Make = Callable[..., Path]


def info_of(classes: int, names: Sequence[str] | None = None) -> ModelInfo:
    return ModelInfo(SourceSpec("file", "net.py:make"), PLAIN, classes, None if names is None else tuple(names))


def meanings(data: ImageData) -> dict[str, str]:
    """Of each class folder, the class that its images are labelled as."""
    found = {}
    for i in range(len(data)):
        item = data[i]
        assert isinstance(item, tuple)
        found[Path(data.samples.samples[i][0]).parts[-2]] = data.class_names[item[1]]
    return found


# the order of classes


@pytest.mark.parametrize(
    "names, expected",
    [
        ([str(k) for k in range(12)], [str(k) for k in range(12)]),
        (["-1", "0", "10", "2"], ["-1", "0", "10", "2"]),  # a minus is no digit
        (["00", "01", "02", "10", "11"], ["00", "01", "02", "10", "11"]),
        (["1", "02", "10", "003"], ["1", "02", "003", "10"]),
        (["1", "2", "10", "cat"], ["1", "10", "2", "cat"]),
        (["n1", "n10", "n2"], ["n1", "n2", "n10"]),
        (["n1", "n10", "m2"], ["m2", "n1", "n10"]),
        (["²", "10", "2"], ["10", "2", "²"]),  # digits to Python, and no number
        (["Cat", "ant", "bee"], ["Cat", "ant", "bee"]),
        (["éléphant", "zèbre", "ours"], ["ours", "zèbre", "éléphant"]),
        (["1e3", "2", "10"], ["10", "1e3", "2"]),
    ],
    ids=str,
)
def test_names_are_sorted_as_numbers_only_where_all_are(names: list[str], expected: list[str], make_folder: Make):
    data = open_labelled(str(make_folder(classes=names, each=1)), info_of(len(names)), "train")
    assert data.class_names == tuple(expected)
    assert all(folder == meaning for folder, meaning in meanings(data).items())
    said = [note for note in data.notes if "taken by number" in note]
    assert bool(said) == (expected != sorted(expected))


@pytest.mark.parametrize(
    "names", [[str(k) for k in range(12)], ["cat", "dog", "owl"], ["a", "B", "c"], ["été", "hiver", "âne"]]
)
@pytest.mark.parametrize("order", ["text", "reversed", "shuffled"])
def test_the_models_names_decide_the_order(names: list[str], order: str, make_folder: Make):
    known = sorted(names, reverse=order == "reversed")
    if order == "shuffled":
        random.Random(1).shuffle(known)
    folder = str(make_folder(classes=names, each=1))
    for split in ("train", "test"):
        data = open_labelled(folder, info_of(len(names), known), split)
        assert data.class_names == tuple(known) and not data.notes
        assert all(name == meaning for name, meaning in meanings(data).items())


def test_the_order_of_images_does_not_depend_on_that_of_classes(make_folder: Make):
    folder = str(make_folder(classes=[str(k) for k in range(12)], each=1))
    found = [open_data(folder, PLAIN, "train", class_names=names) for names in (None, [str(k) for k in range(12)])]
    assert found[0].samples.samples == found[1].samples.samples
    assert [Path(file).parts[-2] for file, _ in found[0].samples.samples][:4] == ["0", "1", "10", "11"]


def test_a_named_set_is_read_in_the_models_order():
    names = ["3", "1", "4", "5", "9", "2", "6", "8", "7", "0"]
    plain = open_data("digits", PLAIN, "test", images=20)
    data = open_labelled("digits", info_of(10, names), "test", images=20)
    for i in range(20):
        assert names[data[i][1]] == str(plain[i][1])


@pytest.mark.parametrize("first, second", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_may_be_spelled_in_two_ways(first: str, second: str, make_folder: Make):
    names = ["chèvre", "âne"]
    folder = make_folder(classes=[unicodedata.normalize(first, n) for n in names], splits=("train",), each=1)
    make_folder(classes=[unicodedata.normalize(second, n) for n in names], splits=("test",), each=1)
    data = open_data(str(folder), PLAIN, "test")
    assert data.class_names == tuple(names)
    for known in names, [unicodedata.normalize("NFD", name) for name in names]:
        assert open_labelled(str(folder), info_of(2, known), "test").class_names == tuple(known)


# classes without images


@pytest.mark.parametrize("emptied", ["empty folder", "no folder"])
@pytest.mark.parametrize("lacking, other", [("test", "train"), ("train", "test")])
@pytest.mark.parametrize("known", [None, ("cat", "dog", "owl"), ("owl", "dog", "cat")])
def test_a_class_without_images_is_named_and_the_rest_keeps_its_place(
    emptied, lacking, other, known, make_folder: Make
):
    folder = make_folder(each=2)
    shutil.rmtree(folder / lacking / "dog")
    if emptied == "empty folder":
        (folder / lacking / "dog").mkdir()
    data = open_labelled(str(folder), info_of(3, known), lacking)
    assert data.class_names == (known or ("cat", "dog", "owl"))
    assert meanings(data) == {"cat": "cat", "owl": "owl"}
    what = "trained" if lacking == "train" else "measured"
    assert tuple(n for n in data.notes if "names no classes" not in n) == (
        f"{folder / lacking} has no images of dog: it is not {what} here",
    )
    assert len(open_labelled(str(folder), info_of(3, known), other)) == 6


def test_many_classes_without_images_are_cut_short(make_folder: Make):
    names = [f"c{k}" for k in range(12)]
    data = open_labelled(str(make_folder(classes=names[:3], each=1)), info_of(12, names), "test")
    assert "has no images of c3, c4, c5, c6, c7 and 4 more: they are not measured here" in data.notes[0]


# classes that differ


@pytest.mark.parametrize(
    "train, test, message",
    [
        (("cat", "dog", "owl"), ("cat", "dog", "owls"), "only train: owl; only test: owls"),
        (("Cat", "dog"), ("cat", "dog"), "only train: Cat; only test: cat"),
        (("1", "2"), ("01", "2"), "only train: 1; only test: 01"),
        (
            [f"a{k}" for k in range(9)],
            [f"b{k}" for k in range(9)],
            "only train: a0, a1, a2, a3, a4 and 4 more; only test: b0, b1, b2, b3, b4 and 4 more",
        ),
        (("a\x1bb", "c"), ("c", "d"), r"only train: 'a\\x1bb'; only test: d"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_splits_with_different_classes_are_an_error(train, test, message: str, split: str, make_folder: Make):
    folder = make_folder(classes=train, splits=("train",), each=1)
    make_folder(classes=test, splits=("test",), each=1)
    with pytest.raises(ResodeError, match=f"the splits have different classes .{message}.; make the names"):
        open_data(str(folder), PLAIN, split)


@pytest.mark.parametrize(
    "names, message",
    [
        (("cat", "dog", "yak"), "only the data: owl; only the model: yak"),
        (("cat", "dog"), "only the data: owl; `resode finetune --new-head`"),
        (
            ("CAT", "dog", "owl"),
            r"only the data: cat; only the model: CAT \(some differ in upper and lower case alone\)",
        ),
        (("0", "1", "2"), "only the data: cat, dog, owl; only the model: 0, 1, 2"),
    ],
)
def test_other_classes_than_the_models_are_an_error(names: tuple[str, ...], message: str, make_folder: Make):
    folder = str(make_folder())
    with pytest.raises(ResodeError, match=f"the model tells other classes apart than .*: {message}") as error:
        open_labelled(folder, info_of(len(names), names), "train")
    assert "--num-classes" not in str(error.value)
    with pytest.raises(ResodeError, match="the model tells other classes apart than .*: "):
        check_classes(open_data(folder, PLAIN, "train"), len(names), names)


def test_labels_in_another_order_than_the_models_are_an_error(make_folder: Make):
    data = open_data(str(make_folder()), PLAIN, "train")
    check_classes(data, 3, ("cat", "dog", "owl"))
    with pytest.raises(ResodeError, match=r"in another order \(dog, cat, owl; the data: cat, dog, owl\)"):
        check_classes(data, 3, ("dog", "cat", "owl"))


@pytest.mark.parametrize(
    "head, hint", [(2, "`resode"), (10, "make an empty folder for each class without images, or `resode")]
)
def test_another_number_of_classes_than_the_head_is_refused(head: int, hint: str, make_folder: Make):
    data = open_data(str(make_folder()), PLAIN, "train")
    check_classes(data, 3, None)
    with pytest.raises(ResodeError, match=f"has 3 classes and the model's head {head}, .*; {hint} finetune --new-head"):
        check_classes(data, head, None)


@pytest.mark.parametrize("lacking", ["train", "test"])
def test_a_folder_that_makes_one_class_too_many_is_named(lacking: str, make_folder: Make):
    folder = make_folder(each=1)
    (folder / ("test" if lacking == "train" else "train") / "notes").mkdir()
    with pytest.raises(ResodeError, match="has 4 classes .* head 3, .*; not every split has notes: remove what is no"):
        open_labelled(str(folder), info_of(3), "test")
    assert len(open_labelled(str(folder), info_of(4), "test").class_names) == 4


def test_a_name_in_no_encoding_is_refused(make_folder: Make):
    folder = make_folder()
    try:
        (folder / "train" / "b\udcff").mkdir()
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 names alone")
    with pytest.raises(ResodeError, match="has a name that is not UTF-8; rename it"):
        open_data(str(folder), PLAIN, "train")


def test_one_class_spelled_in_two_ways_is_refused(make_folder: Make):
    names = [unicodedata.normalize(form, "âne") for form in ("NFC", "NFD")]
    folder = make_folder(classes=names, each=1, splits=("train",))
    with pytest.raises(ResodeError, match="has two folders for the class âne"):
        open_data(str(folder), PLAIN, "train")


def test_every_named_set_that_has_a_val_split_is_known():
    for name in named.WITH_VAL:
        assert named._TORCHVISION[name][1]("val")["split"] == "val"
