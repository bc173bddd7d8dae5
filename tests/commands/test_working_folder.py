"""What a folder remembers, what commands take from it, and the names they give where none is given."""

from __future__ import annotations

import json
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import resode_cli
from resode_cli.commands.working_folder import _edited, name_of, source_name
from resode_cli.training.run_folder import load_state

Run = Callable[..., subprocess.CompletedProcess[str]]
SMALL = ("net.py:small", "--no-pretrained", "--input-size", 8)
SHORT = ("--images", 16, "--test-images", 8, "--batch-size", 8, "--max-steps", 1, "--adjoint", "backprop")


def remembered() -> dict[str, Any]:
    return tomllib.loads(Path("resode.toml").read_text())


def test_the_lines_of_the_card_as_they_stand(run: Run) -> None:
    run("convert", *SMALL)
    assert remembered() == {"source": "net.py:small", "model": "small.safetensors"}
    run("deepen", "--blocks", 4)
    assert remembered()["model"] == "small-4.safetensors"
    said = run("finetune", "--adjoint", "heun", "--data", "digits", *SHORT[:-2]).stderr
    assert "from resode.toml: model small-4.safetensors" in said
    assert remembered() == {
        "source": "net.py:small",
        "model": "runs/small-4-1/best.safetensors",
        "data": "digits",
        "run": "runs/small-4-1",
    }
    document = json.loads(run("check-grad", "--adjoint", "heun", "--images", 4, "--json").stdout)
    assert document["data"] == "digits, test"
    run("eval", "--images", 8)
    assert "runs/small-4-1/best.safetensors" in run("info").stdout


def test_no_name_is_taken_twice(run: Run) -> None:
    for made in ("small", "small-2", "small-3"):
        run("convert", *SMALL)
        assert remembered()["model"] == f"{made}.safetensors"
    Path("small-2.safetensors").write_text("mine")
    run("convert", *SMALL, "--force")  # of the first name
    assert Path("small-2.safetensors").read_text() == "mine"
    for count in (1, 2):
        run("finetune", "small.safetensors", "--data", "digits", *SHORT)
        assert remembered()["run"] == f"runs/small-{count}"
    for command in (("tie",), ("untie",), ("recalibrate", "--images", 8, "--test-images", 8)):
        run(*command, "small.safetensors", *(("--data", "digits") if len(command) > 1 else ()))
        ending = {"tie": "tied", "untie": "untied", "recalibrate": "recalibrated"}[str(command[0])]
        assert remembered()["model"] == f"small-{ending}.safetensors"


def test_a_command_that_is_written_out_takes_no_data_that_it_can_do_without(run: Run, model: str) -> None:
    run("finetune", model, "--data", "digits", *SHORT)
    document = json.loads(run("check-grad", model, "--adjoint", "pc", "--images", 4, "--json").stdout)
    assert document["data"] == "random noise"
    assert "from resode.toml: data digits" in run("eval", model, "--images", 8).stderr


def test_remembered_data_of_other_classes_stop_no_rewrite_and_named_ones_say_how_to_fit(
    run: Run, make_folder: Make, model: str
) -> None:
    photos = make_folder(size=8)
    Path("resode.toml").write_text(f'model = "{model}"\ndata = "{photos}"\n')
    fast = ("--fit-phases", "blocks", "--fit-steps", 1, "--batch-size", 4)
    said = run("deepen", "--blocks", 4, *fast).stderr
    assert "fitted to the source on the training images" in said
    assert "accuracy is not measured: " in said and "has 3 classes and the model's head" in said
    for command in ("tie", "untie"):
        assert "accuracy is not measured: " in run(command).stderr
    said = run("deepen", model, "--blocks", 4, "--data", photos, code=1).stderr
    assert "has 3 classes and the model's head" in said and f"; --fit {photos} alone looks at no labels" in said
    run("deepen", model, "--blocks", 4, "--fit", photos, *fast)


