"""Files in a run's folder that are not, or no longer, what a run left there; and states that a stranger wrote."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import contents, run

from resode_cli.app import main
from resode_cli.files import model_file
from resode_cli.training.run_folder import STATE

Here = Path
Capture = pytest.CaptureFixture[str]


def fails(capsys: Capture, *words: str, command: list[str]) -> None:
    assert main(command) != 0
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert "unexpected" not in error


def test_files_of_the_users_own_are_left_alone(here: Here, capsys: Capture) -> None:
    mine = here / "mine"
    mine.mkdir()
    (mine / "log.csv").write_text("my,data\n")
    fails(capsys, "is not the log of a run", command=run("-o", "mine"))
    (mine / "log.csv").unlink()
    own = {".lock": "mine", ".log.csv.swp": "vim's", "notes.txt": "notes"}
    for name, text in own.items():
        (mine / name).write_text(text)
    assert main(run("-o", "mine")) == 0
    assert {name: (mine / name).read_text() for name in own} == own


@pytest.mark.parametrize("read", ["run/best.safetensors", "run/last.safetensors"])
def test_force_does_not_replace_what_the_run_reads(read: str, here: Here, capsys: Capture) -> None:
    before = contents(here / "run")
    fails(capsys, read, "--force", command=run("--force", "-o", "run", "--teacher", read))
    fails(capsys, read, "--force", command=run("--force", "-o", "run", model=read))
    assert contents(here / "run") == before


BEST: dict[str, Callable[[Path], object]] = {
    "half of it": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "another model": lambda path: shutil.copy("other.safetensors", path),
    "nothing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("kind", BEST)
def test_a_best_model_that_is_not_the_runs_own_is_chosen_anew(kind: str, here: Here, capsys: Capture) -> None:
    best = here / "run" / "best.safetensors"
    BEST[kind](best)
    left = best.read_bytes() if best.exists() else b""
    assert main(run("--resume", "-o", "run", steps=6)) == 0
    assert "the best model from here on takes its place" in " ".join(capsys.readouterr().err.split())
    assert best.read_bytes() != left
    assert model_file.load(best, trust_source=True).info.history[-1]["command"] == "finetune"


def test_the_best_model_that_the_run_saved_is_known_again(here: Here, capsys: Capture) -> None:
    assert main(run("--resume", "-o", "run", steps=6)) == 0
    assert "takes its place" not in capsys.readouterr().err


def put(**path_and_value: Any) -> Callable[[dict[str, Any]], object]:
    """Set entries of the run's metadata: part__name=value."""

    def change(metadata: dict[str, Any]) -> None:
        for key, value in path_and_value.items():
            part, _, name = key.partition("__")
            if name:
                metadata["run"][part][name] = value
            else:
                metadata["run"][part] = value

    return change


STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no fingerprint": put(fingerprint=5),
    "no progress": put(progress=[]),
    "no optimizer": lambda metadata: metadata["run"].pop("optimizer"),
    "no run": lambda metadata: metadata.update(run=3),
    "a step below 0": put(progress__step=-5),
    "a step that is a word": put(progress__step="x"),
    "a best of 1e30": put(progress__best_top1=1e30),
    "skipped steps in words": put(progress__skipped="x"),
    "more progress": put(progress__further=1),
    "a rate in words": put(settings__lr="x"),
    "no rate": put(settings__lr=None),
    "a rate below 0": put(settings__lr=-1.0),
    "another kind of norm": put(settings__bn=None),
    "a word for compile": put(settings__compile="yes"),
    "a number of stages": put(settings__stages=5),
    "no precision": put(settings__amp=None),
    "a numbered teacher": put(settings__teacher=5),
    "a word for workers": put(settings__workers="many"),
}


def rewrite(path: Path, change: Callable[[dict[str, Any]], object], tensors: Any = lambda found: found) -> None:
    found, metadata = model_file.read_tensors(path)
    metadata.pop(model_file.CHECKSUM, None)
    change(metadata)
    model_file.write_tensors(path, tensors(found), metadata)


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_no_run_wrote_is_one_line(kind: str, here: Here, capsys: Capture) -> None:
    rewrite(here / "run" / STATE, STATES[kind])
    fails(capsys, "error: ", command=run("--resume", "-o", "run", steps=6))


TENSORS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "one too many": lambda found: found | {"further/x": found["generator/cpu"].clone()},
    "a short generator": lambda found: found | {"generator/cpu": found["generator/cpu"][:7].clone()},
    "no generator": lambda found: {name: t for name, t in found.items() if not name.startswith("generator")},
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_state_with_other_tensors_is_one_line(kind: str, here: Here, capsys: Capture) -> None:
    rewrite(here / "run" / STATE, lambda metadata: None, TENSORS[kind])
    fails(capsys, "error: ", command=run("--resume", "-o", "run", steps=6))


def test_an_early_stage_alone_can_be_trained_by_auto(here: Here) -> None:
    assert main([*run("--stage", "1", "-o", "early"), "--adjoint", "auto"]) == 0


def test_a_fit_in_place_leaves_a_file_of_its_working_name_alone(here: Here, capsys: Capture) -> None:
    own = here / "m.unfinished.safetensors"
    own.write_text("precious")
    fit = ["--fit", "digits", "--fit-steps", "1", "--fit-images", "32", "--fit-batch-size", "4", "--no-gradients"]
    tie = ["tie", "m.safetensors", "--trust-source", "-o", "m.safetensors", "--force"]
    fails(capsys, "m.unfinished.safetensors exists", command=[*tie, *fit])
    assert main(tie) == 0
    assert own.read_text() == "precious"


def test_an_output_that_is_a_link_is_written_through_it(here: Here, capsys: Capture) -> None:
    (here / "link.safetensors").symlink_to("copy.safetensors")
    untie = ["untie", "m.safetensors", "--trust-source", "-o", "link.safetensors", "--force"]
    fails(capsys, "is a link to 'copy.safetensors', which does not exist", command=untie)
    shutil.copy("other.safetensors", "copy.safetensors")
    assert main(untie) == 0
    assert (here / "link.safetensors").is_symlink()
    assert (here / "copy.safetensors").read_bytes() != (here / "other.safetensors").read_bytes()
