"""What a rewrite claims: noise shows that a function is kept, never how good a changed one is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from resode_cli.app import main
from resode_cli.files import model_file
from resode_cli.network.model import OdeResNet

CHANGES = {
    "deepen": ["deepen", "M", "--blocks", "6", "-o", "OUT"],
    "tie": ["tie", "M", "-o", "OUT"],
    "convert --form pre": ["convert", "cifar:resnet20", "--no-pretrained", "--form", "pre", "-o", "OUT"],
    "convert --scheme heun": ["convert", "cifar:resnet20", "--no-pretrained", "--scheme", "heun", "-o", "OUT"],
}
KEEPS = {
    "untie": ["untie", "M", "-o", "OUT"],
    "deepen by identity": ["deepen", "M", "--blocks", "6", "--mode", "identity", "-o", "OUT"],
    "convert": ["convert", "cifar:resnet20", "--no-pretrained", "-o", "OUT"],
}


def said(arguments: list[str], pico: OdeResNet, folder: Path, capsys: Any) -> str:
    model_file.save(pico, folder / "m.safetensors")
    names = {"M": str(folder / "m.safetensors"), "OUT": str(folder / "out.safetensors")}
    assert main([names.get(a, a) for a in arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_function_is_not_verified_by_noise(kind: str, pico: OdeResNet, tmp_path: Path, capsys: Any) -> None:
    out = said(CHANGES[kind], pico, tmp_path, capsys)
    assert "nothing is known of its accuracy" in out
    assert "verified" not in out and "agreement" not in out
    if kind in ("deepen", "tie"):
        assert "measure it with --data DATA, and mend it: `resode " in out
    assert main(["info", str(tmp_path / "out.safetensors")]) == 0
    assert "verified" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", KEEPS)
def test_a_kept_function_is(kind: str, pico: OdeResNet, tmp_path: Path, capsys: Any) -> None:
    assert "verified on 4 random images" in said(KEEPS[kind], pico, tmp_path, capsys)


@pytest.mark.parametrize("command", ["tie", "untie"])
def test_a_rewrite_that_changes_nothing_says_so(command: str, pico: OdeResNet, tmp_path: Path, capsys: Any) -> None:
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    model_file.save(pico, tmp_path / "m.safetensors")
    for before, after in ((tmp_path / "m.safetensors", once), (once, twice)):
        assert main([command, str(before), "-o", str(after)]) == 0
        said = capsys.readouterr().err
        assert (f"nothing to {command}: " in said) == (after == twice or command == "untie")
