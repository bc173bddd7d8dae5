"""The command as two processes run it: a mistake is one line, whoever meets it, and what one knows, all go by."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from resode_cli.app import main
from resode_cli.errors import ResodeError, UsageError
from resode_cli.machine import processes

NET = """
from resode_cli.sources.cifar import CifarResNet
def small(num_classes=3):
    return CifarResNet(3, num_classes=num_classes, widths=(4, 6, 6))
"""
WORKER = Path(__file__).with_name("several_commands.py")
RUN = ["finetune", "m.safetensors", "--trust-source", "--data", "photos", "--skip-corrupt", "--batch-size", "6"]
RUN += ["--workers", "0", "--adjoint", "checkpoint", "--device", "cpu", "--no-augment"]
# What is wrong, and where it is found: before the processes know each other, before the run begins, as it begins, at a
# step, and at an evaluation.
MISTAKES = {
    "device": (["--device", "cpu:1"], "each of 2 processes takes one of its own"),
    "data": (["--data", "nowhere/photos"], "does not exist"),
    "network": (["--dropout", "0.1"], "has no dropout"),
    "waits": (["--unfreeze-every", "30"], "before anything but head is trained"),
    "step": (["--lr", "1e30"], "the loss is nan at step"),
    "evaluation": (["--lr", "1e30", "--on-nonfinite", "skip"], "the loss on the test images is nan"),
}
WAITING = ["finetune", "--resume", "--trust-source", "-o"]


def commands_of_two(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """By name, what two processes said of a command, and their exit codes; and the names of two corrupt files."""
    numbers = torch.Generator().manual_seed(0)
    for label in "abc":
        (folder / "photos" / label).mkdir(parents=True)
        for i in range(8):
            pixels = torch.randint(0, 256, (8, 8, 3), generator=numbers, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / "photos" / label / f"{i}.png")
    corrupt = [folder / "photos" / label / f"{i}.png" for label, i in (("a", 3), ("c", 7))]
    for path in corrupt:
        path.write_bytes(b"nothing")
    commands: dict[str, list[str]] = {
        name: [*RUN, "-o", name, "--max-steps", "8", *more] for name, (more, _) in MISTAKES.items()
    }
    # Of a run that waits for better models in vain, the best one is lost: of the two processes one sees that.
    commands["vain"] = [*RUN, "-o", "vain", "--max-steps", "40", "--lr", "1e-30", "--patience", "1"]
    commands["goes on"] = [*WAITING, "vain", "--patience", "2"]
    lines = [*commands.values()]
    lines.insert(len(lines) - 1, ["rm", "vain/best.safetensors"])
    (folder / "commands.json").write_text(json.dumps([[*RUN, "--dry-run"], *lines]))
    Path("net.py").write_text(NET)
    assert main(["convert", "net.py:small", "--no-pretrained", "--input-size", "8", "-o", "m.safetensors"]) == 0
    done = subprocess.run(
        [sys.executable, str(WORKER), "commands.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    return dict(zip(commands, json.loads(done.stdout), strict=True)), [path.name for path in corrupt]


def test_two_processes_speak_and_decide_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found, corrupt = commands_of_two(tmp_path)
    for name, (_, message) in MISTAKES.items():
        first, other = found[name]["said"]
        assert all(found[name]["codes"])
        assert first.count("error: ") == 1 and message in first and other == "", (name, first, other)
    said, _ = found["vain"]["said"]
    assert found["vain"]["codes"] == [0, 0] and "brought nothing better" in said
    assert all(name in said for name in corrupt), said
    # Of a best model that is gone the first one knows; else the other would end by --patience, and be waited for.
    first, other = found["goes on"]["said"]
    assert "best.safetensors is not there any more" in first
    assert found["goes on"]["codes"] == [0, 0] and "error" not in first + other


@pytest.mark.parametrize(
    "numbers", [{"RANK": "2"}, {"RANK": "x"}, {"LOCAL_RANK": "3"}, {"LOCAL_WORLD_SIZE": "0"}, {"LOCAL_WORLD_SIZE": "3"}]
)
def test_places_that_cannot_be_are_refused(numbers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    _as_one_of_two(monkeypatch)
    for name, value in numbers.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"{next(iter(numbers))} .* is no place among the 2 processes"):
        processes.join("cpu")


def test_a_process_that_never_starts_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    _as_one_of_two(monkeypatch)
    monkeypatch.setattr(processes, "LATEST", 0.2)
    with pytest.raises(ResodeError, match="the 2 processes of this run have not all started within"):
        processes.join("cpu")


def _as_one_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for name, value in {**given, "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
