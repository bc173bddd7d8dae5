"""A run's files are safe: from --force, numbers that are none, settings that changed, two writers, and signals."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import contents, run
from torch import nn

from resode_cli.app import main
from resode_cli.commands import interrupt
from resode_cli.commands.interrupt import stop
from resode_cli.files import model_file
from resode_cli.machine.locks import FolderLock
from resode_cli.network.model import non_finite
from resode_cli.training import best, finetune, results
from resode_cli.training.objective import Objective
from resode_cli.training.run_folder import load_state

# --force

FAILURES = {
    "a device that is not there": ["--device", "cuda:99"],
    "a model that is not there": ["none.safetensors"],
    "a teacher that is not there": ["--teacher", "none.safetensors"],
    "data that are not there": ["--data", "/nowhere/at/all"],
    "an unknown optimizer": ["--optimizer", "sdg"],
    "a rate at which it breaks": ["--lr", "1e38"],
    "an unknown stage": ["--stage", "layer9"],
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_run_that_fails_replaces_nothing(kind: str, here: Path) -> None:
    before = contents(here / "run")
    more = FAILURES[kind]
    arguments = run("-o", "run", "--force", *more)
    if more[0].endswith(".safetensors"):
        arguments = run("-o", "run", "--force", model=more[0])
    assert main(arguments) in (1, 2)
    assert contents(here / "run") == before


def test_without_force_a_run_is_kept_and_a_lone_log_is_none(here: Path, capsys: Any) -> None:
    assert main(run("-o", "run")) == 1
    assert "--resume to go on with it, or --force to replace it" in capsys.readouterr().err
    for name in ("state", "best", "last"):
        (here / "run" / f"{name}.safetensors").unlink()
    assert main(run("-o", "run")) == 0


# Numbers that are none.


class _Burst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * math.nan


def burst_at(step: int, monkeypatch: pytest.MonkeyPatch, *, last: int | None = None) -> None:
    """NaN gradients under a finite loss, in the given steps."""
    count = [0]
    ordinary = Objective.__call__

    def call(self: Any, *arguments: Any) -> Any:
        count[0] += 1
        loss, logits = ordinary(self, *arguments)
        return (_Burst.apply(loss) if step <= count[0] <= (last or step) else loss), logits

    monkeypatch.setattr(Objective, "__call__", call)


def test_a_gradient_that_is_no_number_is_not_stepped(here: Path, monkeypatch: Any, capsys: Any) -> None:
    burst_at(3, monkeypatch)
    assert main(run("-o", "new", "--save-every", "1")) == 1
    error = capsys.readouterr().err
    assert "a gradient is nan (loss " in error and "at step 3" in error and "--on-nonfinite skip" in error
    state = load_state(here / "new")
    assert state.progress["step"] == 2 and not non_finite(state.model.state_dict())
    assert main(run("-o", "new", "--resume")) == 0


def test_such_steps_may_be_skipped_and_are_counted(here: Path, monkeypatch: Any, capsys: Any) -> None:
    burst_at(2, monkeypatch)
    assert main(run("-o", "new", "--on-nonfinite", "skip")) == 0
    error = capsys.readouterr().err
    assert "step 2 is skipped: a gradient is nan" in error and "1 step" in error
    assert not non_finite(model_file.load("new/last.safetensors").state_dict())


def test_skipping_ends_where_nothing_else_happens(here: Path, monkeypatch: Any, capsys: Any) -> None:
    burst_at(2, monkeypatch, last=100)
    assert main(run("-o", "new", "--on-nonfinite", "skip", "--epochs", "20", "--max-steps", "60")) == 1
    assert "as in the 10 before" in capsys.readouterr().err


def test_a_rate_that_breaks_the_weights_leaves_no_save_of_them(here: Path, capsys: Any) -> None:
    assert main(run("-o", "new", "--lr", "1e38", steps=1)) == 1
    assert "error: " in capsys.readouterr().err
    assert not list(Path("new").glob("*.safetensors"))


def test_a_rate_that_no_float_holds_is_named_and_not_its_optimizer(here: Path, capsys: Any) -> None:
    assert main(run("-o", "new", "--lr", "1e308", steps=1)) == 2
    assert "error: --lr 1e+308 is too large" in capsys.readouterr().err


def test_weights_that_are_no_numbers_are_not_trained(here: Path, capsys: Any) -> None:
    model = model_file.load("m.safetensors")
    with torch.no_grad():
        nn.utils.parameters_to_vector(model.parameters())
        next(model.parameters())[0] = math.nan
    model_file.save(model, "bad.safetensors")
    assert main(run("-o", "new", model="bad.safetensors")) == 1
    assert "holds NaN or infinity in" in capsys.readouterr().err and not Path("new").exists()


def test_a_log_that_cannot_be_written_is_named_and_its_step_saved(here: Path, monkeypatch: Any, capsys: Any) -> None:
    opened = Path.open

    def full(self: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if self.name == "log.csv" and mode == "a" and "train,1," in self.read_text():
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, mode, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        assert main(run("-o", "new", "--log-every", "1")) == 1
    error = capsys.readouterr().err
    assert "log.csv cannot be written: no room on the disk" in error and "step 2 is saved" in error
    assert main(run("-o", "new", "--resume")) == 0
    assert main(run("-o", "whole", "--log-every", "1")) == 0
    one, other = (load_file(f"{name}/last.safetensors") for name in ("new", "whole"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_full_disk_is_told_about_what_a_small_model_needs(here: Path, monkeypatch: Any, capsys: Any) -> None:
    written = Path("m.safetensors").stat().st_size
    seen: list[int] = []
    ordinary = model_file.atomic_path  # type: ignore[attr-defined]

    def noted(path: Path, *, need: int | None = None) -> Any:
        seen.extend([] if need is None else [need])
        return ordinary(path, need=need)

    monkeypatch.setattr(model_file, "atomic_path", noted)
    model_file.save(model_file.load("m.safetensors"), "again.safetensors")
    assert seen and seen[-1] == pytest.approx(written, rel=0.15)


# Two writers.


def test_a_second_writer_is_refused_by_name(here: Path, capsys: Any) -> None:
    command = [sys.executable, "-c", HOLD, str(here / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        before = contents(here / "run")
        for more in (["--resume"], ["--force"], []):
            assert main(run("-o", "run", *more, steps=4)) == 1
            assert f"process {holder.pid} on " in capsys.readouterr().err
        assert contents(here / "run") == before
        holder.kill()
    assert main(run("-o", "run", "--resume", steps=4)) == 0, "a lock file that a killed process left blocks nobody"
    assert not (here / "run" / ".resode.lock").exists()


HOLD = """
import sys
from pathlib import Path
from resode_cli.machine.locks import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_that_is_moved_away_is_made_anew(tmp_path: Path) -> None:
    said: list[str] = []
    with FolderLock(tmp_path / "run", on_message=said.append) as lock:
        (tmp_path / "run").rename(tmp_path / "moved")
        assert lock.ensure() == tmp_path / "run" and (tmp_path / "run").is_dir()
    assert "was moved or deleted" in said[0]


