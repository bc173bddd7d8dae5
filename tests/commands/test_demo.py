"""The demo runs the commands that it prints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from resode_cli.app import main
from resode_cli.commands import demo
from resode_cli.files import model_file


@pytest.fixture
def short(monkeypatch: Any) -> None:
    steps = [
        (name, what, command.replace("--max-steps 88 --eval-every 4", "--max-steps 1 --test-images 20"))
        for name, what, command in demo.COMMANDS
    ]
    monkeypatch.setattr(demo, "COMMANDS", tuple(steps))


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_what_it_prints_gives_its_files_when_pasted(
    tmp_path: Path, monkeypatch: Any, capsys: Any, assert_ran_by: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "-o", "shown"]) == 0
    shown = capsys.readouterr().out
    commands = [line.removeprefix("$ resode ").split() for line in shown.splitlines() if line.startswith("$ resode ")]
    assert len(commands) == len(demo.COMMANDS)
    for method in ("pc", "backprop"):
        assert_ran_by(tmp_path / "shown" / f"run-{method}", method)
    last = " ".join(shown.splitlines()[-3:])
    assert re.search(r"by pc: \d+\.\d%, by backprop: \d+\.\d% of 20 test digits .* \d+ times less", last)
    assert main(["demo", "-o", "shown"]) == 2
    assert "--force" in capsys.readouterr().err
    pasted = tmp_path / "pasted"
    pasted.mkdir()
    (pasted / demo.NETWORK).write_bytes((tmp_path / "shown" / demo.NETWORK).read_bytes())
    monkeypatch.chdir(pasted)
    for command in commands:
        if command[0] in ("convert", "recalibrate", "deepen") or command[-1] == "run-pc":
            assert main(command) == 0, command
    capsys.readouterr()
    for name in ("net.safetensors", "deep.safetensors", "run-pc/last.safetensors"):
        a, b = (model_file.load(folder / name) for folder in (tmp_path / "shown", pasted))
        state = b.state_dict()
        assert all((value == state[key]).all() for key, value in a.state_dict().items())
