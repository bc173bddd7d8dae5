"""Which models a run keeps, and what ends it: --best-by, --keep-best, --patience, --max-time."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import contents, run

from resode_cli.app import main
from resode_cli.data import open_data
from resode_cli.errors import UsageError
from resode_cli.files import model_file
from resode_cli.measuring.evaluate import Evaluation
from resode_cli.quantities import parse_duration
from resode_cli.training import best
from resode_cli.training.finetune import finetune
from resode_cli.training.run_folder import load_state
from resode_cli.training.settings import Settings

EVERY = ["--images", "8", "--schedule", "constant", "--lr", "0.05"]  # an evaluation after every step


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let evaluations have these accuracies (or losses), one after the other from the one before training on."""

    ordinary = best.evaluate  # type: ignore[attr-defined]

    def score(*values: float, by: str = "top1") -> None:
        waiting = list(values)

        def evaluated(*arguments: Any, **settings: Any) -> Evaluation:
            return replace(ordinary(*arguments, **settings), **{by: waiting.pop(0)})

        monkeypatch.setattr(best, "evaluate", evaluated)

    return score


def steps_of(folder: str, name: str = "best.safetensors") -> Any:
    return model_file.load(Path(folder) / name, trust_source=True).info.history[-1]["steps"]


def same_weights(one: str, other: str) -> bool:
    a, b = load_file(one), load_file(other)
    return all(torch.equal(value, b[key]) for key, value in a.items())


def test_where_nothing_is_better_the_best_is_the_model_as_it_began(here: Path, scored: Any, capsys: Any) -> None:
    scored(0.5, 0.4, 0.5, 0.3)
    assert main(run("-o", "new", *EVERY, "--json")) == 0
    printed = capsys.readouterr()
    assert "no evaluation was better than before training: best.safetensors is the model as it began" in printed.err
    assert json.loads(printed.out)["best_step"] == 0 and json.loads(printed.out)["best_top1"] == 0.5
    assert steps_of("new") == 0 and same_weights("new/best.safetensors", "m.safetensors")
    assert not list(Path("new").glob(".best*"))


def test_a_better_one_takes_its_place(here: Path, scored: Any) -> None:
    scored(0.5, 0.4, 0.6, 0.3)
    assert main(run("-o", "new", *EVERY)) == 0
    assert steps_of("new") == 2 and not list(Path("new").glob("best-step*"))


@pytest.mark.parametrize(("by", "values"), [("loss", (1.0, 0.7, 0.9, 0.8)), ("top5", (0.1, 0.9, 0.5, 0.6))])
def test_the_best_may_be_of_another_figure(by: str, values: tuple[float, ...], here: Path, scored: Any) -> None:
    scored(*values, by=by)
    assert main(run("-o", "new", *EVERY, "--best-by", by)) == 0
    assert steps_of("new") == 1


def test_several_of_the_best_are_kept(here: Path, scored: Any) -> None:
    scored(0.5, 0.4, 0.6, 0.3, 0.8, 0.7)
    assert main(run("-o", "new", *EVERY, "--keep-best", "3", "--save-every", "1", steps=5)) == 0
    assert steps_of("new") == 4
    assert sorted(path.name for path in Path("new").glob("best-*")) == [
        "best-step-2.safetensors",
        "best-step-5.safetensors",
    ]
    assert [steps_of("new", f"best-step-{n}.safetensors") for n in (2, 5)] == [2, 5]
    scored(0.5, 0.4)
    assert main(run("-o", "new", *EVERY, "--force", steps=1)) == 0
    assert not list(Path("new").glob("best-step*")), "a new run replaces them"


def test_the_model_as_it_began_may_be_one_of_them(here: Path, scored: Any) -> None:
    scored(0.5, 0.6, 0.4)
    assert main(run("-o", "new", *EVERY, "--keep-best", "2", steps=2)) == 0
    assert steps_of("new") == 1 and steps_of("new", "best-step-0.safetensors") == 0


def test_kept_models_are_those_of_the_uninterrupted_run(here: Path, scored: Any) -> None:
    values = (0.5, 0.4, 0.6, 0.7, 0.65)
    scored(*values)
    assert main(run("-o", "whole", *EVERY, "--keep-best", "3", steps=4)) == 0
    scored(*values)
    assert main(run("-o", "parts", *EVERY, "--keep-best", "3", steps=2)) == 0
    assert main(run("-o", "parts", "--resume", *EVERY[:2], steps=4)) == 0
    whole, parts = contents(Path("whole")), contents(Path("parts"))
    assert whole.keys() == parts.keys()
    for name in whole:
        if name.endswith(".safetensors") and name != "state.safetensors":
            assert same_weights(f"whole/{name}", f"parts/{name}"), name