def test_processes_that_nobody_numbered_are_refused(here: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(run("-o", "new")) == 2
    assert "WORLD_SIZE is 2" in capsys.readouterr().err and not Path("new").exists()


# Signals.

ASK = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


LONG = ["-o", "new", "--epochs", "100000", "--max-steps", "100000", "--save-every", "20", "--eval-every", "100000"]


# What differs by signal is what the processes that read images make of it.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "workers"),
    [(*ASK[0], "0"), *((*each, "2") for each in ASK)],
    ids=["INT alone", "INT", "TERM", "HUP"],
)
def test_a_signal_to_the_whole_group_saves_and_stops(number: int, code: int, workers: str, here: Path, start) -> None:
    process = start(*run(*LONG, "--workers", workers), until="new/last.safetensors")
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "interrupted at step" in error and "--resume goes on" in error and "Traceback" not in error
    step = load_state(here / "new").progress["step"]
    assert f"interrupted at step {step} of" in error
    assert not (here / "new" / ".resode.lock").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.slow
def test_a_dead_worker_is_one_line_and_the_last_step_is_saved(here: Path, start) -> None:
    process = start(*run(*LONG, "--workers", "2"), until="new/last.safetensors")
    # One that has read all its images is not missed: another epoch's follow it.
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError, IndexError):
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(workers[0]), signal.SIGKILL)
        time.sleep(0.02)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in error
    assert "a process that reads images died" in error.splitlines()[-1] and "--resume goes on from there" in error
    assert load_state(here / "new").progress["step"] >= 20


@pytest.mark.parametrize(("number", "code"), ASK, ids=["INT", "TERM", "HUP"])
def test_a_command_with_nothing_to_save_stops_at_once(number: int, code: int, start) -> None:
    process = start("demo")
    time.sleep(0.4)  # while it imports
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error.strip()) == (code, "error: interrupted")


def test_a_run_that_has_heeded_a_signal_is_not_stopped_again(here: Path, monkeypatch: Any, capsys: Any) -> None:
    """The signal comes in an evaluation; what the run does to end well outlasts the wait for a swallowed signal."""
    monkeypatch.setattr(interrupt, "LOST", 0.1)
    evaluate, peak_bytes = best.evaluate, results.peak_bytes  # type: ignore[attr-defined]

    def stopped(*arguments: Any, **settings: Any) -> Any:
        if (here / "new" / "state.safetensors").exists():
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments, **settings)

    def slowly(*arguments: Any) -> int:
        if stop():
            time.sleep(0.4)
        return peak_bytes(*arguments)

    monkeypatch.setattr(best, "evaluate", stopped)
    monkeypatch.setattr(finetune, "peak_bytes", slowly)
    assert main(run("-o", "new", "--save-every", "1", steps=4)) == 143
    assert "interrupted at step 3 of 4" in capsys.readouterr().err
    assert load_state(here / "new").progress["step"] == 3


def test_a_replacing_run_that_is_killed_before_its_log_is_renamed_finds_it(here: Path, monkeypatch: Any) -> None:
    """The first save of the new run stands then, beside the log of the run before."""
    Path("run/.log.csv.0123abcd").write_text("of a run that was killed before it saved anything")
    rename = Path.replace

    def killed(self: Path, target: Any) -> Path:
        if self.name.startswith(".log.csv."):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        main(run("-o", "run", "--force", "--log-every", "1", "--save-every", "1", "--lr", "0.25", steps=2))
    assert main(run("-o", "run", "--resume", steps=2)) == 0
    rows = Path("run/log.csv").read_text()
    assert ",0.25," in rows and ",0.001," not in rows
    assert not list(Path("run").glob(".log.csv.*"))
