"""The recipes that come with resode: list, show, copy, and `--recipe NAME`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from resode_cli import recipe

Run = Callable[..., subprocess.CompletedProcess[str]]
RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.rglob("*.toml"))
TINY = '# A tiny network.\n\n[convert]\nsource = "cifar:resnet20"\npretrained = false\ninput-size = 8\nseed = {seed}\n'


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One recipe, `tiny`, that comes with resode in place of all others."""
    folder = tmp_path / "installed"
    folder.mkdir()
    (folder / "tiny.toml").write_text(TINY.format(seed=1))
    monkeypatch.setattr(recipe, "folders", lambda: [folder])
    return folder


@pytest.mark.parametrize("command", [("recipes",), ("recipes", "list")])
def test_the_list_names_every_recipe(command: tuple[str, ...], run: Run) -> None:
    listed = json.loads(run(*command, "--json").stdout)
    assert [entry["name"] for entry in listed] == NAMES
    for entry in listed:
        text = (RECIPES / f"{entry['name']}.toml").read_text()
        assert text.startswith(f"# {entry['about']}\n") and entry["about"].endswith("."), "a sentence in the first line"
        assert entry["commands"] and all(f"\n[{command}]\n" in text for command in entry["commands"])
    assert all(name in run(*command).stdout for name in NAMES)


def test_an_option_before_the_subcommand_is_not_ignored(run: Run) -> None:
    assert "resode recipes list --json" in run("recipes", "--json", "show", NAMES[0], code=2).stderr


@pytest.mark.parametrize("name", NAMES)
def test_show_prints_the_file_as_it_is(name: str, run: Run) -> None:
    assert run("recipes", "show", name).stdout == (RECIPES / f"{name}.toml").read_text()


def test_a_copy_is_the_file_and_overwrites_none(run: Run) -> None:
    text = (RECIPES / "digits-pretrain.toml").read_bytes()
    assert run("recipes", "copy", "digits-pretrain").stderr == "wrote digits-pretrain.toml\n"
    assert Path("digits-pretrain.toml").read_bytes() == text
    Path("digits-pretrain.toml").write_text("mine")
    refused = run("recipes", "copy", "digits-pretrain", code=1).stderr
    assert refused == "error: digits-pretrain.toml exists; pass --force to overwrite it\n"
    assert Path("digits-pretrain.toml").read_text() == "mine"
    run("recipes", "copy", "digits-pretrain", "--force")
    run("recipes", "copy", "digits-pretrain", "-o", "other.toml")
    assert Path("digits-pretrain.toml").read_bytes() == text == Path("other.toml").read_bytes()


def test_a_command_takes_a_recipe_by_name(run: Run, packaged: Path) -> None:
    said = run("convert", "--recipe", "tiny", "-o", "a.safetensors").stderr
    note = "Recipe: tiny, which comes with resode (`resode recipes show tiny` prints it)\n"
    assert said.count("Recipe:") == 1 and note in said


@pytest.mark.parametrize("file", ["tiny", "tiny.toml"])
def test_a_file_in_the_folder_wins(file: str, run: Run, packaged: Path) -> None:
    Path(file).write_text(TINY.format(seed='"own"'))
    said = run("convert", "--recipe", "tiny", "-o", "a.safetensors", code=2).stderr
    assert f"error: recipe {file}: seed = 'own'" in said
    assert "comes with resode" not in said


def test_the_copy_that_a_name_means_is_said(run: Run, packaged: Path) -> None:
    run("recipes", "copy", "tiny")
    said = run("convert", "--recipe", "tiny", "-o", "a.safetensors").stderr
    assert said.count("Recipe:") == 1 and said.startswith("Recipe: the file tiny.toml in this folder\n")


def test_a_folder_of_the_name_is_no_recipe(run: Run, packaged: Path) -> None:
    """A run's folder may have the recipe's name."""
    Path("tiny").mkdir()
    run("convert", "--recipe", "tiny", "-o", "a.safetensors")


def test_a_mistake_in_a_packaged_recipe_names_it(run: Run, packaged: Path) -> None:
    (packaged / "tiny.toml").write_text(TINY.format(seed='"one"'))
    said = run("convert", "--recipe", "tiny", "-o", "a.safetensors", code=2).stderr
    assert said == "error: recipe tiny: seed = 'one': write a whole number\n"
    assert run("eval", "--recipe", "tiny", code=2).stderr == (
        "error: recipe tiny has no table [eval] (found: [convert])\n"
    )


def test_a_packaged_recipe_names_no_code_either(run: Run, packaged: Path) -> None:
    (packaged / "tiny.toml").write_text('[convert]\nsource = "net.py:small"\n')
    assert "must not name code to run" in run("convert", "--recipe", "tiny", "-o", "a.safetensors", code=2).stderr


@pytest.mark.parametrize(
    "command",
    [
        ("convert", "cifar:resnet20", "-o", "a.safetensors", "--recipe"),
        ("recipes", "show"),
        ("recipes", "copy"),
    ],
)
def test_an_unknown_name_gets_the_nearest_one(command: tuple[str, ...], run: Run) -> None:
    said = run(*command, "digits-pretrian", code=2).stderr
    assert said.startswith("error: unknown recipe 'digits-pretrian'; did you mean digits-pretrain?")
    assert "`resode recipes list` names those that come with resode" in said and said.count("\n") == 1


def test_a_path_that_is_not_there_is_told_the_name(run: Run) -> None:
    """As `recipes/NAME.toml`, which is there in a checkout alone."""
    said = run("convert", "--recipe", "recipes/digits-pretrain.toml", code=2).stderr
    assert said == (
        "error: recipe 'recipes/digits-pretrain.toml' does not exist; resode comes with one that is named so:"
        " --recipe digits-pretrain\n"
    )


def test_an_installation_without_recipes_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "folders", list)
    assert "has no recipes" in run("recipes", code=1).stderr
