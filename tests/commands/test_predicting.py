"""`resode predict` as a user runs it: the table, the files it writes, and what it says of what it cannot read."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import resode_cli
from resode_cli.measuring.predict import Prediction
from resode_cli.reports.predictions import prediction_table, predictions_csv

Run = Callable[..., subprocess.CompletedProcess[str]]
PATHS = ["photos/a.png", 'photos/b, "c".png', "photos/sub/d.png"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    for path in PATHS:
        Image.fromarray(draw.integers(0, 256, (12, 9, 3), dtype=np.uint8)).save(tmp_path / path)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


@pytest.fixture
def named(run: Run, model: str) -> str:
    """A model with names for its classes, the second of which would garble a terminal."""
    loaded = resode_cli.load(model, trust_source=True)
    loaded.name_classes(["cat", "[red]dog\x1b[31m", *(f"class {k}" for k in range(8))])
    resode_cli.save(loaded, "named.safetensors")
    return "named.safetensors"


def test_json_has_the_images_in_the_order_in_which_they_are_found(run: Run, model: str, photos: Path) -> None:
    arguments = ("predict", model, "photos/sub", "photos", "--top", 3, "--json")
    result = run(*arguments)
    document = json.loads(result.stdout)
    assert [p["path"] for p in document["predictions"]] == [PATHS[2], *PATHS[:2]]
    assert document["images"] == 3 and document["unreadable"] == [] and document["class_names"] is False
    for p in document["predictions"]:
        assert len(set(p["classes"])) == 3 and set(p["classes"]) <= set(map(str, range(10)))
        assert p["probabilities"] == sorted(p["probabilities"], reverse=True) and 0 < sum(p["probabilities"]) <= 1
    assert "left out of photos: 1 .txt" in result.stderr
    assert result.stderr.count("the model names no classes") == 1
    (same,) = (json.loads(run(*arguments, *more).stdout) for more in [("--workers", 2, "--batch-size", 2)])
    for one, other in zip(document["predictions"], same["predictions"], strict=True):
        assert (one["path"], one["classes"]) == (other["path"], other["classes"])
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)


def test_csv_is_what_json_is(run: Run, named: str, photos: Path) -> None:
    result = run("predict", named, "photos", "--top", 10, "--csv", "out.csv", "--json")
    document = json.loads(result.stdout)
    with Path("out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == PATHS and "wrote out.csv: 3 images" in result.stderr
    assert document["class_names"] is True and "names no classes" not in result.stderr
    for row, p in zip(rows, document["predictions"], strict=True):
        assert list(row)[:4] == ["path", "class_1", "probability_1", "class_2"] and len(row) == 21
        assert [row[f"class_{k}"] for k in range(1, 11)] == p["classes"]
        assert [float(row[f"probability_{k}"]) for k in range(1, 11)] == p["probabilities"]
        assert "cat" in p["classes"] and "[red]dog\x1b[31m" in p["classes"]


def test_the_table_has_names_and_nothing_that_garbles_a_terminal(run: Run, named: str, photos: Path) -> None:
    words = run("predict", named, "photos", "--top", 10).stdout
    assert "3 images in photos/" in words and "sub/d.png" in words and "cat" in words
    assert "[red]dog\\x1b[31m" in words and "\x1b" not in words
    one = run("predict", named, "photos/a.png").stdout
    assert "1 image\n" in one and "photos/a.png" in one and one.count("%") == 1


def test_unreadable_images_are_named_and_the_others_predicted(run: Run, model: str, photos: Path) -> None:
    (photos / "b0.png").write_bytes(b"no image")
    (photos / "b1.png").symlink_to("nowhere.png")
    result = run("predict", model, "photos", "--csv", "out.csv", "--json", code=1)
    assert "photos/b0.png: not a readable image (its content is in no image format" in result.stderr
    assert "photos/b1.png: not a readable image (No such file or directory)" in result.stderr
    assert "2 of 5 images left out" in result.stderr
    document = json.loads(result.stdout)
    assert [p["path"] for p in document["predictions"]] == PATHS
    assert [p["path"] for p in document["unreadable"]] == ["photos/b0.png", "photos/b1.png"]
    assert len(Path("out.csv").read_text().splitlines()) == 4
    accepted = run("predict", model, "photos", "--skip-corrupt")
    assert "photos/b0.png: not a readable image" in accepted.stderr
    lost = run("predict", model, "photos/b0.png", "--csv", "none.csv", "--skip-corrupt", code=1)
    assert lost.stderr.splitlines()[-1] == "error: no image could be read" and not Path("none.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("nope.png",), 2, "there is no such image or folder"),
        (("*.gif",), 2, "nothing fits this pattern"),
        (("empty",), 1, "there is no image to read: empty holds no images"),
        ((), 2, "predict needs images"),
        (("photos", "--top", "11"), 2, "--top 11: the model tells 10 classes apart"),
        (("photos", "--csv", "none/out.csv"), 2, "--csv"),
        (("photos", "--csv", "photos"), 2, "--csv"),
        (("photos", "--csv", "photos/a.png"), 2, "name another file"),
        (("photos", "--csv", "m.safetensors"), 2, "name another file"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...], code: int, says: str, run: Run, model: str, photos: Path
) -> None:
    Path("empty").mkdir()
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    last = run("predict", model, *arguments, code=code).stderr.splitlines()[-1]
    assert last.startswith("error: ") and says in last
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_a_run_folder_gets_its_hint(run: Run, model: str, photos: Path) -> None:
    Path("run").mkdir()
    Path(model).rename("run/best.safetensors")
    assert "did you mean run/best.safetensors?" in run("predict", "run", "photos", code=2).stderr


def test_a_recipe_may_name_the_images(run: Run, model: str, photos: Path) -> None:
    Path("r.toml").write_text('[predict]\nimages = ["photos/a.png", "photos/sub"]\ntop = 2\n')
    document = json.loads(run("predict", model, "--recipe", "r.toml", "--json").stdout)
    assert [(p["path"], len(p["classes"])) for p in document["predictions"]] == [(PATHS[0], 2), (PATHS[2], 2)]


def test_help_says_what_unreadable_images_do_to_the_exit_code(run: Run) -> None:
    words = " ".join(run("predict", "--help").stdout.split())
    assert "The exit code is 1 where an image could not be read; all others are predicted." in words
    assert "predict" in run("--help").stdout


def test_long_paths_are_shortened_from_the_left_and_tables_beside_a_file_are_short() -> None:
    paths = [f"far/{'x' * 90}/{i}.png" for i in range(12)] + [f"far/{i}.png" for i in range(20)]
    table = prediction_table([Prediction(path, ("a",), (0.5,)) for path in paths], rows=10)
    shown = [str(cell) for cell in table.columns[0].cells]
    assert len(shown) == 10 and len(shown[0]) == 60 and shown[0].startswith("…x") and shown[0].endswith("x/0.png")
    assert (table.title, table.caption) == ("32 images in far/", "the first 10 of 32")


@pytest.mark.parametrize("path", ["a\nb.png", "a\rb.png", 'a"b".png', " a;b\t.png", "a\udcffb.png"])
def test_any_path_comes_back_from_a_csv(path: str, tmp_path: Path) -> None:
    text = predictions_csv([Prediction(path, ("é, \n", "b"), (0.75, 1 / 3))])
    (tmp_path / "p.csv").write_bytes(text.encode(errors="surrogateescape"))
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        (row,) = csv.DictReader(file)
    assert row["path"] == path and row["class_1"] == "é, \n" and float(row["probability_2"]) == 1 / 3


def test_a_table_says_how_many_more_labels_an_image_has():
    names, chances = tuple(f"c{k}" for k in range(30)), (0.9,) * 30
    found = [Prediction("a.png", names, chances), Prediction("b.png", names[:2], chances[:2])]
    cut, whole = (prediction_table(found, labels=labels) for labels in (20, None))
    assert (cut.row_count, whole.row_count) == (23, 32)
    assert [*cut.columns[1].cells][20] == "and 10 more" and [*whole.columns[1].cells][29] == "c29"
