"""Tables of images with several labels: both forms, what is refused, and what is held out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from resode_cli.data import batches, open_data
from resode_cli.data.holding_out import Division
from resode_cli.data.label_sets import held_out_sets
from resode_cli.errors import ResodeError
from resode_cli.network.parts import Preprocessing

PLAIN = Preprocessing(size=8, crop_fraction=1.0)
CELLS = ["cat", "cat{}dog", "owl{}cat", "", "dog", "cat{}dog{}owl", "owl", "dog{}", "cat", "owl{}owl"]
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a table beside ten images."""
    for i in range(10):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")

    def make(text: str) -> Path:
        (tmp_path / "t.csv").write_text(text)
        return tmp_path / "t.csv"

    return make


def cells(column: str = "labels", separator: str = "|") -> str:
    own = (cell.replace("{}", separator) for cell in CELLS)
    return "\n".join([f"path,{column}", *(f'{i}.png,"{cell}"' for i, cell in enumerate(own))])


def columns(*, more: str = "", names: str = "cat,dog,owl") -> str:
    sets = [set(cell.replace("{}", " ").split()) for cell in CELLS]
    rows = (",".join(str(int(name in own)) for name in names.split(",")) for own in sets)
    end = "" if not more else f",{more}"
    return "\n".join([f"path,{names}{end}", *(f"{i}.png,{row}{',7' if more else ''}" for i, row in enumerate(rows))])


def opened(table: Path, split: str = "train", **arguments) -> dict[str, set[str]]:
    """File name to classes, by what a model is fed."""
    data = open_data(str(table), PLAIN, split, **arguments)
    found = {}
    for first, batch in enumerate(batches(data, 1)):
        name = os.path.basename(data.file_of(first))
        found[name] = {data.class_names[k] for k in batch.labels[0].nonzero().flatten().tolist()}
    return found


@pytest.mark.parametrize(
    "text",
    [cells(), cells("Tags", ";"), cells("label"), columns(), columns(more="width"), columns(names="owl,dog,cat")],
)
def test_both_forms_say_the_same(text: str, write: Write):
    table = write(text)
    whole = opened(table, "train") | opened(table, "val")
    assert whole == {f"{i}.png": set(cell.replace("{}", " ").split()) for i, cell in enumerate(CELLS)}
    data = open_data(str(table), PLAIN, "train", val_split=0.1)
    assert data.multi_label and data.class_names == ("cat", "dog", "owl")
    assert any("images have several labels" in note for note in data.notes)
    assert any("1 of 10 rows have no label" in note for note in data.notes)
    assert any("left alone: width" in note for note in data.notes) == ("width" in text)
    counts = Counter(name for own in opened(table, "train").values() for name in own)
    train = open_data(str(table), PLAIN, "train")
    assert train.label_counts() == [counts[name] for name in train.class_names]


def test_true_and_false_are_1_and_0(write: Write):
    text = columns().replace(",1", ",True").replace(",0", ",FALSE")
    assert opened(write(text)) == opened(write(columns()))


def test_a_column_is_a_class_although_no_image_is_of_it(write: Write):
    table = write(columns(names="cat,dog,never,owl"))
    data = open_data(str(table), PLAIN, "train")
    assert data.class_names == ("cat", "dog", "never", "owl") and data.label_counts()[2] == 0
    assert any("has no images of never: it is not trained here" in note for note in data.notes)
    known = open_data(str(table), PLAIN, "train", class_names=["cat", "dog", "owl"], multi_label=True)
    assert known.class_names == ("cat", "dog", "owl")


def test_rare_labels_may_be_in_one_split_alone(write: Write):
    parts = ("train", "train", "val", "test")
    own = ("cat|dog", "cat|rare", "cat|rarer", "dog|rarest")
    lines = [f"{i}.png,{labels},{part}" for i, (labels, part) in enumerate(zip(own, parts, strict=True))]
    table = write("\n".join(["path,labels,split", *lines]))
    data = open_data(str(table), PLAIN, "train")
    assert data.class_names == ("cat", "dog", "rare", "rarer", "rarest")
    assert any("train has no images of rarer, rarest: they are not trained here" in note for note in data.notes)


@pytest.mark.parametrize(
    "own, said",
    [
        (["cat, dog", "cat"], True),
        (["cat, dog", "dog, owl"], True),
        (["tench, Tinca tinca", "goldfish, Carassius auratus", "cat"], False),
    ],
)
def test_labels_with_commas_that_seem_to_be_several_are_named(own: list[str], said: bool, write: Write):
    table = write("\n".join(["path,label", *(f'{i}.png,"{own[i % len(own)]}"' for i in range(10))]))
    notes = open_data(str(table), PLAIN, "train").notes
    assert any("is taken for one class; several labels of an image are separated by | or ;" in n for n in notes) == said


