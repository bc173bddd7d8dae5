"""A run's files are safe: from --force, numbers that are none, settings that changed, two writers, and signals."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from resode_cli.app import main
from resode_cli.commands import interrupt
from resode_cli.commands.interrupt import stop
from resode_cli.files import model_file
from resode_cli.machine.locks import FolderLock
from resode_cli.network.model import non_finite
from resode_cli.training import finetune
from resode_cli.training.run_folder import load_state

SMALL = ["--no-pretrained", "--input-size", "8", "--num-classes", "10"]
TRAIN = ["--images", "24", "--test-images", "8", "--batch-size", "8", "--adjoint", "backprop", "--device", "cpu"]
NET = """
from resode_cli.sources.cifar import CifarResNet
def small(num_classes=10):
    return CifarResNet(1, widths=(2, 4, 4), num_classes=num_classes)
"""


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


def run(*more: str, model: str = "m.safetensors", steps: int = 3) -> list[str]:
    flags = [] if "--max-steps" in more else ["--max-steps", str(steps)]
    data = [] if "--data" in more else ["--data", "digits"]
    return ["finetune", model, "--trust-source", *data, *TRAIN, *flags, *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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


@pytest.mark.parametrize("role", ["model", "teacher"])
def test_what_a_new_run_needs_may_lie_in_the_folder_that_it_replaces(role: str, here: Path) -> None:
    before = contents(here / "run")
    model = "run/best.safetensors" if role == "model" else "m.safetensors"
    teacher = ["--teacher", "run/last.safetensors"] if role == "teacher" else []
    assert main(run("-o", "run", "--force", "--lr", "0.3", *teacher, model=model, steps=2)) == 0
    after = contents(here / "run")
    assert set(after) == {"state.safetensors", "best.safetensors", "last.safetensors", "log.csv"}
    assert all(after[name] != before[name] for name in before)
    assert load_state(here / "run").progress["step"] == 2


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
    from resode_cli.training import finetune

    count = [0]
    ordinary = finetune.Objective.__call__  # type: ignore[attr-defined]

    def call(self: Any, *arguments: Any) -> Any:
        count[0] += 1
        loss, logits = ordinary(self, *arguments)
        return (_Burst.apply(loss) if step <= count[0] <= (last or step) else loss), logits

    monkeypatch.setattr(finetune.Objective, "__call__", call)  # type: ignore[attr-defined]


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


def test_weights_that_are_no_numbers_are_not_trained(here: Path, capsys: Any) -> None:
    model = model_file.load("m.safetensors")
    with torch.no_grad():
        nn.utils.parameters_to_vector(model.parameters())
        next(model.parameters())[0] = math.nan
    model_file.save(model, "bad.safetensors")
    assert main(run("-o", "new", model="bad.safetensors")) == 1
    assert "holds NaN or infinity in" in capsys.readouterr().err and not Path("new").exists()


# Resuming.


CHANGED = {
    "--adjoint": ["--adjoint", "checkpoint"],
    "--stage": ["--stage", "layer1"],
    "--optimizer": ["--optimizer", "adamw"],
    "--seed": ["--seed", "7"],
    "--bn": ["--bn", "batch"],
    "--amp": ["--amp", "bf16"],
    "--augment": ["--no-augment"],
    "--batch-size": ["--batch-size", "4"],
    "--teacher": ["--teacher", "other.safetensors"],
}


@pytest.mark.parametrize("flag", CHANGED)
def test_what_would_make_another_run_is_refused_by_name(flag: str, here: Path, capsys: Any) -> None:
    before = contents(here / "run")
    assert main(run("-o", "run", "--resume", *CHANGED[flag], steps=5)) == 2
    assert f"error: {flag} " in capsys.readouterr().err
    assert contents(here / "run") == before


def test_what_may_change_is_said(here: Path, capsys: Any) -> None:
    assert main(run("-o", "run", "--resume", "--lr", "0.5", "--log-every", "1", "--workers", "0", steps=4)) == 0
    error = capsys.readouterr().err
    assert "--lr is 0.5 from here on; it was 0.001" in error and "--max-steps is 4 from here on; it was 3" in error
    assert "--workers" not in error, "it is what it was"
    assert load_state(here / "run").progress["step"] == 4


def test_a_run_that_is_past_its_end_is_refused(here: Path, capsys: Any) -> None:
    assert main(run("-o", "run", "--resume", steps=2)) == 2
    assert "the run is at step 3 already, past the 2" in capsys.readouterr().err


def test_another_model_is_refused_and_its_own_or_none_is_not(here: Path, capsys: Any) -> None:
    assert main(run("-o", "run", "--resume", model="other.safetensors", steps=4)) == 2
    assert "other.safetensors is not the model that the run in run began with" in capsys.readouterr().err
    assert main(run("-o", "run", "--resume", model="run/last.safetensors", steps=4)) == 0
    Path("m.safetensors").unlink()
    assert main(run("-o", "run", "--resume", steps=5)) == 0
    assert "m.safetensors is not there any more" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["name", "size", "test"])
def test_other_images_of_equal_number_are_refused(change: str, here: Path, make_folder: Any, capsys: Any) -> None:
    folder = make_folder(classes=[f"c{i}" for i in range(10)], each=3, size=8)
    data = ["--data", str(folder)]
    assert main(run("-o", "new", *data, steps=1)) == 0
    image = next((folder / ("test" if change == "test" else "train") / "c1").iterdir())
    if change == "size":
        image.write_bytes(image.read_bytes() + b"\0")
    else:
        image.rename(image.with_name("9.png"))
    assert main(run("-o", "new", *data, "--resume", steps=2)) == 2
    assert "images are others than when the run began" in capsys.readouterr().err


def test_half_a_row_of_a_log_stops_nothing(here: Path) -> None:
    log = here / "run" / "log.csv"
    log.write_text(log.read_text() + "train,3,1,0.")
    assert main(run("-o", "run", "--resume", steps=4)) == 0
    assert "train,3,1,0.\n" not in log.read_text()


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
    assert not (here / "run" / ".lock").exists()


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


def test_several_processes_are_refused(here: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(run("-o", "new")) == 2
    assert "WORLD_SIZE is 2" in capsys.readouterr().err and not Path("new").exists()


# Signals.

ASK = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


LONG = ["-o", "new", "--epochs", "100000", "--max-steps", "100000", "--save-every", "20", "--eval-every", "100000"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(("number", "code"), ASK, ids=["INT", "TERM", "HUP"])
def test_a_signal_to_the_whole_group_saves_and_stops(number: int, code: int, workers: str, here: Path, start) -> None:
    process = start(*run(*LONG, "--workers", workers), until="new/last.safetensors")
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "interrupted at step" in error and "--resume goes on" in error and "Traceback" not in error
    step = load_state(here / "new").progress["step"]
    assert f"interrupted at step {step} of" in error
    assert not (here / "new" / ".lock").exists()
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
    evaluate, peak_bytes = finetune.evaluate, finetune.peak_bytes  # type: ignore[attr-defined]

    def stopped(*arguments: Any, **settings: Any) -> Any:
        if (here / "new" / "state.safetensors").exists():
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments, **settings)

    def slowly(*arguments: Any) -> int:
        if stop():
            time.sleep(0.4)
        return peak_bytes(*arguments)

    monkeypatch.setattr(finetune, "evaluate", stopped)
    monkeypatch.setattr(finetune, "peak_bytes", slowly)
    assert main(run("-o", "new", "--save-every", "1", steps=4)) == 143
    assert "interrupted at step 3 of 4" in capsys.readouterr().err
    assert load_state(here / "new").progress["step"] == 3


def test_a_last_model_that_is_missing_is_written_from_the_state(here: Path) -> None:
    """A run may be killed between the two, at its last step too."""
    last = here / "run" / "last.safetensors"
    before = model_file.load(last, trust_source=True).state_dict()
    last.unlink()
    assert main(run("-o", "run", "--resume")) == 0
    after = model_file.load(last, trust_source=True).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--grad-tol", "1e-5"], "--grad-tol 1e-05: the run has 0.02, and keeps it"),
        (["--memory-budget", "1MiB"], "--memory-budget 1MiB: the run has unset, and keeps it"),
        (["--distill", "0.9"], "--distill is a setting of the teacher"),
    ],
)
def test_what_would_have_no_effect_on_a_resumed_run_is_refused(flags, message, here: Path, capsys) -> None:
    assert main(run("-o", "run", "--resume", *flags)) == 2
    assert message in capsys.readouterr().err


# The same model, data, teacher and stages, spelled otherwise, are the same; others are refused.

FIXED = [flag for flag in TRAIN if flag not in ("--images", "24")]


def on(data: str, *more: str, steps: int = 2) -> list[str]:
    return ["finetune", "m.safetensors", "--trust-source", "--data", data, *FIXED, "--max-steps", str(steps), *more]


@pytest.fixture
def begun(here: Path, make_folder: Any) -> Path:
    """A run on a folder of images, with a teacher, of one stage that is named by its place."""
    make_folder(classes=tuple("abcdefghij"), each=2, size=8)
    begin = ["-o", "own", "--stage", "2", "--teacher", "other.safetensors"]
    assert main(on("pictures", *begin)) == 0
    return here


@pytest.mark.parametrize("spelled", ["./pictures", "pictures/", "../{here}/pictures", "{root}/pictures", "moved"])
def test_data_is_known_again_however_it_is_spelled(spelled: str, begun: Path) -> None:
    data = spelled.format(here=begun.name, root=begun)
    if data == "moved":
        Path("pictures").rename(data)
    assert (
        main(on(data, "-o", "own", "--resume", "--stage", "layer2", "--teacher", "./other.safetensors", steps=3)) == 0
    )
    assert load_state(begun / "own", trust_source=True).progress["step"] == 3


def test_classes_that_changed_places_are_other_data(begun: Path, capsys: Any) -> None:
    """Names and sizes are the same: what is in the files is not."""
    train = Path("pictures/train")
    for name, other in (("a", "tmp"), ("b", "a"), ("tmp", "b")):
        (train / name).rename(train / other)
    size = max(file.stat().st_size for file in train.rglob("*.png"))
    for file in train.rglob("*.png"):
        file.write_bytes(file.read_bytes().ljust(size, b"\0"))
    assert main(on("pictures", "-o", "own", "--resume", steps=3)) == 2
    assert "the train images are others than when the run began" in capsys.readouterr().err


def test_another_teacher_under_the_same_name_is_refused(begun: Path, capsys: Any) -> None:
    shutil.copy("m.safetensors", "other.safetensors")
    assert main(on("pictures", "-o", "own", "--resume", steps=3)) == 2
    assert "--teacher other.safetensors: the run began with a teacher of other weights" in capsys.readouterr().err


def test_a_best_model_that_is_gone_is_said_and_chosen_anew(here: Path, capsys: Any) -> None:
    Path("run/best.safetensors").unlink()
    assert main(run("-o", "run", "--resume", steps=4)) == 0
    assert "best.safetensors is not there any more" in capsys.readouterr().err
    assert Path("run/best.safetensors").is_file()


@pytest.mark.parametrize(
    ("begin", "later", "message"),
    [
        (["--max-steps", "3", "--epochs", "5"], ["--epochs", "9"], "ends at step 3, by the --max-steps"),
        (["--max-steps", "9", "--epochs", "1"], ["--max-steps", "12"], "ends at step 3, by the --epochs 1"),
    ],
)
def test_a_length_that_does_not_end_the_run_is_said(begin, later, message, here: Path, capsys: Any) -> None:
    command = ["finetune", "m.safetensors", "--trust-source", "--data", "digits", *TRAIN, "-o", "new"]
    assert main([*command, *begin]) == 0
    assert main([*command, *later, "--resume"]) == 0
    assert message in capsys.readouterr().err


def test_a_replacing_run_that_is_killed_before_its_log_is_renamed_finds_it(here: Path, monkeypatch: Any) -> None:
    """The first save of the new run stands then, beside the log of the run before."""
    Path("run/.log.csv.stale").write_text("of a run that was killed before it saved anything")
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
