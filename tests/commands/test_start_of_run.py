"""What a run begins with where the user says little: its batch, its length, and how its images were read before."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from resode_cli.commands.output import Output
from resode_cli.commands.start_of_run import for_few_images
from resode_cli.training.run_folder import load_state
from resode_cli.training.settings import Settings

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    ("images", "batch", "steps"),
    [(50_000, 128, 390), (2_560, 128, 200), (2_559, 64, 200), (240, 8, 200), (5, 8, 200), (40_000, 128, 312)],
)
def test_few_images_are_trained_on_for_long_enough(images: int, batch: int, steps: int) -> None:
    settings = for_few_images(Settings(), frozenset(), images, Output(json_mode=False))
    assert (settings.batch_size, settings.steps(images)) == (batch, steps)


@pytest.mark.parametrize("data", ["nosuchfolder", "no/such", "ciphar10", "torchvision:nothing"])
def test_data_that_are_none_are_named_before_a_source_is_converted(data: str, run: Run) -> None:
    said = run("finetune", "cifar:resnet20", "--no-pretrained", "--data", data, code=2).stderr
    assert "converted" not in said and "no pretrained weights" not in said
    assert repr(data.removeprefix("torchvision:")) in said and not Path("runs").exists()


def test_what_the_user_says_stays(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(json_mode=False)
    own = Settings(batch_size=100, epochs=1)
    assert for_few_images(own, frozenset(["batch_size", "epochs"]), 240, output) == own
    assert capsys.readouterr().err == ""
    found = for_few_images(Settings(max_steps=3, micro_batches=16), frozenset(["max_steps"]), 240, output)
    assert (found.batch_size, found.steps(240)) == (16, 3)
    assert "for 240 training images: --batch-size 16, unless" in capsys.readouterr().err
    assert for_few_images(Settings(accumulate=4), frozenset(), 10_240, output).batch_size == 128
    assert for_few_images(Settings(accumulate=4), frozenset(), 5_120, output).batch_size == 64


def test_a_resumed_run_reads_its_images_as_it_did(run: Run, model: str, make_folder: Callable[..., Path]) -> None:
    folder = make_folder(splits=("",), each=5, size=8)  # classes alone
    Path("names.csv").write_text("class,name\ncat,tabby\ndog,terrier\nowl,barn owl\n")
    reading = ("--val-split", 0.4, "--split-seed", 7, "--class-map", "names.csv", "--images", 7, "--skip-corrupt")
    run("finetune", model, "--data", folder, *reading, "--adjoint", "backprop", "--max-steps", 1, "--batch-size", 4)
    begun = load_state(Path("runs/m-1"), trust_source=True)
    assert begun.model.info.class_names == ("tabby", "terrier", "barn owl")
    run("finetune", "--resume", "--max-steps", 2)
    gone_on = load_state(Path("runs/m-1"), trust_source=True)
    assert gone_on.progress["step"] == 2
    assert gone_on.fingerprint == begun.fingerprint
    said = run("finetune", "--resume", "--max-steps", 3, "--images", 6, code=2).stderr
    assert "images was 7, is 6" in said


def test_a_class_map_is_known_without_its_file(run: Run, model: str, make_folder: Callable[..., Path]) -> None:
    folder = make_folder(splits=("",), each=5, size=8)  # classes alone
    names = Path("names.csv")
    names.write_text("class,name\ncat,tabby\ndog,terrier\nowl,barn owl\n")
    short = ("--adjoint", "backprop", "--batch-size", 4)
    run("finetune", model, "--data", folder, "--class-map", names, *short, "--max-steps", 1)
    names.unlink()
    run("finetune", "--resume", "--max-steps", 2)
    assert "images are left out" not in run("report", "--trust-source").stderr
    found = json.loads(run("eval", "--split", "val", "--json").stdout)
    assert found["images"] == 3
    run("tie", "runs/m-1/best.safetensors", "-o", "tied.safetensors")
    assert json.loads(run("eval", "tied.safetensors", "--json").stdout)["images"] == 3
    # Training goes on by the same names, unless a new head is for the data's own.
    run("finetune", "runs/m-1/best.safetensors", "--data", folder, *short, "--max-steps", 1, "-o", "on")
    assert load_state(Path("on"), trust_source=True).model.info.class_names == ("tabby", "terrier", "barn owl")
    run("finetune", "on/best.safetensors", "--new-head", "--data", folder, *short, "--max-steps", 1, "-o", "anew")
    assert load_state(Path("anew"), trust_source=True).model.info.class_names == ("cat", "dog", "owl")
    run("eval", "anew/best.safetensors")


def test_a_head_that_cannot_be_replaced_is_named(run: Run, make_folder: Callable[..., Path]) -> None:
    folder = make_folder(size=8)
    small = Path("net.py").read_text().replace("num_classes=10", "classes=10").replace("=num_classes", "=classes")
    Path("own.py").write_text(small)
    said = run("finetune", "own.py:small", "--no-pretrained", "--data", folder, "--input-size", 8, code=2).stderr
    assert "the head of own.py:small cannot be replaced by one for 3 classes: own.py:small takes no argument" in said
    assert "--num-classes" not in said  # which finetune does not have
    assert not Path("runs").exists() and not Path("resode.toml").exists()


def test_one_class_alone_is_no_data_to_train_on(run: Run, model: str, make_folder: Callable[..., Path]) -> None:
    folder = make_folder(splits=("",), size=8, classes=("cat",))
    said = run("finetune", model, "--data", folder, code=2).stderr
    assert "has one class alone, cat, so that there is nothing to tell apart" in said
    assert not Path("runs").exists() and "run =" not in Path("resode.toml").read_text()


def test_data_that_are_not_found_from_another_folder_are_asked_for(
    run: Run, model: str, make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder("photos", size=8)
    run("finetune", model, "--data", "photos", "--adjoint", "backprop", "--max-steps", 1, "--batch-size", 4)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    resume = ("finetune", "--resume", "../runs/m-1", "--max-steps", 2, "--source", "../net.py:small")
    assert "add --data" in run(*resume, code=2).stderr
    run(*resume, "--data", "../photos")
