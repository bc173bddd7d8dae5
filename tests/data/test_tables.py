"""Tables of images as people have them: which columns they have, which rows are refused, and what is held out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from resode_cli.data import HoldOut, held_out_splits, open_data
from resode_cli.errors import ResodeError, UsageError
from resode_cli.network.parts import Preprocessing

PLAIN = Preprocessing(size=8, crop_fraction=1.0)
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a table beside the images a0.png … a9.png and b0.png … b9.png in the folder `all`."""
    (tmp_path / "all").mkdir()
    for name in "ab":
        for i in range(10):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "all" / f"{name}{i}.png")

    def make(text: str, name: str = "photos.csv", encoding: str = "utf-8") -> Path:
        (tmp_path / name).write_text(text, encoding=encoding)
        return tmp_path / name

    return make


def rows(columns: str, *, delimiter: str = ",") -> str:
    """All twenty, with their labels."""
    images = [f"all/{name}{i}.png{delimiter}class {name}" for name in "ab" for i in range(10)]
    return "\n".join([columns.replace(",", delimiter), *images]) + "\n"


def opened(table: Path, split: str = "train", **arguments) -> dict[str, str]:
    """File name to class."""
    data = open_data(str(table), PLAIN, split, **arguments)
    return {os.path.basename(file): data.class_names[label] for file, label in data.samples.samples}


