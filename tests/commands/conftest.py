"""A command as a user runs it, in a folder with a small network."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from resode_cli.app import main

NETWORK = """
from resode_cli.sources.cifar import CifarResNet
def small(num_classes=10):
    return CifarResNet(2, widths=(4, 8, 8), num_classes=num_classes)
def broken():
    raise RuntimeError("no such luck")
def plain():
    from torch import nn
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
def partly():
    from torch import nn
    class Step(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)
    class Writes(nn.Sequential):
        def forward(self, x):
            return x.relu_() + super().forward(x)
    layers = [Step(nn.Linear(12, 12)), Writes(nn.Linear(12, 12)), Writes(nn.Linear(12, 12))]
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 12), *layers, nn.Linear(12, 10))
"""

LOADS = ("info", "eval", "predict", "export", "check-grad", "finetune", "deepen", "tie", "untie", "recalibrate")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `resode` in an empty folder; the exit code is checked, and that there is no traceback.

    In this process: importing torch anew would take longer than most commands. `test_demo.py` starts processes.
    """
    (tmp_path / "net.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def command(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        # The models are made by the net.py above, whose code these commands have to be told to trust.
        trust = ["--trust-source"] if arguments and arguments[0] in LOADS and "--source" not in arguments else []
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            found = main([*map(str, arguments), *trust])
        result = subprocess.CompletedProcess([], found, out.getvalue(), err.getvalue())
        assert found == code, result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        return result

    return command


@pytest.fixture(scope="session")
def converted() -> dict[str, bytes]:
    """The files that `convert` has written, which are the same in every folder."""
    return {}


@pytest.fixture
def model(run: Run, converted: dict[str, bytes]) -> str:
    name = "m.safetensors"
    if not converted:
        run("convert", "net.py:small", "--no-pretrained", "--input-size", 8, "-o", name)
        converted |= {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    for file, content in converted.items():
        Path(file).write_bytes(content)
    return name