def test_what_lies_elsewhere_is_not_remembered(run: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    run("convert", *SMALL, "-o", tmp_path_factory.mktemp("elsewhere") / "m.safetensors")
    assert not Path("resode.toml").exists()


def test_everything_that_is_missing_is_named_at_once(run: Run, model: str) -> None:
    Path("resode.toml").unlink()
    assert "deepen needs MODEL and --blocks; " in run("deepen", code=2).stderr
    assert "finetune needs MODEL|SOURCE and --data; " in run("finetune", code=2).stderr
    assert "finetune needs --data; " in run("finetune", model, code=2).stderr
    assert "recalibrate needs MODEL and --data; " in run("recalibrate", code=2).stderr
    assert "no resode.toml in this folder" in run("predict", "a.png", code=2).stderr
    assert "--resume: say which run goes on" in run("finetune", "--resume", code=2).stderr


def test_code_is_named_anew_every_time(run: Run, model: str) -> None:
    assert remembered()["source"] == "net.py:small"
    assert "convert needs SOURCE" in run("convert", code=2).stderr


@pytest.mark.parametrize("how", ["--resume", "--resume FOLDER", "FOLDER --resume"])
def test_a_run_goes_on_without_being_told_of_its_data(how: str, run: Run, model: str) -> None:
    run("finetune", model, "--data", "digits", *SHORT)
    arguments = [word.replace("FOLDER", "runs/m-1") for word in how.split()]
    if "FOLDER" in how:
        Path("resode.toml").unlink()
    run("finetune", *arguments, "--max-steps", 2)
    assert load_state(Path("runs/m-1"), trust_source=True).progress["step"] == 2


def test_a_run_does_not_go_on_from_another_source(run: Run) -> None:
    Path("other.py").write_text(Path("net.py").read_text())
    run("finetune", "net.py:small", "--no-pretrained", "--data", "digits", *SHORT)
    again = run("finetune", "other.py:small", "--resume", "--max-steps", 2, code=2).stderr
    assert "the run began with net.py:small, not with other.py:small" in again


def test_the_files_table_is_a_recipe_that_flags_and_recipes_win_over(run: Run, model: str) -> None:
    Path("resode.toml").write_text('model = "m.safetensors"\n[finetune]\nlr = 1e-4\nseed = 3\n[eval]\nimages = 4\n')
    Path("r.toml").write_text("[finetune]\nseed = 4\n")
    run("finetune", "--data", "digits", *SHORT, "--recipe", "r.toml")
    settings = load_state(Path("runs/m-1"), trust_source=True).settings
    assert (settings["lr"], settings["seed"]) == (1e-4, 4)
    assert remembered()["finetune"] == {"lr": 1e-4, "seed": 3}  # it is kept
    assert json.loads(run("eval", "--json").stdout)["images"] == 4
    Path("resode.toml").write_text(Path("resode.toml").read_text().replace("1e-4", "1e-9"))
    run("finetune", "--resume", "--max-steps", 2)  # the table changes nothing under a run
    assert load_state(Path("runs/m-1"), trust_source=True).settings["lr"] == 1e-4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model = ", "not TOML"),
        ('modle = "m.safetensors"', "did you mean model"),
        ("model = 3", "write a text in quotes"),
        ("[eval]\nimage = 3", "did you mean images"),
        ("[eval]\nforce = true", "unknown key"),
        ("[eval]\nimages = 0", "--images"),
    ],
)
def test_a_mistake_in_the_file_is_named(text: str, says: str, run: Run, model: str) -> None:
    Path("resode.toml").write_text(text)
    said = run("eval", model, "--data", "digits", code=1 if says == "not TOML" else 2).stderr
    assert "resode.toml" in said and says in said
    run("eval", "--help")


def test_a_file_that_cannot_be_written_costs_no_model(run: Run) -> None:
    Path("resode.toml").mkdir()
    assert "resode.toml in this folder cannot be read" in run("convert", *SMALL, code=1).stderr
    Path("resode.toml").rmdir()
    Path("resode.toml").write_text("model = '''\na'''\n")
    assert "resode.toml does not remember this" in run("convert", *SMALL).stderr
    assert Path("small.safetensors").exists()
    assert Path("resode.toml").read_text() == "model = '''\na'''\n"


@pytest.mark.parametrize("text", ["", "# a\n", "# a\n\n[finetune]\nlr = 1.0 # high\n", 'data = "x"', 'run="y"\n#\n'])
@pytest.mark.parametrize("value", ["photos", 'a "b" \\ \n\t\x7f é 日', "[x]", "model = 1"])
def test_other_lines_stay_as_they_are(text: str, value: str) -> None:
    edited = _edited(text, {"data": value, "run": None})
    assert tomllib.loads(edited)["data"] == value
    assert "run" not in tomllib.loads(edited)
    assert [line for line in text.splitlines() if not line.startswith(("data", "run"))] == [
        line for line in edited.splitlines() if not line.startswith("data")
    ]


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert name_of("runs/net-1/best.safetensors") == "net-1"
    assert name_of("net.v2.safetensors") == "net.v2"
    sources = {"timm:resnet50.a1_in1k": "resnet50.a1_in1k", "resnet50": "resnet50", "a/net.py:make": "make"}
    sources |= {"hf-hub:timm/resnet18": "resnet18", "local-dir:/a/b/": "b"}
    assert {source: source_name(source) for source in sources} == sources