def test_a_column_without_a_name_is_called_so(write: Write):
    text = columns(more="width").replace("width", "", 1)
    assert any("left alone: a column without a name" in n for n in open_data(str(write(text)), PLAIN, "train").notes)


def test_columns_with_one_1_a_row_are_of_one_class_an_image_unless_a_model_gives_several(write: Write):
    table = write("path,a,b\n" + "".join(f"{i}.png,{i % 2},{1 - i % 2}.0\n" for i in range(10)))
    data = open_data(str(table), PLAIN, "train", val_split=0.2)
    assert not data.multi_label and sorted(data.label_counts()) == [4, 4]
    assert any("every image is of one class, by 2 columns of 0 and 1" in note for note in data.notes)
    assert open_data(str(table), PLAIN, "train", multi_label=True).multi_label


@pytest.mark.parametrize(
    "text, several, message",
    [
        ("path,label\n0.png,a|b\n1.png,a;c", None, "separated by | in some rows and by ; in others"),
        ("path,label\n0.png,a|b\n1.png,a", False, "the model gives an image one class; `resode finetune --new-head`"),
        (
            "path,label\n0.png,a\n0.png,b",
            None,
            "with two labels, a and b; several labels of an image stand in one cell",
        ),
        ("path,label\n0.png,a\n1.png,", None, "1 row without a label (line 3)"),
        ("path,width\n0.png,8\n1.png,8", None, "has no column of labels"),
        ("path,flag\n0.png,0\n1.png,1", None, "has no column of labels"),
        ("path,flag\n0.png,\n1.png,1", None, "has no column of labels"),
        ("path,a,b\n0.png,0,1\n1.png,,1", None, "the column a is of 0 and 1"),
        ("path,a,b\n0.png,0,1\n1.png,1,", None, "but for 1 row with an empty cell; write 1 where"),
        ("path,a,b\n0.png,-1,1\n1.png,1,nan", None, "the column a is of 0 and 1, but for 1 row with '-1' in it"),
        ("path,labels\n0.png,\"['a', 'b']\"\n1.png,['a']", None, "labels are written as lists, ['a', 'b']; write them"),
    ],
)
def test_what_says_no_labels_is_refused(text: str, several: bool | None, message: str, write: Write):
    with pytest.raises(ResodeError) as refused:
        open_data(str(write(text)), PLAIN, "train", multi_label=several)
    assert message in str(refused.value)


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_a_model_of_several_labels_takes_no_data_of_one_class(name: str, make_folder: Callable[..., Path]):
    where = str(make_folder()) if name == "folder" else name
    with pytest.raises(ResodeError, match="gives an image any number of labels, and in .* each has one class"):
        open_data(where, PLAIN, "train", multi_label=True)


def test_without_labels_the_same_images_are_left_out_of_training(write: Write):
    table = write(cells())
    plain = open_data(str(table), PLAIN, "train", labelled=False)
    assert {os.path.basename(plain.file_of(i)) for i in range(len(plain))} == set(opened(table, "train"))
    assert not plain.multi_label


def test_a_model_knows_its_classes_in_its_own_order(write: Write):
    table = write(cells())
    names = ["owl", "wolf", "dog", "cat"]
    assert opened(table, "train", class_names=names, multi_label=True) == opened(table, "train")
    with pytest.raises(ResodeError, match="only the data: owl"):
        open_data(str(table), PLAIN, "train", class_names=["cat", "dog"], multi_label=True)


SETS = st.lists(st.sets(st.integers(0, 3), max_size=3).map(lambda own: tuple(sorted(own))), min_size=2, max_size=40)


@given(sets=SETS, seed=st.integers(0, 9), percent=st.integers(5, 60))
def test_no_class_loses_its_last_training_image_and_each_gives_its_share(sets, seed: int, percent: int):
    keys = [f"{i}.png" for i in range(len(sets))]
    division = Division(percent / 100, seed, "all")
    chosen = held_out_sets(division, keys, sets)
    assert chosen == held_out_sets(division, keys, sets)
    for label in range(4):
        own = [out for labels, out in zip(sets, chosen, strict=True) if label in labels]
        assert not own or not all(own)
    without = [out for labels, out in zip(sets, chosen, strict=True) if not labels]
    assert sum(without) == (min(-(-percent * len(without) // 100), len(without) - 1) if without else 0)


def test_of_many_images_every_class_gives_about_its_share():
    sets = [tuple(k for k in range(4) if (i * 7919 >> k) % (k + 2) == 0) for i in range(400)]
    chosen = held_out_sets(Division(0.2, 3, "all"), [str(i) for i in range(400)], sets)
    assert 70 <= sum(chosen) <= 110
    for label in range(4):
        own = [out for labels, out in zip(sets, chosen, strict=True) if label in labels]
        assert 0.18 <= sum(own) / len(own) <= 0.28, label
