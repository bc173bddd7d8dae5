"""Data without a split to choose a model on: which images are held out, and that every command finds the same."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resode_cli.data import HoldOut, held_out_splits, open_data
from resode_cli.data.holding_out import Division, known_division
from resode_cli.errors import ResodeError, UsageError
from resode_cli.files import model_file
from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import Preprocessing

PLAIN = Preprocessing(size=8, crop_fraction=1.0)
Make = Callable[..., Path]
TRAINING = "--adjoint backprop --max-steps 1 --batch-size 4 --no-augment --lr 1e-9 --device cpu".split()


@pytest.fixture
def photos(make_folder: Make) -> Path:
    """cat, dog and owl with ten images each, and no splits."""
    folder = make_folder(splits=("all",), each=10, size=8)
    return (folder / "all").rename(folder.parent / "photos")


def files(folder: Path, split: str, **arguments) -> list[str]:
    samples = open_data(str(folder), PLAIN, split, **arguments).samples
    return [os.path.relpath(file, folder).replace(os.sep, "/") for file, _ in samples.samples]


# which images


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 99), st.integers(1, 99), st.integers(0, 3))
def test_of_each_class_a_share_is_held_out_and_a_smaller_share_is_part_of_a_larger(labels, one, other, seed):
    keys = [f"{label}/{i}.png" for i, label in enumerate(labels)]
    small, large = (Division(percent / 100, seed, "all").held_out(keys, labels) for percent in sorted((one, other)))
    assert all(b for a, b in zip(small, large, strict=True) if a)
    for label in set(labels):
        count = labels.count(label)
        held = sum(out for out, own in zip(large, labels, strict=True) if own == label)
        assert held == min(math.ceil(Fraction(max(one, other), 100) * count), count - 1)


def test_images_that_are_added_move_few():
    keys = [f"cat/{i}.png" for i in range(200)]
    before = Division(0.2, 0, "all").held_out(keys[:190], [0] * 190)
    after = Division(0.2, 0, "all").held_out(keys, [0] * 200)
    assert sum(a != b for a, b in zip(before, after[:190], strict=True)) <= 10


def test_accents_and_the_place_of_the_folder_say_nothing(photos: Path, tmp_path: Path):
    one, other = (Division(0.5, 0, "all").rank(name) for name in ("chèvre/1.png", "che\u0300vre/1.png"))
    assert one == other
    before = files(photos, "val")
    assert files(photos.rename(tmp_path / "elsewhere"), "val") == before


def test_a_folder_of_classes_is_divided(photos: Path):
    train, val = files(photos, "train"), files(photos, "val")
    assert len(train) == 24 and len(val) == 6 and not set(train) & set(val)
    assert files(photos, "test") == val  # there is no other
    assert held_out_splits(str(photos)) == ("test",)
    data = open_data(str(photos), PLAIN, "val")
    assert any("6 of 30 images, of 3 classes, are held out of training as val (--val" in n for n in data.notes)
    assert sorted({label for _, label in data.samples.samples}) == [0, 1, 2]
    assert files(photos, "val", split_seed=1) != val
    assert len(files(photos, "val", val_split=0.5)) == 15
    assert set(val) < set(files(photos, "val", val_split=0.5))


def test_images_without_labels_leave_out_the_same(photos: Path):
    shutil.copy(photos / "cat" / "0.png", photos / "loose.png")
    assert sorted(files(photos, "train", labelled=False)) == sorted(["loose.png", *files(photos, "train")])


def test_a_single_image_trains(photos: Path):
    for i in range(1, 10):
        (photos / "dog" / f"{i}.png").unlink()
    data = open_data(str(photos), PLAIN, "val")
    assert "dog" not in {file.split("/")[0] for file in files(photos, "val")} and "dog/0.png" in files(photos, "train")
    assert any("one image alone of dog: it trains" in note for note in data.notes)
    assert any("has no images of dog: it is not measured here" in note for note in data.notes)
    for name in ("cat", "owl"):
        for i in range(1, 10):
            (photos / name / f"{i}.png").unlink()
    with pytest.raises(ResodeError, match="one image alone of every class: nothing can be held out as val"):
        open_data(str(photos), PLAIN, "val")


# folders with splits


def test_a_share_of_train_is_held_out_where_it_is_asked_for(make_folder: Make):
    folder = make_folder(each=10, size=8)
    assert len(files(folder, "train")) == 30 and held_out_splits(str(folder)) == ("test",)
    assert held_out_splits(str(folder), HoldOut(0.2)) == ("val", "test")
    parts = [files(folder, split, val_split=0.2) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [24, 6, 30]
    assert all(name.startswith("train/") for name in (*parts[0], *parts[1])) and not set(parts[0]) & set(parts[1])
    shutil.rmtree(folder / "test")
    assert held_out_splits(str(folder), HoldOut(0.2)) == ("test",)
    assert files(folder, "test", val_split=0.2) == parts[1]


@pytest.mark.parametrize("arguments", [{"val_split": 0.2}, {"split_seed": 1}])
def test_a_val_split_of_its_own_and_a_seed_of_nothing_are_refused(arguments: dict, make_folder: Make):
    folder = make_folder(splits=("train", "valid"), each=1)
    flag = "--" + next(iter(arguments)).replace("_", "-")
    with pytest.raises(UsageError, match=flag):
        open_data(str(folder), PLAIN, "train", **arguments)
    if "split_seed" in arguments:
        with pytest.raises(UsageError, match="--split-seed 1: of these data nothing is held out; add --val-split"):
            open_data(str(make_folder("others", each=1)), PLAIN, "train", **arguments)


def test_a_data_set_with_a_name_is_divided_where_that_is_asked_for():
    assert held_out_splits("digits") == ("test",) and held_out_splits("digits", HoldOut(0.1)) == ("val", "test")
    train, val, test = (open_data("digits", PLAIN, split, val_split=0.1) for split in ("train", "val", "test"))
    assert len(train) + len(val) == 1437 and 144 <= len(val) <= 153 and len(test) == 360
    assert not set(train.samples.places) & set(val.samples.places)
    with pytest.raises(UsageError, match="flowers102 has a val split of its own"):
        open_data("flowers102", PLAIN, "train", val_split=0.1)


def test_folders_that_are_no_classes_are_named(photos: Path):
    (photos / "notes").mkdir()
    assert any("folders without images, notes: remove" in note for note in open_data(str(photos), PLAIN, "val").notes)


# splits or classes


@pytest.mark.parametrize("name", ["test", "train", "dev"])
def test_a_class_may_be_called_like_a_split(name: str, photos: Path):
    (photos / "owl").rename(photos / name)
    data = open_data(str(photos), PLAIN, "train")
    assert set(data.class_names) == {"cat", "dog", name}
    assert any(f"{name} is a class, not splits, since images lie there beside" in note for note in data.notes)


def test_a_train_split_beside_other_folders_is_the_train_split(make_folder: Make):
    folder = make_folder(each=2)
    (folder / "notes").mkdir()
    assert len(files(folder, "train")) == 6 and files(folder, "train")[0].startswith("train/")


def test_classes_beside_a_test_split_want_a_train_folder(photos: Path):
    shutil.copytree(photos / "cat", photos / "test" / "cat")
    with pytest.raises(ResodeError, match="has no folder train or .*, but cat, dog, owl; .* move them into photos"):
        open_data(str(photos), PLAIN, "train")
    assert len(files(photos, "test")) == 10


def test_a_folder_under_one_called_dev_is_divided(photos: Path):
    folder = photos.parent / "dev"
    folder.mkdir()
    assert len(files(photos.rename(folder / "photos"), "train")) == 24


@pytest.mark.parametrize("place, hint", [("photos/cat", "photos"), ("", "photos")])
def test_the_folder_below_and_the_one_above_are_named(place: str, hint: str, photos: Path):
    with pytest.raises(ResodeError, match=rf"did you mean \S*/{hint}\?"):
        open_data(str(photos.parent / place), PLAIN, "train")


# commands


@pytest.fixture
def run(answer: Callable[..., tuple[dict, str]]) -> Callable[..., tuple[dict, str]]:
    """A command beside a model m.safetensors of three classes."""
    Path("net.py").write_text(
        "from resode_cli.sources.cifar import CifarResNet\n"
        "def make(num_classes=3):\n    return CifarResNet(1, num_classes=num_classes, widths=(2, 4, 4))\n"
    )
    answer("convert", "net.py:make", "--no-pretrained", "--input-size", "8", "-o", "m.safetensors")
    return answer


def test_a_model_is_measured_on_what_was_held_out_when_it_was_trained(photos: Path, run):
    found, _ = run("finetune", "m.safetensors", "--data", photos, "-o", "run", *TRAINING, "--val-split", 0.3)
    history = model_file.read_metadata(Path("run/best.safetensors"))["history"]
    assert known_division(history) is not None
    assert {"val_split": 0.3, "split_seed": 0, "divided": "all"}.items() <= history[-1].items()
    again, said = run("eval", "run/best.safetensors", "--data", photos)
    assert again["images"] == found["after"]["images"] == 9 and again["loss"] == pytest.approx(found["after"]["loss"])
    assert "9 of 30 images" in said and "as the model was trained" in said
    for spelled in ("valid", "validation", "dev", "val"):
        assert run("eval", "run/best.safetensors", "--data", photos, "--split", spelled)[0]["split"] == "val"
    assert run("eval", "run/best.safetensors", "--data", photos, "--val-split", 0.5)[0]["images"] == 15
    assert run("eval", "m.safetensors", "--data", photos)[0]["images"] == 6
    assert run("eval", "run/best.safetensors", "--data", photos, "--split", "train")[0]["images"] == 21
    _, said = run(
        *("deepen", "run/best.safetensors", "--blocks", 2, "--fit", photos, "--fit-phases", "logits"),
        *("--fit-steps", 1, "--no-gradients", "-o", "x.safetensors"),
    )
    assert "21 images of" in said


def test_a_run_that_goes_on_keeps_what_is_held_out(photos: Path, run):
    start = ["finetune", "m.safetensors", "--data", photos, "-o", "run", *TRAINING]
    run(*start, "--val-split", 0.3, "--split-seed", 5, "--seed", 1)
    more = ["--resume", "--max-steps", 2]
    for flag, value, was in (("--val-split", 0.2, "0.3"), ("--split-seed", 0, "5")):
        _, said = run(*start, *more, flag, value, code=2)
        assert f"{flag} {value}: the run has {was}, and keeps it" in said
    found, said = run(*start, *more)
    assert found["after"]["images"] == 9 and "--val-split 0.3, --split-seed 5" in said
    assert "takes its place" not in said


def test_val_chooses_and_test_is_looked_at_once_where_val_is_held_out_of_train(make_folder: Make, run):
    folder = make_folder(each=4, size=8)
    found, said = run("finetune", "m.safetensors", "--data", folder, "-o", "run", *TRAINING, "--val-split", 0.25)
    assert (found["after"]["images"], found["test"]["images"]) == (3, 12)
    assert "val chooses the best model; test is looked at once" in said
    for split, images in (("train", 9), ("val", 3), ("test", 12)):
        assert run("eval", "run/last.safetensors", "--data", folder, "--split", split)[0]["images"] == images


@pytest.mark.parametrize(
    "arguments",
    [
        ["untie", "m.safetensors", "-o", "x.safetensors", "--val-split", "0.2"],
        ["check-grad", "m.safetensors", "--split-seed", "1"],
    ],
)
def test_a_share_of_no_data_is_refused(arguments: list[str], run):
    _, said = run(*arguments, code=2)
    assert "says something of --data; add --data" in said


@pytest.mark.parametrize("share", ["0", "1", "nan", "-0.5"])
def test_a_share_is_above_zero_and_below_one(share: str, photos: Path, run):
    _, said = run("eval", "m.safetensors", "--data", photos, "--val-split", share, code=2)
    assert "must be above 0 and below 1" in said


def test_the_seed_of_training_moves_nothing(photos: Path, run):
    starts = [
        run("finetune", "m.safetensors", "--data", photos, "-o", f"run{seed}", *TRAINING, "--seed", seed)[0]["before"]
        for seed in (0, 1)
    ]
    assert starts[0] == starts[1]


def test_a_history_that_is_no_record_is_passed_over(tiny: OdeResNet):
    for wrong in ({}, {"val_split": 2.0, "split_seed": 0, "divided": "all"}, {"val_split": "x", "split_seed": 0}):
        assert known_division([{"command": "finetune", **wrong}]) is None
