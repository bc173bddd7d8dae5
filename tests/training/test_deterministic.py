"""--deterministic: that it reaches torch for the whole run, is recorded and put back, and what it refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import run

from resode_cli.app import main
from resode_cli.errors import ResodeError
from resode_cli.machine.deterministic import CUBLAS, deterministic
from resode_cli.training import best, starting
from resode_cli.training.objective import Objective
from resode_cli.training.run_folder import load_state

Flags = tuple[bool, bool, bool]


def flags() -> Flags:
    algorithms, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    return algorithms, warns, torch.backends.cudnn.benchmark


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> Iterator[Flags]:
    """The flags of a process that has chosen others than torch's own."""
    monkeypatch.delenv(CUBLAS, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield flags()
    os.environ.pop(CUBLAS, None)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Flags]:
    """The flags in a step, an evaluation, and where a plan is made."""
    found: dict[str, Flags] = {}

    def watched(where: str, function: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            found[where] = flags()
            return function(*args, **more)

        return call

    monkeypatch.setattr(Objective, "__call__", watched("step", Objective.__call__))
    monkeypatch.setattr(best.Evaluations, "_evaluate", watched("evaluation", best.Evaluations._evaluate))
    return found


def test_a_run_is_deterministic_and_what_was_before_is_put_back(before: Flags, seen: Any, here: Path) -> None:
    assert main(run("-o", "new", "--deterministic")) == 0
    assert seen == {"step": (True, False, False), "evaluation": (True, False, False)} and flags() == before
    assert load_state(here / "new").settings["deterministic"] is True
    assert "deterministic = true" in (here / "new" / "config.toml").read_text()
    seen.clear()
    assert main(run("-o", "new", "--resume", steps=4)) == 0
    assert seen["step"] == (True, False, False) and flags() == before
    assert main(run("-o", "plain")) == 0
    assert seen["step"] == before, "and without the option torch is left alone"


@pytest.mark.parametrize("look", [["--find-lr", "--max-steps", "20"], ["--dry-run", "--adjoint", "auto"]])
def test_so_is_a_look_at_one(look: list[str], before: Flags, here: Path, monkeypatch: Any) -> None:
    found = []
    choice_batch = starting.choice_batch
    monkeypatch.setattr(starting, "choice_batch", lambda *args: (found.append(flags()), choice_batch(*args))[1])
    assert main([*run("-o", "new", "--deterministic", *look), "--adjoint", "auto"]) == 0
    assert found == [(True, False, False)] and flags() == before


def test_a_kernel_without_a_deterministic_version_is_one_line(before: Flags, here: Path, monkeypatch: Any, capsys: Any):
    objective = Objective.__call__

    def puts(self: Any, images: Any, labels: Any) -> Any:
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))
        return objective(self, images, labels)

    monkeypatch.setattr(Objective, "__call__", puts)
    assert main(run("-o", "new", "--deterministic")) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith(
        "error: --deterministic: torch has no deterministic version of put_ on cpu; leave it out"
    )
    assert flags() == before


def test_another_error_stays_what_it_is(before: Flags) -> None:
    with pytest.raises(RuntimeError, match="something else"), deterministic(True, torch.device("cpu")):
        raise RuntimeError("something else")
    assert flags() == before


def test_cublas_is_told_before_cuda_starts_or_it_is_refused(before: Flags, monkeypatch: Any) -> None:
    gpu = torch.device("cuda")
    with deterministic(False, gpu):
        assert CUBLAS not in os.environ
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        with pytest.raises(ResodeError, match=f"CUDA has started, and takes {CUBLAS} no more; set it to :4096:8"):
            deterministic(True, gpu).__enter__()
        assert flags() == before
    with deterministic(True, gpu):
        assert os.environ[CUBLAS] == ":4096:8"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with deterministic(True, gpu):
        assert flags() == (True, False, False), "since cuBLAS was told in time"
