"""--drop-path and --dropout: on where a network has such layers, exact under every adjoint, and else refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import run

from resode_cli.app import main
from resode_cli.files import model_file

TIMM = """
from timm.models.resnet import BasicBlock, ResNet
def small(num_classes=10):
    return ResNet(BasicBlock, [2, 2, 2, 2], channels=(8, 8, 16, 16), num_classes=num_classes)
"""
CONVERT = ["--input-size", "32", "--num-classes", "10"]


@pytest.fixture
def timms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(TIMM)
    assert main(["convert", "net.py:small", "--no-pretrained", *CONVERT, "-o", "m.safetensors"]) == 0
    return tmp_path


def same(one: str, other: str) -> bool:
    a, b = (load_file(f"{name}/last.safetensors") for name in (one, other))
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize("more", [["--drop-path", "0.5"], ["--dropout", "0.5"]])
def test_each_changes_what_is_learned_and_resumes_to_the_bit(more: list[str], timms: Path) -> None:
    alike = ["--schedule", "constant", "--adjoint", "checkpoint"]
    for name, options, steps in (("plain", [], 2), ("whole", more, 2), ("parts", more, 1)):
        assert main(run("-o", name, *alike, *options, steps=steps)) == 0
    assert main(run("-o", "parts", "--adjoint", "checkpoint", "--resume", steps=2)) == 0
    assert same("whole", "parts") and not same("whole", "plain")
    loaded = model_file.load("whole/best.safetensors", trust_source=True)
    assert not any(type(module).__name__ == "DropPath" for module in loaded.modules()), "a model file has none"


def test_checkpoint_drops_the_same_paths_as_backprop(timms: Path) -> None:
    for name in ("backprop", "checkpoint"):
        assert main(run("-o", name, "--drop-path", "0.5", "--adjoint", name, steps=2)) == 0
    one, other = (load_file(f"{name}/last.safetensors") for name in ("backprop", "checkpoint"))
    assert all(torch.allclose(value.float(), other[key].float(), rtol=1e-4, atol=1e-6) for key, value in one.items())


def test_a_dry_run_has_them_too(timms: Path) -> None:
    assert main(run("-o", "dry", "--drop-path", "0.5", "--dropout", "0.5", "--dry-run", steps=1)) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--drop-path", "0.1"], "--drop-path: the blocks of this network have no drop path"),
        (["--dropout", "0.1"], "--dropout: this network has no dropout before its head"),
        (["--dropout", "1"], "--dropout 1: must be"),
    ],
)
def test_a_network_without_such_layers_is_refused(more: list[str], message: str, here: Path, capsys: Any) -> None:
    assert main(run("-o", "new", *more)) == 2
    assert message in capsys.readouterr().err


def test_blocks_in_pre_form_take_no_new_layers(timms: Path, capsys: Any) -> None:
    pre = ["--form", "pre", "-o", "pre.safetensors"]
    assert main(["convert", "net.py:small", "--no-pretrained", *CONVERT, *pre]) == 0
    assert main(run("-o", "new", "--drop-path", "0.5", model="pre.safetensors")) == 2
    assert "in form 'pre' cannot take" in capsys.readouterr().err
