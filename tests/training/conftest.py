"""A tiny network and a finished run of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_runs import NET, SMALL, run

from resode_cli.app import main


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, another one of the same shapes, and a finished run of three steps."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("net.py").write_text(NET)
        for seed, name in ((0, "m"), (1, "other")):
            assert main(["convert", "net.py:small", *SMALL, "--seed", str(seed), "-o", f"{name}.safetensors"]) == 0
        assert main(run("-o", "run")) == 0
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
