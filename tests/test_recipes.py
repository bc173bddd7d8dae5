"""Every shipped recipe runs through the real command, with its steps cut short."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from resode_cli.app import main
from resode_cli.errors import ResodeError, UsageError
from resode_cli.recipe import read_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.toml"))


def test_there_are_recipes() -> None:
    assert {p.stem for p in RECIPES} >= {"digits-pretrain", "cifar10-finetune", "imagenet-finetune"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """A working folder with a small image folder of ten classes, which any recipe may be given."""
    for split in ("train", "val"):
        for k in range(10):
            path = tmp_path / "images" / split / f"class{k}"
            path.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (32, 32), (25 * k, 100 * i, 0)).save(path / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_the_recipe_runs(recipe: Path, folder: Path) -> None:
    tables = tomllib.loads(recipe.read_text())
    assert tables and f"recipes/{recipe.name}" in recipe.read_text(), "the header says the command"
    if "convert" in tables:
        assert main(["convert", "--recipe", str(recipe)]) == 0
        model = tables["convert"]["out"]
    else:
        model = "model.safetensors"
        base = ["convert", "cifar:resnet20", "--no-pretrained", "--num-classes", "10", "-o", model]
        assert main(base) == 0
    arguments = ["finetune", "--recipe", str(recipe), "--out", "run", "--max-steps", "2", "--batch-size", "8"]
    arguments += ["--device", "cpu", "--workers", "0", "--test-images", "10"]
    if "model" not in tables["finetune"]:
        arguments.insert(1, model)
    if tables["finetune"].get("data") != "digits":
        arguments += ["--data", "images"]
    assert main(arguments) == 0
    assert (folder / "run" / "last.safetensors").exists()


def test_a_flag_wins_over_the_recipe_wherever_it_stands(folder: Path) -> None:
    recipe = folder / "r.toml"
    recipe.write_text(
        '[convert]\nsource = "cifar:resnet20"\npretrained = false\ninput-size = 8\nout = "a.safetensors"\n'
    )
    assert main(["convert", "-o", "b.safetensors", "--recipe", str(recipe)]) == 0
    assert main(["convert", "--recipe", str(recipe), "-o", "c.safetensors"]) == 0
    assert not (folder / "a.safetensors").exists()
    assert (folder / "b.safetensors").exists() and (folder / "c.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[convert]\nweigths = 'x'\n", "weights"),
        ("[finetune]\nlr = 1\n", "no table"),
        ("[convert\n", "not TOML"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(text)
    with pytest.raises((UsageError, ResodeError), match=message):
        read_recipe(recipe, "convert", ["weights", "out"])


def test_values_are_checked_as_flags_are(folder: Path, capsys) -> None:
    (folder / "r.toml").write_text('[deepen]\nblocks = "many"\n')
    shutil.copy(RECIPES[0], folder / "x.toml")
    assert main(["deepen", "m.safetensors", "-o", "d.safetensors", "--recipe", "r.toml"]) == 2
    assert "--blocks" in capsys.readouterr().err
