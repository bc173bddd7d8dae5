"""Data sets of Hugging Face's library, saved to a folder. Without the library: what is said of that."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from resode_cli.data import HoldOut, batches, held_out_splits, open_data
from resode_cli.errors import ResodeError, UsageError
from resode_cli.network.parts import Preprocessing

PLAIN = Preprocessing(size=8, crop_fraction=1.0)
Save = Callable[..., str]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Save splits of so many images of cats and dogs; the name by which they are data."""
    datasets = pytest.importorskip("datasets", reason="the extra `hf` is not installed")

    def dataset(count: int, names: Sequence[str], labelled: bool = True) -> Any:
        kinds = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=list(names))})
        labels = [i % len(names) if labelled else -1 for i in range(count)]
        images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(count)]
        return datasets.Dataset.from_dict({"img": images, "fine": labels}, features=kinds)

    def make(
        splits: dict[str, int] | int, *, names: Sequence[str] = ("dog", "cat"), without: Sequence[str] = ()
    ) -> str:
        if isinstance(splits, int):
            saved = dataset(splits, names)
        else:
            saved = datasets.DatasetDict({k: dataset(n, names, k not in without) for k, n in splits.items()})
        saved.save_to_disk(tmp_path / "saved")
        return f"hf:{tmp_path / 'saved'}"

    return make


def sizes(name: str, **arguments) -> list[int]:
    return [len(open_data(name, PLAIN, split, **arguments)) for split in ("train", "val", "test")]


def test_splits_and_columns_are_found(save: Save):
    name = save({"train": 20, "validation": 6, "test": 4, "unsupervised": 2})
    assert sizes(name) == [20, 6, 4] and held_out_splits(name) == ("val", "test")
    data = open_data(name, PLAIN, "train")
    assert data.class_names == ("dog", "cat") and data.image_labels() == [0, 1] * 10
    assert [int(k) for batch in batches(data, 8) for k in batch.labels] == [0, 1] * 10
    assert any("unsupervised are left alone" in note for note in data.notes)
    turned = open_data(name, PLAIN, "test", class_names=["cat", "dog"])
    assert [turned[i][1] for i in range(4)] == [1, 0, 1, 0]
    with pytest.raises(UsageError, match="--val-split 0.2: .* has a val split of its own"):
        open_data(name, PLAIN, "train", val_split=0.2)


@pytest.mark.parametrize("splits", [20, {"train": 20}, {"full": 20}])
def test_a_single_split_is_divided(splits: Any, save: Save):
    name = save(splits)
    assert sizes(name) == [16, 4, 4] and held_out_splits(name) == ("test",)
    val = open_data(name, PLAIN, "val")
    assert Counter(val.image_labels()) == {0: 2, 1: 2}
    assert Counter(int(k) for batch in batches(val, 8) for k in batch.labels) == {0: 2, 1: 2}
    assert val.division is not None and val.division.of == "all"
    unlabelled = open_data(name, PLAIN, "val", labelled=False)
    assert [unlabelled[i][1] for i in range(4)] == [0] * 4 and unlabelled.samples.places == val.samples.places


def test_of_train_beside_test_a_share_is_held_out_where_it_is_asked_for(save: Save):
    name = save({"train": 20, "test": 4})
    with pytest.raises(ResodeError, match="has no val split, only test and train; --val-split 0.2 holds"):
        open_data(name, PLAIN, "val")
    assert sizes(name, val_split=0.25) == [14, 6, 4]
    assert held_out_splits(name) == ("test",) and held_out_splits(name, HoldOut(0.25)) == ("val", "test")


def test_a_test_split_without_labels_leaves_the_measuring_to_val(save: Save):
    name = save({"train": 8, "val": 6, "test": 4}, without=["test"])
    data = open_data(name, PLAIN, "test")
    assert (len(data), data.split) == (6, "val") and held_out_splits(name) == ("test",)
    assert any("has no labels of its test split" in note for note in data.notes)


def test_columns_that_are_not_there_are_named(tmp_path: Path):
    datasets = pytest.importorskip("datasets", reason="the extra `hf` is not installed")
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(tmp_path / "text")
    with pytest.raises(ResodeError, match=r"has 0 columns of images, .*; its columns are text \(Value\), label"):
        open_data(f"hf:{tmp_path / 'text'}", PLAIN, "train")
    images = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [Image.new("RGB", (8, 8))], "label": [0]}
    datasets.Dataset.from_dict(rows, features=images).save_to_disk(tmp_path / "plain")
    with pytest.raises(ResodeError, match="has 0 columns of type ClassLabel, and one is needed"):
        open_data(f"hf:{tmp_path / 'plain'}", PLAIN, "train")


def test_what_is_not_there_is_one_line(tmp_path: Path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra `hf` is not installed")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ResodeError, match="empty is no data set that save_to_disk wrote"):
        open_data(f"hf:{tmp_path / 'empty'}", PLAIN, "train")

    def fail(*name: str) -> None:
        assert name == ("somebody/things", "small")
        raise ConnectionError("Couldn't reach the Hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        ResodeError, match=r"cannot be fetched \(Couldn't reach the Hub\); connect to the network"
    ) as error:
        open_data("hf:somebody/things:small", PLAIN, "train")
    assert "\n" not in str(error.value)


def test_without_the_library_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for ask in (lambda: open_data("hf:mnist", PLAIN, "train"), lambda: held_out_splits("hf:mnist")):
        with pytest.raises(
            ResodeError, match=r"data hf:mnist need the library datasets, an extra: pip install '.\[hf\]'"
        ):
            ask()
