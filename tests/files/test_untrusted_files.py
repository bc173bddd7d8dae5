"""A file of somebody else's never runs code: not a model file, not a run's folder, not a recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import resode_cli
from resode_cli.app import main
from resode_cli.errors import ResodeError

pytestmark = pytest.mark.untrusted

TRAP = """
from pathlib import Path
Path(__file__).with_name("sprung").touch()
from resode_cli.sources.cifar import CifarResNet
def small(num_classes=10):
    return CifarResNet(1, widths=(2, 4, 4), num_classes=num_classes)
"""
SMALL = ["--no-pretrained", "--input-size", "8"]
TRAIN = ["--data", "digits", "--images", "8", "--test-images", "4", "--batch-size", "4", "--adjoint", "backprop"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model files and a run whose network is built by net.py, which leaves the file `sprung` when it runs."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("net.py").write_text(TRAP)
        assert main(["convert", "net.py:small", *SMALL, "-o", "m.safetensors"]) == 0
        assert main(["finetune", "m.safetensors", "--trust-source", *TRAIN, "--max-steps", "2", "-o", "run"]) == 0
        assert main(["convert", "cifar:resnet20", *SMALL, "--num-classes", "10", "-o", "own.safetensors"]) == 0
        Path("sprung").unlink()
    return folder


@pytest.fixture
def trap(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them, where one stands."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


WAYS = {
    "info": ["info", "m.safetensors"],
    "eval": ["eval", "m.safetensors", "--data", "digits", "--images", "4"],
    "predict": ["predict", "m.safetensors", "one.png"],
    "export": ["export", "m.safetensors", "-o", "out.safetensors"],
    "check-grad": ["check-grad", "m.safetensors", "--images", "2", "--adjoint", "checkpoint"],
    "bench": ["bench", "m.safetensors", "--batch-size", "2", "--repeats", "1", "--adjoint", "checkpoint"],
    "tie": ["tie", "m.safetensors", "-o", "out.safetensors"],
    "untie": ["untie", "m.safetensors", "-o", "out.safetensors"],
    "deepen": ["deepen", "m.safetensors", "--blocks", "2", "-o", "out.safetensors"],
    "recalibrate": ["recalibrate", "m.safetensors", "--data", "digits", "--images", "8", "-o", "out.safetensors"],
    "finetune": ["finetune", "m.safetensors", *TRAIN, "--max-steps", "1", "-o", "other"],
    "finetune --resume": ["finetune", "m.safetensors", *TRAIN, "--max-steps", "3", "-o", "run", "--resume"],
    "finetune --teacher": [
        *("finetune", "own.safetensors", *TRAIN, "--max-steps", "1", "-o", "other"),
        *("--teacher", "m.safetensors"),
    ],
    "deepen --teacher": [
        *("deepen", "own.safetensors", "--blocks", "3", "--fit", "digits", "--fit-images", "20", "--fit-steps", "1"),
        *("--fit-phases", "logits", "--fit-batch-size", "4", "-o", "out.safetensors", "--teacher", "m.safetensors"),
    ],
    "a model of the run": ["info", "run/last.safetensors"],
}
LONG = {"bench"}  # measures in fresh processes; the refusal alone is tried


def test_every_command_that_reads_a_model_is_tried() -> None:
    from resode_cli.app import app

    reads = {c.name for c in app.registered_commands if c.callback and "source" in c.callback.__annotations__}
    assert reads - {"convert", "report"} == {arguments[0] for arguments in WAYS.values()}


@pytest.mark.parametrize("way", WAYS)
def test_code_that_a_file_names_is_refused_and_named(way: str, trap: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in trap.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(WAYS[way]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"function small of {trap / 'net.py'}, which a model file must not run" in error
    assert "--source net.py:small or --trust-source" in error
    assert {path: path.read_bytes() for path in trap.rglob("*") if path.is_file()} == before, "something was written"


@pytest.mark.parametrize("way", [way for way in WAYS if way not in LONG])
def test_the_same_runs_once_the_user_trusts_it(way: str, trap: Path) -> None:
    assert main([*WAYS[way], "--trust-source"]) == 0
    assert (trap / "sprung").exists()


def test_code_that_the_user_names_is_run_and_no_other(trap: Path) -> None:
    (trap / "mine").mkdir()
    (trap / "mine" / "net.py").write_text(TRAP)
    assert main(["info", "m.safetensors", "--source", "mine/net.py:small"]) == 0
    assert (trap / "mine" / "sprung").exists() and not (trap / "sprung").exists()


def test_a_run_whose_source_has_moved_is_resumed_with_the_new_one(trap: Path) -> None:
    (trap / "net.py").rename(trap / "new.py")
    assert main([*WAYS["finetune --resume"], "--source", "new.py:small"]) == 0


def test_a_report_leaves_out_what_it_would_take_code_to_know(trap: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "run"]) == 0
    assert "which a model file must not run" in capsys.readouterr().err
    assert "which a model file must not run" in (trap / "run" / "report.html").read_text()
    assert not (trap / "sprung").exists()
    assert main(["report", "run", "--trust-source"]) == 0
    assert (trap / "sprung").exists()
    assert "must not run" not in (trap / "run" / "report.html").read_text()


def test_nothing_is_searched_beside_the_file(trap: Path) -> None:
    """The named file is gone; one of its name lies beside the model, as in an archive that was sent."""
    sent = trap / "sent"
    sent.mkdir()
    (trap / "net.py").rename(sent / "net.py")
    (trap / "m.safetensors").rename(sent / "m.safetensors")
    assert main(["info", "sent/m.safetensors"]) == 1
    assert main(["info", "sent/m.safetensors", "--trust-source"]) == 1
    assert not list(trap.rglob("sprung"))


def test_from_python_too(trap: Path) -> None:
    with pytest.raises(ResodeError, match="trust_source=True"):
        resode_cli.load("m.safetensors")
    assert not (trap / "sprung").exists()
    resode_cli.load("m.safetensors", trust_source=True)
    assert (trap / "sprung").exists()


@pytest.mark.parametrize("table", ["convert", "eval"])
def test_a_recipe_names_no_code(table: str, trap: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.toml").write_text(f'[{table}]\nsource = "net.py:small"\n')
    assert main([table, *(["m.safetensors"] if table == "eval" else []), "--recipe", "r.toml"]) == 2
    assert "recipe r.toml: source = 'net.py:small': a recipe must not name code" in capsys.readouterr().err
    assert not (trap / "sprung").exists()


@pytest.mark.parametrize("key", ["trust-source", "trust_source"])
def test_a_recipe_trusts_nothing(key: str, trap: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.toml").write_text(f"[eval]\ndata = 'digits'\n{key} = true\n")
    assert main(["eval", "m.safetensors", "--recipe", "r.toml"]) == 2
    assert f"unknown key of [eval] in recipe r.toml '{key}'" in capsys.readouterr().err
    assert not (trap / "sprung").exists()


@pytest.mark.parametrize("library", ["os", "__import__", "resode_cli.data.digits", "module", "hf-hub", "local-dir", ""])
def test_no_other_library_of_a_file_builds_anything(library: str, trap: Path) -> None:
    with safe_open("m.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = json.loads(file.metadata()["resode"])
    metadata["source"]["library"] = library
    save_file(tensors, "m.safetensors", metadata={"resode": json.dumps(metadata)})
    for trust in (False, True):
        with pytest.raises(ResodeError):
            resode_cli.load("m.safetensors", trust_source=trust)
    assert not (trap / "sprung").exists()