def test_a_bare_name_is_timms_and_a_wrong_one_has_its_nearest_named(run: Run) -> None:
    assert "resnet18 is taken as timm:resnet18" in run("convert", "resnet18", "--no-pretrained").stderr
    assert Path("resnet18.safetensors").exists()
    said = run("convert", "resnt50", code=2).stderr
    assert "did you mean timm:resnet50" in said
    assert "cifar:resnet56" in run("convert", "resnet56", code=2).stderr


Make = Callable[..., Path]


def test_a_source_gets_a_head_for_the_data(run: Run, make_folder: Make) -> None:
    folder = make_folder(size=8)
    said = run("finetune", *SMALL[:2], "--data", folder, *SHORT).stderr
    assert "a new head (linear), random, for the 3 classes" in said
    model = load_state(Path("runs/small-1"), trust_source=True).model
    assert (model.info.class_names, model.info.num_classes) == (("cat", "dog", "owl"), 3)
    assert model.net.linear.out_features == 3
    run("eval", "--data", folder)


def test_weights_are_of_a_source(run: Run, model: str) -> None:
    weights = Path("w.pth")
    torch.save(resode_cli.load(model, trust_source=True).file_state(), weights)
    run("finetune", "net.py:small", "--weights", weights, "--data", "digits", *SHORT, "--lr", 1e-30)
    given, found = torch.load(weights), resode_cli.load("runs/small-1/best.safetensors", trust_source=True).file_state()
    torch.testing.assert_close(found["conv1.weight"], given["conv1.weight"])
    said = run("finetune", model, "--weights", weights, "--data", "digits", *SHORT, code=2).stderr
    assert "--weights is of a SOURCE" in said


def test_a_new_head_is_trained_whatever_else_is(run: Run, make_folder: Make, model: str) -> None:
    said = run("finetune", model, "--data", make_folder(size=8), *SHORT, "--stage", "layer1", "--lr", 0.1).stderr
    assert "the head started at random, so it is trained beside --stage" in said
    (_, head, *_) = load_state(Path("runs/m-1"), trust_source=True).model.info.history
    assert (head["command"], head["classes"], head["fresh_head"]) == ("new-head", 3, ["linear.weight", "linear.bias"])


def test_a_head_with_names_is_replaced_only_where_that_is_asked_for(run: Run, make_folder: Make, model: str) -> None:
    first, second = make_folder("a", size=8), make_folder("b", classes=("kea", "owl"), size=8)
    run("finetune", model, "--data", first, *SHORT)
    said = run("finetune", "runs/m-1/best.safetensors", "--data", second, *SHORT, code=1).stderr
    assert "only the data: kea" in said and "--new-head" in said
    run("finetune", "runs/m-1/best.safetensors", "--data", second, *SHORT, "--new-head")
    assert load_state(Path("runs/m-1-1"), trust_source=True).model.info.class_names == ("kea", "owl")


def test_what_the_file_says_of_new_runs_is_not_said_of_one_that_goes_on(run: Run, make_folder: Make) -> None:
    """Nor is what a recipe says of how it began; a flag is refused."""
    begins = 'pretrained = false\nnew-head = true\nval-split = 0.5\ninput-size = "16"\nsplit-seed = 3\nseed = 1\n'
    short = 'adjoint = "backprop"\nmax-steps = 1\nbatch-size = 4\n'
    folder = make_folder(splits=("",), each=4, size=16)
    Path("resode.toml").write_text(f"[finetune]\n{begins}{short}")
    run("finetune", "net.py:small", "--data", folder)
    run("finetune", "--resume", "--max-steps", 2)
    other = begins.replace("0.5", "0.3").replace("16", "8").replace("= 3", "= 4").replace("= 1", "= 2")
    memory = Path("resode.toml").read_text().replace(begins, f"{other}dry-run = true\n")
    Path("resode.toml").write_text(memory)
    run("finetune", "--resume", "--max-steps", 3)
    run("finetune", "--resume", "--max-steps", 4, "--recipe", "runs/small-1/config.toml")
    for flag in ("--new-head", "--no-pretrained"):
        run("finetune", "--resume", "--max-steps", 5, flag, code=2)
    assert "the run has 0.5, and keeps it" in run("finetune", "--resume", "--val-split", 0.3, code=2).stderr