def put_back_after(command: list[str], folder: Path) -> None:
    """The state as it was before a command, beside all else that this left: as if killed before it saved its own."""
    state = (folder / "state.safetensors").read_bytes()
    assert main(command) == 0
    (folder / "state.safetensors").write_bytes(state)


def test_a_run_that_is_killed_after_a_better_model_keeps_the_others(here: Path, scored: Any) -> None:
    more = [*EVERY, "--keep-best", "3", "--save-every", "2"]
    scored(0.1, 0.5, 0.4, 0.6, 0.2)
    assert main(run("-o", "whole", *more, steps=4)) == 0
    scored(0.1, 0.5, 0.4, 0.6, 0.6, 0.2)
    assert main(run("-o", "parts", *more, steps=2)) == 0
    put_back_after(run("-o", "parts", "--resume", "--images", "8", steps=3), Path("parts"))
    assert main(run("-o", "parts", "--resume", "--images", "8", steps=4)) == 0
    names = ["best-step-1.safetensors", "best-step-2.safetensors", "best.safetensors"]
    assert sorted(path.name for path in Path("parts").glob("best*")) == names
    assert all(same_weights(f"whole/{name}", f"parts/{name}") for name in names)


def test_models_without_a_state_are_begun_anew_and_no_one_is_sent_in_circles(here: Path, capsys: Any) -> None:
    """As a run leaves them that is killed between its first better model and its first save."""
    Path("run/state.safetensors").unlink()
    assert main(run("-o", "run")) == 1
    error = capsys.readouterr().err
    assert "no state.safetensors to go on from; pass --force" in error and "--resume" not in error
    assert main(run("-o", "run", "--resume")) == 2
    assert "begin the run anew, with --force" in capsys.readouterr().err
    assert main(run("-o", "run", "--force")) == 0


def test_an_evaluation_that_is_made_again_has_one_row(here: Path, monkeypatch: Any) -> None:
    """The run is stopped before the evaluation of its step, and killed after it when it goes on."""
    with monkeypatch.context() as patch:
        patch.setattr(best.Evaluations, "due", lambda self: False)
        assert main(run("-o", "parts", steps=3)) == 0
    put_back_after(run("-o", "parts", "--resume", steps=3), Path("parts"))
    assert main(run("-o", "parts", "--resume", steps=3)) == 0
    with Path("parts/log.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file) if row["split"] == "test"] == ["0", "3"]


def test_a_run_that_fails_before_its_first_save_leaves_nothing(here: Path, capsys: Any) -> None:
    before = contents(here / "run")
    assert main(run("-o", "run", "--force", "--lr", "1e38")) == 1
    assert contents(here / "run") == before
    assert main(run("-o", "new", "--lr", "1e38")) == 1
    assert set(contents(here / "new")) == {"log.csv", "config.toml"}


def test_a_run_that_is_killed_before_the_best_has_its_name_finds_it(here: Path, monkeypatch: Any, scored: Any) -> None:
    scored(0.5, 0.4, 0.3)
    rename = Path.replace

    def killed(self: Path, target: Any) -> Path:
        if self.name.startswith(".best.safetensors."):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        main(run("-o", "new", *EVERY, "--save-every", "1", steps=2))
    assert not Path("new/best.safetensors").exists() and list(Path("new").glob(".best.safetensors.*"))
    assert main(run("-o", "new", *EVERY[:2], "--resume", steps=2)) == 0
    assert steps_of("new") == 0 and not list(Path("new").glob(".best*"))


def test_patience_ends_a_run_and_more_of_it_goes_on(here: Path, scored: Any, capsys: Any) -> None:
    scored(0.5, 0.6, 0.5, 0.6, 0.7, 0.1)
    assert main(run("-o", "new", *EVERY, "--patience", "2", steps=5)) == 0
    assert "the last 2 evaluations brought nothing better: the run ends at step 3 of 5" in capsys.readouterr().err
    assert load_state(here / "new").progress["step"] == 3 and steps_of("new") == 1
    assert main(run("-o", "new", *EVERY[:2], "--resume", steps=5)) == 0
    assert "the run ends at step 3 of 5" in capsys.readouterr().err
    assert main(run("-o", "new", *EVERY[:2], "--resume", "--patience", "3", steps=5)) == 0
    assert load_state(here / "new").progress["step"] == 5 and steps_of("new") == 4


def test_time_ends_a_run_at_a_step_and_it_goes_on_to_the_bit(here: Path, monkeypatch: Any, capsys: Any) -> None:
    assert main(run("-o", "whole", *EVERY, steps=4)) == 0
    monkeypatch.setattr("resode_cli.training.settings.parse_duration", lambda _: 1e-9)
    for step in range(1, 4):
        assert main(run("-o", "parts", *EVERY, "--max-time", "1s", *(["--resume"] if step > 1 else []), steps=4)) == 0
        said = capsys.readouterr().err
        assert f"--max-time 1s is over at step {step} of 4; --resume goes on from there" in said
    assert main(run("-o", "parts", *EVERY, "--resume", steps=4)) == 0
    assert "is over" not in capsys.readouterr().err
    one, other = (load_file(f"{name}/state.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    with Path("parts/log.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file) if row["split"] == "test"] == ["0", "1", "2", "3", "4"]


def test_times_are_read() -> None:
    assert [parse_duration(text) for text in ("90s", "30m", "2h", "1h30m", "1h1m1s")] == [90, 1800, 7200, 5400, 3661]
    for text in ("", "30", "0s", "m", "1.5h", "-1s", "1s1h"):
        with pytest.raises(UsageError, match="write hours, minutes or seconds"):
            parse_duration(text)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-time", "soon"], "time 'soon': write hours"),
        (["--patience", "0"], "--patience 0: must be"),
        (["--keep-best", "0"], "--keep-best 0: must be"),
        (["--best-by", "f1"], "unknown best by 'f1'"),
    ],
)
def test_what_is_none_is_refused(more: list[str], message: str, here: Path, capsys: Any) -> None:
    assert main(run("-o", "new", *more)) == 2
    assert message in capsys.readouterr().err


