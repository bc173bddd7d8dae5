"""A run's config.toml: the same run again, what no recipe may say, and whose file it is."""

from __future__ import annotations

import csv
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resode_cli.training.run_folder import load_state

Run = Callable[..., subprocess.CompletedProcess[str]]
SHORT = ("--images", 16, "--test-images", 8, "--batch-size", 8, "--max-steps", 2, "--adjoint", "backprop")
CHANGED = ("--lr", 0.03, "--stage", 3, "--stage", "layer2", "--no-augment", "--clip-grad", 1e-05, "--log-every", 1)
CONFIG = Path("runs/m-1/config.toml")


def settings(folder: str) -> dict[str, Any]:
    return load_state(Path(folder), trust_source=True).settings


def log(folder: str) -> list[tuple[str, ...]]:
    """Losses and accuracies; times differ."""
    with (Path(folder) / "log.csv").open(newline="") as file:
        return [tuple(row[name] for name in ("split", "step", "loss", "top1", "lr")) for row in csv.DictReader(file)]


def test_the_recipe_of_a_run_gives_the_same_run(run: Run, model: str) -> None:
    run("finetune", model, "--data", "digits", *SHORT, *CHANGED)
    assert CONFIG.read_text().startswith("# A run of resode finetune: ")
    assert "# resode finetune m.safetensors --data digits " in CONFIG.read_text()
    Path("resode.toml").unlink()
    run("finetune", "--recipe", CONFIG)
    assert settings("runs/m-2") == settings("runs/m-1")
    assert log("runs/m-2") == log("runs/m-1") and len(log("runs/m-1")) == 4
    tables = [tomllib.loads(Path(f"runs/m-{count}/config.toml").read_text()) for count in (1, 2)]
    assert tables[0] == tables[1]
    assert tables[0]["finetune"]["stage"] == ["layer2", "layer3"]
    assert "# momentum = 0.9\n" in CONFIG.read_text()  # a default is a comment: it may go with what is not set


def test_it_follows_what_a_resumed_run_changes_and_is_left_alone_else(run: Run, model: str) -> None:
    run("finetune", model, "--data", "digits", *SHORT, *CHANGED)
    before = CONFIG.read_text()
    run("finetune", "--resume")
    assert CONFIG.read_text() == before
    run("finetune", "--resume", "--max-steps", 3, "--lr", 0.01)
    table = tomllib.loads(CONFIG.read_text())["finetune"]
    assert table == {**tomllib.loads(before)["finetune"], "max-steps": 3, "lr": 0.01}
    assert "# resode finetune --max-steps 3 --lr 0.01 --resume" in CONFIG.read_text()
    CONFIG.unlink()  # as in runs of older versions
    run("finetune", "--resume", "--max-steps", 4)
    table = tomllib.loads(CONFIG.read_text())["finetune"]
    assert (table["max-steps"], table["lr"], table["data"], "model" in table) == (4, 0.01, "digits", False)


def test_code_is_no_setting_of_a_recipe(run: Run) -> None:
    source = ("net.py:small", "--no-pretrained")
    run("finetune", *source, "--data", "digits", *SHORT)
    config = Path("runs/small-1/config.toml")
    assert "model" not in tomllib.loads(config.read_text())["finetune"]
    assert '# model = "net.py:small"  # code' in config.read_text()
    run("finetune", "net.py:small", "--recipe", config)
    assert log("runs/small-2") == log("runs/small-1")
    run("finetune", "runs/small-1", "--resume", "--max-steps", 3)
    assert '# model = "net.py:small"  # code' in config.read_text()


@pytest.mark.parametrize("key", ["model", "source"])
def test_a_recipe_that_names_code_is_refused(key: str, run: Run) -> None:
    Path("r.toml").write_text(f'[finetune]\n{key} = "net.py:small"\ndata = "digits"\n')
    assert "must not name code to run" in run("finetune", "--recipe", "r.toml", code=2).stderr


def test_force_replaces_it_once_the_new_run_stands(run: Run, model: str) -> None:
    run("finetune", model, "--data", "digits", *SHORT, "-o", "r")
    before = Path("r/config.toml").read_bytes()
    run("finetune", model, "--data", "digits", *SHORT, "-o", "r", "--force", "--lr", 1e38, code=1)
    assert Path("r/config.toml").read_bytes() == before
    run("finetune", model, "--data", "digits", *SHORT, "-o", "r", "--force", "--seed", 1)
    assert tomllib.loads(Path("r/config.toml").read_text())["finetune"]["seed"] == 1


def test_a_file_of_the_users_own_stays(run: Run, model: str) -> None:
    Path("r").mkdir()
    Path("r/config.toml").write_text("mine = 1\n")
    said = run("finetune", model, "--data", "digits", *SHORT, "-o", "r", code=1).stderr
    assert "r/config.toml is not the recipe of a run" in said
    assert Path("r/config.toml").read_text() == "mine = 1\n"
    run("finetune", model, "--data", "digits", *SHORT, "-o", "q")
    Path("q/config.toml").write_text("mine = 1\n")
    run("finetune", model, "--data", "digits", *SHORT, "-o", "q", "--force", code=1)
    run("finetune", "q", "--resume", "--max-steps", 3)
    assert Path("q/config.toml").read_text() == "mine = 1\n"


def test_a_run_that_never_began_leaves_none(run: Run, model: str) -> None:
    run("finetune", model, "--data", "digits", *SHORT, "-o", "r", "--device", "cuda:99", code=2)
    assert not Path("r").exists()


def test_odd_names_are_written_so_that_they_are_read_back(run: Run, model: str, make_folder: Any) -> None:
    odd = make_folder('a "b" \\ é\n[x]', size=8, classes=("kea", "owl"))
    run("finetune", model, "--new-head", "--data", odd, *SHORT, "--seed", 3)
    table = tomllib.loads(CONFIG.read_text())["finetune"]
    assert (table["data"], table["new-head"], table["seed"]) == (str(odd), True, 3)


def test_what_a_killed_run_left_before_its_first_save_stops_nobody(run: Run, model: str) -> None:
    run("finetune", model, "--data", "digits", *SHORT, "-o", "r")
    for name in ("state", "best", "last"):
        Path(f"r/{name}.safetensors").unlink()
    run("finetune", model, "--data", "digits", *SHORT, "-o", "r", "--seed", 7)
    assert tomllib.loads(Path("r/config.toml").read_text())["finetune"]["seed"] == 7


def test_a_dry_run_writes_none(run: Run, model: str) -> None:
    run("finetune", model, "--data", "digits", *SHORT, "-o", "r", "--dry-run")
    assert not Path("r").exists()
