"""`resode report`: of runs that are over, stopped, in progress and damaged, with their images and without."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from resode_cli.app import main
from resode_cli.reports.html.page import BEGINNING
from resode_cli.training import finetune

Run = Callable[..., subprocess.CompletedProcess[str]]
SHORT = ("--images", 24, "--test-images", 12, "--batch-size", 8, "--max-steps", 3, "--log-every", 1)
NETWORK = """
from resode_cli.sources.cifar import CifarResNet
def small(num_classes=10):
    return CifarResNet(2, widths=(4, 8, 8), num_classes=num_classes)
"""
EVIL = "<img src=x onerror=alert(1)>"


def tree(path: str | Path) -> ElementTree.Element:
    return ElementTree.fromstring(Path(path).read_text(encoding="utf-8").removeprefix(BEGINNING))


def headings(path: str | Path) -> list[str]:
    return ["".join(each.itertext()) for each in tree(path).iter("h2")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a finished run of it."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("net.py").write_text(NETWORK)
        assert main(["convert", "net.py:small", "--no-pretrained", "--input-size", "8", "-o", "m.safetensors"]) == 0
        assert main(["finetune", "m.safetensors", "--trust-source", "--data", "digits", *map(str, SHORT)]) == 0
    return folder


@pytest.fixture
def trained(run: Run, made: Path, tmp_path: Path) -> str:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return "runs/m-1"


@pytest.fixture
def report(run: Run) -> Run:
    """The command, with leave to run the code that made the model."""
    return lambda *arguments, code=0: run("report", *arguments, "--trust-source", code=code)


def test_the_page_of_this_folders_last_run(report: Run, trained: str) -> None:
    said = report()
    assert "from resode.toml: run runs/m-1" in said.stderr and "wrote runs/m-1/report.html" in said.stdout
    assert headings("runs/m-1/report.html") == [
        "Figures",
        "Curves",
        "Backward pass: m-1",
        "On images: m-1",
        "Settings and origin: m-1",
    ]
    text = Path("runs/m-1/report.html").read_text()
    assert "The best model on 12 images of digits, test, which chose the best model" in text
    assert "backprop would hold" in text and "predicted peak of a step" in text  # what auto chose
    report()  # a page of ours is replaced


def test_the_figures_are_those_of_the_run(report: Run, run: Run, trained: str) -> None:
    (about,) = json.loads(report(trained, "--json").stdout)["runs"]
    assert (about["standing"], about["step"], about["total_steps"]) == ("finished", 3, 3)
    assert about["images"]["top1"] == pytest.approx(about["best_top1"])
    known = json.loads(run("eval", f"{trained}/best.safetensors", "--data", "digits", "--images", 12, "--json").stdout)
    for name in ("top1", "top5", "loss", "images"):
        assert about["images"][name] == pytest.approx(known[name])
    assert sum(each["images"] for each in about["images"]["classes"]) == 12


def test_other_images_may_be_asked_for(report: Run, trained: str, make_folder: Any) -> None:
    (about,) = json.loads(report(trained, "--split", "train", "--images", 30, "--json").stdout)["runs"]
    assert about["images"]["images"] == 30 and about["images"]["data"] == "digits, train"
    folder = make_folder(classes=[str(i) for i in range(10)], size=8, each=1)
    (about,) = json.loads(report(trained, "--data", folder, "--mistakes", 2, "--json").stdout)["runs"]
    assert about["images"]["images"] == 10
    assert len(list(tree(f"{trained}/report.html").iter("img"))) == 2


def test_names_of_classes_are_text(report: Run, run: Run, trained: str, make_folder: Any) -> None:
    folder = make_folder(classes=(EVIL, "b & c"), size=8, each=4)
    run("finetune", "m.safetensors", "--new-head", "--data", folder, *SHORT)
    report()
    assert EVIL not in Path("runs/m-2/report.html").read_text()
    pictures = list(tree("runs/m-2/report.html").iter("img"))
    assert pictures and all(each.get("src", "").startswith("data:image/png;base64,") for each in pictures)
    assert any(EVIL in each.get("alt", "") for each in pictures)


def test_without_images(report: Run, trained: str) -> None:
    report(trained, "--no-images")
    assert "On images: m-1" not in headings(f"{trained}/report.html")
    for flags in (("--data", "digits"), ("--split", "test"), ("--mistakes", 3), ("--images", 4)):
        assert f"{flags[0]} is of the images" in report(trained, "--no-images", *flags, code=2).stderr


def test_data_that_are_gone_leave_the_curves(report: Run, run: Run, trained: str, make_folder: Any) -> None:
    folder = make_folder(classes=[str(i) for i in range(10)], size=8)
    run("finetune", "m.safetensors", "--data", folder, *SHORT)
    shutil.rmtree(folder)
    said = report("runs/m-2").stderr
    assert "m-2: the images are left out: " in said and "is not to be found from here" in said
    assert "the images are left out" in Path("runs/m-2/report.html").read_text()
    assert "does not exist" in report("runs/m-2", "--data", folder, code=2).stderr  # which the user names


def test_code_is_not_run_without_leave(
    run: Run, trained: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    from resode_cli.files import model_file

    def refuse(*_: Any, **__: Any) -> str:
        from resode_cli.errors import ResodeError

        raise ResodeError("--trust-source runs it")

    monkeypatch.setattr(model_file, "origin_of", refuse)
    assert "the images are left out: " in run("report", trained).stderr


def test_a_run_in_progress(report: Run, trained: str) -> None:
    """Before its first save there is the log alone, whose last row is half written."""
    folder = Path(trained)
    (folder / ".resode.lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    for name in ("state", "best", "last"):
        (folder / f"{name}.safetensors").unlink()
    lines = (folder / "log.csv").read_text().splitlines()
    (folder / "log.csv").write_text("\n".join([*lines[:3], lines[3][:9]]))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    said = report(trained, "--json")
    (about,) = json.loads(said.stdout)["runs"]
    assert (about["standing"], about["step"], about["images"]) == ("in progress", 1, None)
    assert "nothing is saved yet" in said.stderr
    assert "No model is saved yet." in (folder / "report.html").read_text()
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.html"} == before


def test_a_run_that_was_stopped(report: Run, run: Run, trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, peak_bytes = [0], finetune.peak_bytes  # type: ignore[attr-defined]

    def stopped(*arguments: Any) -> int:
        asked[0] += 1
        if asked[0] == 2:
            signal.raise_signal(signal.SIGTERM)
        return peak_bytes(*arguments)

    monkeypatch.setattr(finetune, "peak_bytes", stopped)
    run("finetune", "m.safetensors", "--data", "digits", *SHORT, "--max-steps", 9, "--epochs", 3, "-o", "r", code=143)
    (about,) = json.loads(report("r", "--json").stdout)["runs"]
    assert (about["standing"], about["step"], about["total_steps"]) == ("stopped", 2, 9)
    # No evaluation came after the first, so the best model is the one that the run began with.
    assert about["images"]["top1"] == pytest.approx(about["best_top1"])
    assert "The best model on 12 images" in Path("r/report.html").read_text()


def test_a_run_that_patience_ended_is_called_so(report: Run, run: Run, trained: str) -> None:
    epochs = ("--max-steps", 9, "--epochs", 9, "--patience", 1, "--lr", 1e-9)
    run("finetune", "m.safetensors", "--data", "digits", *SHORT, *epochs, "-o", "r")
    (about,) = json.loads(report("r", "--json").stdout)["runs"]
    assert about["standing"] == "ended by --patience" and about["step"] < about["total_steps"]
    assert "ended by --patience" in Path("r/report.html").read_text()


def test_damaged_files_are_named_and_the_rest_is_shown(report: Run, trained: str) -> None:
    (Path(trained) / "state.safetensors").write_bytes(b"none")
    said = report(trained)
    assert "state.safetensors: not a safetensors file" in said.stderr
    assert "Curves" in headings(f"{trained}/report.html")


def test_several_runs(report: Run, run: Run, trained: str) -> None:
    run("finetune", "m.safetensors", "--data", "digits", *SHORT, "--lr", 0.5, "--clip-grad", 1)
    report(trained, "runs/m-2", "--no-images")
    text = Path("report.html").read_text()
    assert "2 training runs: m-1, m-2" in text
    (found,) = [t for t in tree("report.html").iter("table") if "asked" in (t.findtext("caption") or "")]
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in found.findall("tbody/tr")}
    assert rows == {"lr": ["0.001", "0.5"], "clip-grad": ["–", "1"]}
    legends = ["".join(each.itertext()) for each in tree("report.html").iter("li")]
    assert any(each.startswith("m-2, held out: ") for each in legends)


def test_wrong_arguments(report: Run, run: Run, trained: str) -> None:
    assert "nowhere does not exist" in report("nowhere", code=2).stderr
    Path("empty").mkdir()
    assert "empty holds no run" in report("empty", code=2).stderr
    Path("mine").mkdir()
    Path("mine/log.csv").write_text("my,data\n")
    assert "mine/log.csv is not the log of a run" in report("mine", code=2).stderr
    assert "unknown split" in report(trained, "--split", "tset", code=2).stderr
    Path("page.html").write_text("mine")
    assert "page.html exists; pass --force" in report(trained, "--no-images", "-o", "page.html", code=1).stderr
    report(trained, "--no-images", "-o", "page.html", "--force")
    Path("resode.toml").unlink()
    assert "report needs RUN" in report(code=2).stderr


def test_a_file_of_the_run_stands_for_it(report: Run, trained: str) -> None:
    report(f"{trained}/best.safetensors", "--no-images")
    assert Path(trained, "report.html").is_file()