@pytest.mark.parametrize("columns", ["path,label", "Image Path,CLASS", "filename,target", "file-name,category"])
@pytest.mark.parametrize(
    "name, delimiter, encoding", [("t.csv", ",", "utf-8"), ("t.tsv", "\t", "utf-8"), ("t.csv", ";", "utf-8-sig")]
)
def test_columns_are_found_by_their_names(columns: str, name: str, delimiter: str, encoding: str, write: Write):
    table = write(rows(columns, delimiter=delimiter), name, encoding)
    train, val = (opened(table, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (16, 4) and not set(train) & set(val) and opened(table, "test") == val
    assert train | val == {f"{name}{i}.png": f"class {name}" for name in "ab" for i in range(10)}
    assert sorted(val.values()) == ["class a"] * 2 + ["class b"] * 2
    assert held_out_splits(str(table)) == ("test",)
    assert set(opened(table, "train", labelled=False)) == set(train)
    assert len(opened(table, "val", val_split=0.5)) == 10


def test_a_column_of_splits_is_followed(write: Write):
    lines = ["all/a0.png,a,train", "all/b0.png,b,Training", "all/a1.png,a,valid", "all/b1.png,b,test"]
    table = write("\n".join(["path,label,split", *lines]))
    assert [set(opened(table, split)) for split in ("train", "val", "test")] == [
        {"a0.png", "b0.png"},
        {"a1.png"},
        {"b1.png"},
    ]
    assert held_out_splits(str(table)) == ("val", "test")
    data = open_data(str(table), PLAIN, "val")
    assert any("has no images of b: it is not measured here" in note for note in data.notes)
    with pytest.raises(UsageError, match="--val-split 0.2: .* has a val split of its own"):
        opened(table, val_split=0.2)


def test_of_a_train_split_in_a_table_a_share_is_held_out_where_it_is_asked_for(write: Write):
    lines = rows("path,label").splitlines()
    table = write("\n".join([f"{lines[0]},split", *(f"{line},train" for line in lines[1:-2])]))
    with pytest.raises(ResodeError, match="no rows of the test split, only of train; --val-split 0.2 holds"):
        opened(table, "test")
    table = write("\n".join([table.read_text(), *(f"{line},test" for line in lines[-2:])]))
    assert [len(opened(table, split, val_split=0.25)) for split in ("train", "val", "test")] == [13, 5, 2]
    assert held_out_splits(str(table), HoldOut(0.25)) == ("val", "test") and held_out_splits(str(table)) == ("test",)


@pytest.mark.parametrize("labels", ["a,b", "a|b,b"])
def test_a_split_without_any_label_is_left_out_but_where_no_labels_are_asked_for(labels: str, write: Write):
    own = [*labels.split(","), "", ""]
    lines = [f"all/{'ab'[i % 2]}{i // 2}.png,{label},{'train' if label else 'test'}" for i, label in enumerate(own)]
    table = write("\n".join(["path,label,split", *lines]))
    data = open_data(str(table), PLAIN, "train")
    assert len(data) == 2 and any("no row of test has a label; it is left out" in note for note in data.notes)
    with pytest.raises(ResodeError, match="no rows of the test split, only of train; --val-split 0.2"):
        open_data(str(table), PLAIN, "test")
    assert len(open_data(str(table), PLAIN, "test", labelled=False)) == 2


def test_paths_may_be_absolute_or_as_windows_writes_them(write: Write, tmp_path: Path, monkeypatch):
    table = write(f"path,label\n{tmp_path}/all/a0.png,a\nall\\a1.png,a\nall/b0.png,b\nall/b1.png,b\n")
    monkeypatch.chdir("/")
    assert set(opened(table)) | set(opened(table, "val")) == {"a0.png", "a1.png", "b0.png", "b1.png"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has no rows below its header"),
        ("path,label\n", "has no rows below its header"),
        ("name,label\nall/a0.png,a\n", r"has no column of paths \(path, .*\); its columns are name, label"),
        (
            "path,cat,dog\nall/a0.png,0,2\n",
            r"has no column of labels \(label, class, .*\); its columns are path, cat, dog",
        ),
        ("path,label\nall/a0.png,a\nall/a1.png,\nall/a2.png\n", r"2 rows without a label \(line 3, 4\); fill it in"),
        ("path,label\n,a\n", r"1 row without a path \(line 2\)"),
        ("path,label,split\nall/a0.png,a,\n", r"1 row without a split \(line 2\)"),
        ("path,label,split\nall/a0.png,a,hold\n", "line 2: 'hold' is no split: write train, val or test"),
        ("path,label\nall/a0.png,a,b\n", "line 2: more cells than the header has names"),
        ("path,path\nall/a0.png,a\n", "two of its columns have one name: path, path"),
        ("path,label\nall/a0.png,a\nall/./a0.png,b\n", r"a0.png stands in lines 2 and 3 with two labels, a and b"),
        ("path,label,split\nall/a0.png,a,train\nall/a0.png,a,val\n", "lines 2 and 3 with two splits, train and val"),
        (
            "path,label\nall/a0.png,a\nnone.png,a\n",
            r"1 of 2 files are not there: none.png \(line 3\); paths are relative",
        ),
        ('path,label\n"all/a0.png,a\n', "cannot be read as a table in UTF-8"),
    ],
)
def test_a_table_made_otherwise_is_one_line(text: str, message: str, write: Write):
    with pytest.raises(ResodeError, match=message) as error:
        opened(write(text))
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_one_line(write: Write):
    with pytest.raises(ResodeError, match="cannot be read as a table in UTF-8"):
        opened(write("path,label\nall/a0.png,café\n", encoding="latin-1"))


def test_missing_files_are_left_out_and_rows_that_come_again_taken_once(write: Write):
    text = "path,label\n" + "".join(f"all/a{i}.png,a\n" for i in (0, 1, 1)) + "none.png,a\nall/b0.png,b\n"
    data = open_data(str(write(text)), PLAIN, "train", skip_corrupt=True, val_split=0.01)
    assert len(data) == 2
    assert any("1 of 4 files are not there: none.png (line 5)" in note for note in data.notes)
    assert any("taken once, of several rows: all/a1.png" in note for note in data.notes)


def test_another_file_is_no_table(write: Write):
    with pytest.raises(UsageError, match=r"is a file; .* \(a table ends in .csv or .tsv\)"):
        opened(write("path,label\n", "photos.txt"))


def test_commands_take_a_table(write: Write, answer, build_tiny):
    table = write(rows("path,label"))
    Path("net.py").write_text(
        "from resode_cli.sources.cifar import CifarResNet\n"
        "def make(): return CifarResNet(1, num_classes=2, widths=(2, 4, 4))\n"
    )
    answer("convert", "net.py:make", "--no-pretrained", "--input-size", 8, "-o", "m.safetensors")
    training = "--adjoint backprop --max-steps 1 --batch-size 4 --lr 1e-9 --device cpu -o run".split()
    found, said = answer("finetune", "m.safetensors", "--data", table, "--val-split", 0.3, *training)
    assert found["after"]["images"] == 6 and "6 of 20 images, of 2 classes, are held out" in said
    assert answer("eval", "run/best.safetensors", "--data", table)[0]["images"] == 6
    answer("finetune", "m.safetensors", "--data", table, *training, "--resume", "--max-steps", 2)
