"""What the commands make of data as people have it: whose classes, which split, what was left out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import resode_cli
from resode_cli.files import model_file
from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import PreprocessingChoice
from resode_cli.sources.registry import open_source
from resode_cli.surgery.convert import convert

Make = Callable[..., Path]
NUMBERS = [str(k) for k in range(12)]
TRAINING = ["--adjoint", "checkpoint", "--max-steps", "2", "--batch-size", "4", "--no-augment", "--lr", "1e-9"]


def network(classes: int) -> OdeResNet:
    preprocessing = PreprocessingChoice(size=8, crop_fraction=1.0)
    source = open_source("cifar:resnet20", pretrained=False, num_classes=classes, preprocessing=preprocessing)
    return convert(source)[0]


@pytest.fixture
def run(answer: Callable[..., tuple[dict, str]]) -> Callable[..., tuple[dict, str]]:
    return answer


@pytest.fixture
def numbered(make_folder: Make, tmp_path: Path) -> Path:
    """Images of class 10 alone to measure on, and a model that knows that class first and answers with it always."""
    folder = make_folder(classes=NUMBERS, each=1, size=8)
    for name in NUMBERS:
        if name != "10":
            (folder / "test" / name / "0.png").unlink()
    model = network(12)
    with torch.no_grad():
        model.net.linear.weight.zero_()
        model.net.linear.bias.zero_()
        model.net.linear.bias[0] = 1
    names = ["10", *(name for name in NUMBERS if name != "10")]
    named = model.with_info(model.info.with_classes(names))
    model_file.save(named, tmp_path / "named.safetensors")
    return folder


@pytest.mark.parametrize(
    "command, figure",
    [
        (["eval"], ["top1"]),
        (["untie", "-o", "x.safetensors"], ["before", "top1"]),
        (["deepen", "--blocks", "4", "--fit-steps", "1", "-o", "x.safetensors"], ["before", "top1"]),
        (["recalibrate", "--images", "12", "-o", "x.safetensors"], ["after", "top1"]),
        (["finetune", "-o", "run", *TRAINING], ["before", "top1"]),
    ],
    ids=lambda value: value[0],
)
def test_labels_are_the_models_classes(command: list[str], figure: list[str], numbered: Path, run):
    found, said = run(command[0], "named.safetensors", "--data", numbered, *command[1:])
    for key in figure:
        found = found[key]
    assert found == 1.0
    assert "test has no images of 0, 1, 2, 3, 4 and 6 more: they are not measured here" in said
    if command[0] == "finetune":
        assert model_file.load(Path("run/best.safetensors")).info.class_names[0] == "10"


def test_no_command_opens_labelled_data_in_another_way():
    commands = Path(resode_cli.__file__).parent / "commands"
    found = {
        p.name
        for p in commands.glob("*.py")
        if {"open_data", "check_classes"} & set(p.read_text().replace("(", " ").split())
    }
    # Without labels, the digits, and what gets a head for its classes.
    assert found <= {"fitting.py", "demo.py", "options.py"}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A model without class names."""
    model_file.save(network(3), tmp_path / "m.safetensors")
    return tmp_path


def test_val_chooses_the_best_and_test_is_measured_at_the_end(plain: Path, make_folder: Make, run):
    folder = make_folder(splits=("train", "valid"), each=2, size=8)
    make_folder(splits=("test",), each=3, size=8)
    found, said = run("finetune", "m.safetensors", "--data", folder, "-o", "run", *TRAINING)
    assert (found["before"]["images"], found["after"]["images"], found["test"]["images"]) == (6, 6, 9)
    assert "val chooses the best model; test is looked at once, at the end" in said
    assert "best model on test: top-1" in said
    for split, images in (("test", 9), ("val", 6), ("train", 6)):
        again, _ = run("eval", "run/best.safetensors", "--data", folder, "--split", split)
        assert again["images"] == images and again["split"] == split
        if split == "test":
            assert {**again, "split": None} == {**found["test"], "split": None}


def test_a_resumed_run_keeps_its_classes(plain: Path, make_folder: Make, run):
    folder = make_folder(each=2, size=8)
    run("finetune", "m.safetensors", "--data", folder, "-o", "run", *TRAINING)
    for split in ("train", "test"):
        (folder / split / "dog").rename(folder / split / "hound")
    _, said = run("finetune", "m.safetensors", "--data", folder, "-o", "run", "--resume", "--max-steps", 4, code=1)
    assert "other classes apart" in said and "only the data: hound; only the model: dog" in said


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_of_one_held_out_split_nothing_is_left_for_the_end(held_out: str, plain: Path, make_folder: Make, run):
    folder = make_folder(splits=("train", held_out), each=1, size=8)
    found, said = run("finetune", "m.safetensors", "--data", folder, "-o", "run", *TRAINING)
    assert found["after"]["images"] == 3 and "test" not in found and "at the end" not in said
    assert ("has no test split: measured on" in said) == (held_out == "val")


@pytest.mark.parametrize(
    "command",
    [
        ["eval"],
        ["check-grad", "--adjoint", "pc"],
        ["untie", "-o", "x.safetensors"],
        ["recalibrate", "-o", "x.safetensors"],
        ["finetune", "-o", "run", *TRAINING],
        ["finetune", "-o", "run", "--workers", "1", *TRAINING],
    ],
    ids=lambda command: " ".join(command[:1] + command[3:5]),
)
def test_what_was_skipped_is_said_once(command: list[str], plain: Path, make_folder: Make, run):
    folder = make_folder(each=4, size=8, splits=("train", "val", "test"))
    for split in ("train", "val", "test"):
        (folder / split / "dog" / "1.png").write_bytes(b"no image")
    arguments = (command[0], "m.safetensors", "--data", folder, *command[1:])
    _, said = run(*arguments, code=1)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "dog/1.png: not a readable image" in errors[0] and "Traceback" not in said
    shutil.rmtree("run", ignore_errors=True)
    _, said = run(*arguments, "--skip-corrupt")
    splits = {"eval": ["test"], "check-grad": ["test"], "untie": ["test"], "recalibrate": ["train", "test"]}
    for split in ("train", "val", "test"):
        expected = split in splits.get(command[0], ["train", "val", "test"])
        note = f"skipped 1 corrupt file of {folder}, {split}: {folder / split / 'dog' / '1.png'}"
        assert said.count(note) == expected, said


def test_a_fit_says_what_it_left_out(plain: Path, make_folder: Make, run):
    folder = make_folder("loose", each=12, size=8, splits=("train",))
    (folder / "train" / "dog" / "3.png").write_bytes(b"no image")
    (folder / "train" / "dog" / "notes.txt").write_text("no image")
    arguments = (
        "deepen m.safetensors --blocks 4 -o x.safetensors --fit-phases logits --fit-steps 2 --no-gradients".split()
    )
    _, said = run(*arguments, "--fit", folder, "--skip-corrupt")
    assert "train: 1 .txt" in said
    assert said.count("skipped 1 corrupt file") == 1 and "dog/3.png" in said
