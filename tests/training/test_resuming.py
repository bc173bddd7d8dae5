"""What may change under a resumed run, what must not, and what is known again however it is spelled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import TRAIN, contents, run

from resode_cli.app import main
from resode_cli.files import model_file
from resode_cli.files.model_file import read_tensors, write_tensors
from resode_cli.training.run_folder import load_state

CHANGED = {
    "--adjoint": ["--adjoint", "checkpoint"],
    "--stage": ["--stage", "layer1"],
    "--optimizer": ["--optimizer", "adamw"],
    "--seed": ["--seed", "7"],
    "--bn": ["--bn", "batch"],
    "--amp": ["--amp", "bf16"],
    "--augment": ["--no-augment"],
    "--batch-size": ["--batch-size", "4"],
    "--class-weights": ["--class-weights", "balanced"],
    "--sampler": ["--sampler", "balanced"],
    "--teacher": ["--teacher", "other.safetensors"],
}


@pytest.mark.parametrize("flag", CHANGED)
def test_what_would_make_another_run_is_refused_by_name(flag: str, here: Path, capsys: Any) -> None:
    before = contents(here / "run")
    assert main(run("-o", "run", "--resume", *CHANGED[flag], steps=5)) == 2
    assert f"error: {flag} " in capsys.readouterr().err
    assert contents(here / "run") == before


def test_what_may_change_is_said(here: Path, capsys: Any) -> None:
    assert main(run("-o", "run", "--resume", "--lr", "0.5", "--log-every", "1", "--workers", "auto", steps=4)) == 0
    error = capsys.readouterr().err
    assert "--lr is 0.5 from here on; it was 0.001" in error and "--max-steps is 4 from here on; it was 3" in error
    assert "--workers" not in error, "it is what it was"
    assert load_state(here / "run").progress["step"] == 4


def test_a_run_from_before_workers_were_auto_goes_on_with_its_number(here: Path, capsys: Any) -> None:
    path = here / "run" / "state.safetensors"
    tensors, metadata = read_tensors(path)
    assert metadata["run"]["settings"]["workers"] == "auto"
    metadata["run"]["settings"]["workers"] = 0
    write_tensors(path, tensors, metadata)
    assert main(run("-o", "run", "--resume", "--workers", "0", steps=4)) == 0
    assert "--workers" not in capsys.readouterr().err
    assert load_state(here / "run").settings["workers"] == 0
    assert main(run("-o", "run", "--resume", "--workers", "1", steps=5)) == 0
    assert "--workers is 1 from here on; it was 0" in capsys.readouterr().err


def test_a_run_from_before_the_papers_heun_was_renamed_goes_on(here: Path, assert_ran_by: Any) -> None:
    """Its state, settings and stored adjoints say 'heun' of the rule that is called 'heunnet' now."""
    # Of layer1's one step the reversal is off by more than a run allows, and exact anchors would take its place.
    alike = ("--adjoint", "heunnet", "--schedule", "constant", "--on-drift", "warn")
    for name in ("straight", "old"):
        assert main(run("-o", name, *alike, steps=4 if name == "straight" else 2)) == 0
    path = here / "old" / "state.safetensors"
    tensors, metadata = read_tensors(path)
    as_then = json.loads(json.dumps(metadata).replace('"heunnet"', '"heun"'))
    assert as_then != metadata
    write_tensors(path, tensors, {**as_then, "format": 3})
    assert main(run("-o", "old", "--resume", *alike, steps=4)) == 0
    old, straight = (load_file(here / name / "last.safetensors") for name in ("old", "straight"))
    assert all(torch.equal(old[key], value) for key, value in straight.items())
    for name in ("straight", "old"):
        assert_ran_by(here / name, "heunnet")


def test_a_run_that_is_past_its_end_is_refused(here: Path, capsys: Any) -> None:
    assert main(run("-o", "run", "--resume", steps=2)) == 2
    assert "the run is at step 3 already, past the 2" in capsys.readouterr().err


def test_another_model_is_refused_and_its_own_or_none_is_not(here: Path, capsys: Any) -> None:
    assert main(run("-o", "run", "--resume", model="other.safetensors", steps=4)) == 2
    assert "other.safetensors is not the model that the run in run began with" in capsys.readouterr().err
    assert main(run("-o", "run", "--resume", model="run/last.safetensors", steps=4)) == 0
    Path("m.safetensors").unlink()
    assert main(run("-o", "run", "--resume", steps=5)) == 0
    assert "m.safetensors is not there any more" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["name", "size", "test"])
def test_other_images_of_equal_number_are_refused(change: str, here: Path, make_folder: Any, capsys: Any) -> None:
    folder = make_folder(classes=[f"c{i}" for i in range(10)], each=3, size=8)
    data = ["--data", str(folder)]
    assert main(run("-o", "new", *data, steps=1)) == 0
    image = next((folder / ("test" if change == "test" else "train") / "c1").iterdir())
    if change == "size":
        image.write_bytes(image.read_bytes() + b"\0")
    else:
        image.rename(image.with_name("9.png"))
    assert main(run("-o", "new", *data, "--resume", steps=2)) == 2
    assert "images are others than when the run began" in capsys.readouterr().err


def test_half_a_row_of_a_log_stops_nothing(here: Path) -> None:
    log = here / "run" / "log.csv"
    log.write_text(log.read_text() + "train,3,1,0.")
    assert main(run("-o", "run", "--resume", steps=4)) == 0
    assert "train,3,1,0.\n" not in log.read_text()


def test_a_last_model_that_is_missing_is_written_from_the_state(here: Path) -> None:
    """A run may be killed between the two, at its last step too."""
    last = here / "run" / "last.safetensors"
    before = model_file.load(last, trust_source=True).state_dict()
    last.unlink()
    assert main(run("-o", "run", "--resume")) == 0
    after = model_file.load(last, trust_source=True).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--grad-tol", "1e-5"], "--grad-tol 1e-05: the run has 0.02, and keeps it"),
        (["--memory-budget", "1MiB"], "--memory-budget 1MiB: the run has unset, and keeps it"),
        (["--distill", "0.9"], "--distill is a setting of the teacher"),
    ],
)
def test_what_would_have_no_effect_on_a_resumed_run_is_refused(flags, message, here: Path, capsys) -> None:
    assert main(run("-o", "run", "--resume", *flags)) == 2
    assert message in capsys.readouterr().err


# The same model, data, teacher and stages, spelled otherwise, are the same; others are refused.

FIXED = [flag for flag in TRAIN if flag not in ("--images", "24")]


def on(data: str, *more: str, steps: int = 2) -> list[str]:
    return ["finetune", "m.safetensors", "--trust-source", "--data", data, *FIXED, "--max-steps", str(steps), *more]


@pytest.fixture
def begun(here: Path, make_folder: Any) -> Path:
    """A run on a folder of images, with a teacher, of one stage that is named by its place."""
    make_folder(classes=tuple("abcdefghij"), each=2, size=8)
    begin = ["-o", "own", "--stage", "2", "--teacher", "other.safetensors"]
    assert main(on("pictures", *begin)) == 0
    return here


@pytest.mark.parametrize("spelled", ["./pictures", "pictures/", "../{here}/pictures", "{root}/pictures", "moved"])
def test_data_is_known_again_however_it_is_spelled(spelled: str, begun: Path) -> None:
    data = spelled.format(here=begun.name, root=begun)
    if data == "moved":
        Path("pictures").rename(data)
    assert (
        main(on(data, "-o", "own", "--resume", "--stage", "layer2", "--teacher", "./other.safetensors", steps=3)) == 0
    )
    assert load_state(begun / "own", trust_source=True).progress["step"] == 3


def test_classes_that_changed_places_are_other_data(begun: Path, capsys: Any) -> None:
    """Names and sizes are the same: what is in the files is not."""
    train = Path("pictures/train")
    for name, other in (("a", "tmp"), ("b", "a"), ("tmp", "b")):
        (train / name).rename(train / other)
    size = max(file.stat().st_size for file in train.rglob("*.png"))
    for file in train.rglob("*.png"):
        file.write_bytes(file.read_bytes().ljust(size, b"\0"))
    assert main(on("pictures", "-o", "own", "--resume", steps=3)) == 2
    assert "the train images are others than when the run began" in capsys.readouterr().err


def test_another_teacher_under_the_same_name_is_refused(begun: Path, capsys: Any) -> None:
    shutil.copy("m.safetensors", "other.safetensors")
    assert main(on("pictures", "-o", "own", "--resume", steps=3)) == 2
    assert "--teacher other.safetensors: the run began with a teacher of other weights" in capsys.readouterr().err


def test_a_best_model_that_is_gone_is_said_and_chosen_anew(here: Path, capsys: Any) -> None:
    Path("run/best.safetensors").unlink()
    assert main(run("-o", "run", "--resume", steps=4)) == 0
    assert "best.safetensors is not there any more" in capsys.readouterr().err
    assert Path("run/best.safetensors").is_file()


def test_the_best_model_of_a_run_that_goes_on_is_known_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = load_state(here / "run", trust_source=True).progress
    assert before["best_top1"] >= 0
    assert main(run("-o", "run", "--resume", "--max-steps", "4", "--lr", "1e-30")) == 0
    assert "takes its place" not in capsys.readouterr().err
    after = load_state(here / "run", trust_source=True).progress
    assert (after["best_top1"], after["best_file"]) == (before["best_top1"], before["best_file"])


@pytest.mark.parametrize(
    ("begin", "later", "message"),
    [
        (["--max-steps", "3", "--epochs", "5"], ["--epochs", "9"], "ends at step 3, by the --max-steps"),
        (["--max-steps", "9", "--epochs", "1"], ["--max-steps", "12"], "ends at step 3, by the --epochs 1"),
    ],
)
def test_a_length_that_does_not_end_the_run_is_said(begin, later, message, here: Path, capsys: Any) -> None:
    command = ["finetune", "m.safetensors", "--trust-source", "--data", "digits", *TRAIN, "-o", "new"]
    assert main([*command, *begin]) == 0
    assert main([*command, *later, "--resume"]) == 0
    assert message in capsys.readouterr().err