def test_a_resumed_run_knows_its_best_model_again(here: Path, scored: Any, capsys: Any) -> None:
    scored(0.5, 0.9, 0.6)
    assert main(run("-o", "new", *EVERY, steps=1)) == 0
    assert main(run("-o", "new", *EVERY[:2], "--resume", steps=2)) == 0
    assert "best.safetensors is not" not in capsys.readouterr().err and steps_of("new") == 1


def test_what_is_best_stays(here: Path, capsys: Any) -> None:
    assert main(run("-o", "run", "--resume", "--best-by", "loss", steps=4)) == 2
    assert "--best-by loss: the run has auto, and keeps it" in capsys.readouterr().err


def test_a_figure_that_is_the_same_for_all_models_is_refused(here: Path, capsys: Any) -> None:
    few = ["--no-pretrained", "--input-size", "8", "--num-classes", "4", "-o", "few.safetensors"]
    assert main(["convert", "net.py:small", *few]) == 0
    model = model_file.load("few.safetensors", trust_source=True)
    with pytest.raises(UsageError, match="--best-by top5: the five likeliest of 4 classes"):
        best.check_tells_apart(model, Settings(best_by="top5"))
    best.check_tells_apart(model, Settings(best_by="loss"))


def test_what_evaluations_decide_needs_some(here: Path) -> None:
    model = model_file.load("m.safetensors", trust_source=True)
    images = open_data("digits", model.info.preprocessing, "train", images=8)
    with pytest.raises(UsageError, match="--keep-best waits for evaluations"):
        finetune(model, images, None, out="new", settings=Settings(keep_best=2, batch_size=8, adjoint="backprop"))


def test_a_teacher_without_a_weight_is_refused(here: Path, capsys: Any) -> None:
    assert main(run("-o", "new", "--teacher", "other.safetensors", "--distill", "0")) == 2
    assert "--distill 0 learns nothing from --teacher" in capsys.readouterr().err
    taught = ["--teacher", "other.safetensors", "--distill", "0", "--teacher-states", "1"]
    assert main(run("-o", "new", *taught, steps=1)) == 0


def test_one_image_is_mixed_with_none(here: Path, capsys: Any) -> None:
    assert main(run("-o", "new", "--mixup", "0.4", "--batch-size", "1")) == 2
    assert "--mixup mixes the images of a batch with each other, and a step has one" in capsys.readouterr().err
