"""Every shipped recipe runs through the real command, with its steps cut short."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from resode_cli.app import main
from resode_cli.errors import ResodeError, UsageError
from resode_cli.recipe import Chosen, read_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.toml"))


def test_there_are_recipes() -> None:
    assert {p.stem for p in RECIPES} >= {"digits-pretrain", "cifar10-finetune", "imagenet-finetune"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("lr = true", "lr = true: write a number"),
        ("log-every = 1.5", "log-every = 1.5: write a whole number"),
        ("batch-size = 1.5", "--batch-size '1.5': write a whole number, or auto"),
        ("epochs = 2.0", "epochs = 2.0: write a whole number"),
        ('lr = "1e-3"', "lr = '1e-3': write a number"),
        ("augment = 1", "augment = 1: write true or false"),
        ("optimizer = 1979-05-27", "write a text in quotes"),
        ("stage = [[1]]", "stage = [1]: write a text in quotes"),
        ("lr = nan", "--lr nan: must be above 0"),
        ("momentum = 2", "--momentum 2: must be at least 0 and below 1"),
        ('schedule = "cosin"', "unknown schedule 'cosin'"),
        ('memory-budget = "8"', "memory budget '8'"),
        ("seed = 1" + 5000 * "0", "not TOML"),
        ("lr = " + 100_000 * "[", "not TOML"),
        ("lr = 1\nlr = 2", "not TOML"),
    ],
)
def test_a_mistake_in_a_recipe_names_the_recipe(line: str, says: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = f'[finetune]\nmodel = "none.safetensors"\ndata = "digits"\nout = "run"\n{line}\n'
    Path("mine.toml").write_text(text)
    assert main(["finetune", "--recipe", "mine.toml"]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: recipe mine.toml: ") and says in error and error.count("\n") == 1, error


def test_a_flag_may_correct_a_recipe(tmp_path: Path, capsys, monkeypatch) -> None:
    """What then is wrong is not the recipe's."""
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text('[finetune]\ndata = "digits"\nout = "run"\nstage = "layer1"\nlr = -1\n')
    assert main(["finetune", "none.safetensors", "--recipe", "mine.toml", "--lr", "1"]) == 2
    assert capsys.readouterr().err == "error: model file 'none.safetensors' does not exist\n"


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


SHORT = {
    "finetune": ["--max-steps", "2", "--batch-size", "8", "--device", "cpu", "--workers", "0", "--test-images", "10"],
    "deepen": ["--fit-steps", "2", "--fit-refine-steps", "1", "--fit-batch-size", "8", "--blocks", "6"],
    "tie": ["--fit-steps", "2", "--fit-batch-size", "8"],
}
DATA = {"finetune": "--data", "deepen": "--fit", "tie": "--fit"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_the_recipe_runs(recipe: Path, folder: Path) -> None:
    """Table by table, in the order of the file, on what the table before wrote."""
    tables = tomllib.loads(recipe.read_text())
    assert tables and f"--recipe {recipe.stem}" in recipe.read_text(), "the header says the command"
    made = "model.safetensors"
    for command, table in tables.items():
        arguments = [command, "--recipe", str(recipe), *SHORT.get(command, [])]
        if command != "convert":
            made = table.get("model", made)
            for needed in {made, table.get("teacher", made)}:
                if not Path(needed).exists():
                    base = ["convert", "cifar:resnet20", "--no-pretrained", "--num-classes", "10", "-o", needed]
                    assert main(base) == 0
            if "model" not in table:
                arguments.insert(1, made)
            if table.get("data") != "digits":
                arguments += [DATA[command], "images"]
        out = table.get("out", "run" if command == "finetune" else f"{command}.safetensors")
        if "out" not in table:
            arguments += ["--out", out]
        assert main(arguments) == 0
        made = f"{out}/last.safetensors" if command == "finetune" else out
        assert Path(made).exists()


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
        read_recipe(Chosen(recipe, recipe.name), "convert", ["weights", "out"])


def test_values_are_checked_as_flags_are(folder: Path, capsys) -> None:
    (folder / "r.toml").write_text('[deepen]\nblocks = "many"\n')
    shutil.copy(RECIPES[0], folder / "x.toml")
    assert main(["deepen", "m.safetensors", "-o", "d.safetensors", "--recipe", "r.toml"]) == 2
    assert "recipe r.toml: blocks = 'many': write a whole number" in capsys.readouterr().err
