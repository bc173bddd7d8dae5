"""`eval --split all`: every labelled split that data have, or that is held out of them, and each by itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from resode_cli.data import HoldOut, labelled_splits
from resode_cli.errors import UsageError
from resode_cli.files import model_file
from resode_cli.network.model import OdeResNet

Run = Callable[..., tuple[dict, str]]
MODEL = "m.safetensors"


@pytest.fixture
def run(pico: OdeResNet, answer: Run) -> Run:
    """Commands beside a model of ten classes without names."""
    model_file.save(pico, Path(MODEL))
    return answer


def test_each_split_is_measured_as_if_it_had_been_asked_for_alone(run: Run):
    asked = ("eval", MODEL, "--data", "digits", "--images", 40, "--val-split", 0.1)
    found, said = run(*asked, "--split", "all")
    assert list(found["splits"]) == ["train", "val", "test"]
    for split, own in found["splits"].items():
        assert {**own, "split": split} == run(*asked, "--split", split)[0]
        assert any(line.split()[:2] == [split, "40"] for line in said.splitlines())
    assert len({own["loss"] for own in found["splits"].values()}) == 3
    assert list(run("eval", MODEL, "--data", "digits", "--images", 9, "--split", "ALL")[0]["splits"]) == [
        "train",
        "test",
    ]
    _, said = run(*asked, "--split", "every", code=2)
    assert "unknown split 'every' (allowed: test, val, train, all)" in said


def test_what_a_model_was_not_trained_on_is_a_split_of_it(make_folder: Callable[..., Path], run: Run):
    folder = make_folder(classes=list("abcdefghij"), splits=("train",), each=5, size=8) / "train"
    training = ("--adjoint", "checkpoint", "--max-steps", 1, "--batch-size", 4, "--no-augment")
    run("finetune", MODEL, "--data", folder, "-o", "run", "--val-split", 0.4, *training)
    found, said = run("eval", "run/best.safetensors", "--data", folder, "--split", "all")
    assert {split: own["images"] for split, own in found["splits"].items()} == {"train": 30, "val": 20}
    assert said.count("are held out of training as val") == 1


def test_splits_are_those_with_labels(make_folder: Callable[..., Path], tmp_path: Path):
    folder = make_folder(splits=("train", "valid", "test"))
    assert labelled_splits(str(folder)) == ("train", "val", "test")
    for i, image in enumerate(sorted((folder / "test").rglob("*.png"))):
        image.rename(folder / "test" / f"{i}.png")
    for name in ("cat", "dog", "owl"):
        (folder / "test" / name).rmdir()
    assert labelled_splits(str(folder)) == ("train", "val")
    shutil.rmtree(folder / "valid")
    assert labelled_splits(str(folder)) == ("train",)
    assert labelled_splits(str(folder), HoldOut(0.5)) == ("train", "val")
    table = tmp_path / "t.csv"
    for split in ("train", "test"):
        table.write_text(f"path,label,split\npictures/train/cat/0.png,cat,{split}\n")
        assert labelled_splits(str(table)) == (split,)
    table.write_text("path,label\npictures/train/cat/0.png,cat\n")
    assert labelled_splits(str(table)) == ("train", "val")
    rows = "pictures/train/cat/0.png,cat,train\npictures/train/dog/0.png,dog,train\npictures/train/owl/0.png,,test\n"
    table.write_text(f"path,label,split\n{rows}")
    assert labelled_splits(str(table)) == ("train",)
    assert labelled_splits(str(table), HoldOut(0.5)) == ("train", "val")
    assert labelled_splits("digits", HoldOut(0.1)) == ("train", "val", "test")
    with pytest.raises(UsageError, match="--split-seed 1"):
        labelled_splits("digits", HoldOut(seed=1))


def test_data_without_any_labelled_split_say_what_they_lack(tmp_path: Path, run: Run):
    (tmp_path / "empty").mkdir()
    assert "holds no images" in run("eval", MODEL, "--data", "empty", "--split", "all", code=1)[1]
