"""Runs of two processes against those of one: the same losses and weights, one set of files, and all end together."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from several_runs import (
    BASE,
    CORRUPT,
    MODEL,
    NORMS,
    OTHERS,
    SAME,
    STEPS,
    TEACHER,
    norm_case,
    normalised,
    train,
    train_data,
)

from resode_cli.app import main
from resode_cli.errors import UsageError
from resode_cli.files import model_file
from resode_cli.machine.processes import Processes, join
from resode_cli.training.loop import training_batches
from resode_cli.training.parallel import Joint, joined, settings_of_one
from resode_cli.training.run_folder import load_state

NET = """
from resode_cli.sources.cifar import CifarResNet
def small(num_classes=10):
    return CifarResNet(3, num_classes=num_classes, widths=(4, 6, 6))
"""
WORKER = Path(__file__).with_name("several_runs.py")
TWO = Processes(1, 2, 1, 2)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have done every run."""
    path = tmp_path_factory.mktemp("several")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        Path("net.py").write_text(NET)
        made = ["convert", "net.py:small", "--no-pretrained", "--input-size", "8", "--num-classes", "10"]
        assert main([*made, "--form", "pre", "-o", "m.safetensors"]) == 0
        assert main(["tie", "m.safetensors", "--trust-source", "-o", MODEL]) == 0
        assert main([*made, "--seed", "1", "-o", TEACHER]) == 0
    numbers = torch.Generator().manual_seed(0)
    for label in range(10):
        (path / CORRUPT / "train" / str(label)).mkdir(parents=True)
        for i in range(4):
            pixels = torch.randint(0, 256, (8, 8, 3), generator=numbers, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(path / CORRUPT / "train" / str(label) / f"{i}.png")
    for label in (0, 7):
        (path / CORRUPT / "train" / str(label) / "2.png").write_bytes(b"nothing")
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    begun = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(path)],
            env={**os.environ, **together, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in begun]
    finally:
        for process in begun:
            process.kill()
    assert [process.returncode for process in begun] == [0, 0], said
    return path


@pytest.fixture(autouse=True)
def _where_the_network_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def losses(run: Path) -> list[tuple[float, str]]:
    with (run / "log.csv").open(newline="") as file:
        return [(float(row["loss"]), row["top1"]) for row in csv.DictReader(file)]


def weights(folder: Path, name: str, place: int = 0) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}-{place}")


@pytest.mark.parametrize("name", SAME)
def test_two_processes_train_as_one_does(folder: Path, name: str) -> None:
    result, net = train(folder, name, SAME[name])
    ours, theirs = losses(folder / "two" / name), losses(folder / "one" / name)
    assert [loss for loss, _ in ours] == pytest.approx([loss for loss, _ in theirs], rel=1e-4)
    assert len(ours) >= STEPS + 2 and ours[-1][1] == theirs[-1][1]
    for key, value in weights(folder, name).items():
        torch.testing.assert_close(value, net.state_dict()[key], rtol=1e-3, atol=1e-5)
    if name == "drifting":
        assert result.moved_to_anchors
        state = load_state(folder / "two" / name, trust_source=True)
        assert state.progress["guard"]["moved_to_anchors"] == list(result.moved_to_anchors)


@pytest.mark.parametrize("name", [*SAME, *OTHERS])
def test_processes_hold_the_same_network(folder: Path, name: str) -> None:
    first, second = (weights(folder, name, place) for place in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    assert any(not torch.equal(value, before) for value, before in zip(first.values(), start(folder), strict=True))


def start(folder: Path) -> list[torch.Tensor]:
    net = model_file.load(folder / MODEL, trust_source=True).net.state_dict()
    return [net[key] for key in sorted(net)]


def test_one_set_of_files_is_written(folder: Path) -> None:
    names = {path.name for path in (folder / "two" / "frozen").iterdir()}
    assert names == {"best.safetensors", "last.safetensors", "state.safetensors", "log.csv"}


def test_statistics_of_parts_are_averaged(folder: Path) -> None:
    """Of BatchNorm by parts the running mean after a step is the mean of what each part alone would leave."""
    settings = replace(BASE, bn="batch", max_steps=1, lr=1e-12)
    means = []
    for place in range(2):
        here = Processes(place, 2)
        model = model_file.load(folder / MODEL, trust_source=True)
        data = train_data(folder, "apart")
        batch = next(training_batches(data, range(len(data)), 8, seed=0, epoch=0, processes=here))
        assert len(batch.labels) == 4
        model.net.train()
        model(batch.images)
        means.append(model.net.bn1.running_mean)
    _, net = train(folder, "whole", settings)
    whole = net.bn1.running_mean
    torch.testing.assert_close((means[0] + means[1]) / 2, whole, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(means[0], means[1], rtol=1e-3)


def test_a_signal_to_one_process_stops_all_and_the_run_goes_on(folder: Path) -> None:
    assert {name: int(value) for name, value in weights(folder, "stopped").items()} == {"step": 2, "interrupted": 1}
    assert {name: int(value) for name, value in weights(folder, "stopped", 1).items()} == {"step": 2, "interrupted": 1}
    resumed, whole = weights(folder, "resumed"), weights(folder, "synchronised")
    assert int(resumed.pop("steps")) == STEPS
    for key, value in resumed.items():
        assert torch.equal(value, whole[key]), key


def test_a_run_of_two_processes_goes_on_with_one(folder: Path) -> None:
    done = folder / "two" / "frozen"
    (folder / "one").mkdir(exist_ok=True)
    shutil.copytree(done, folder / "one" / "goes on")
    more = replace(SAME["frozen"], max_steps=STEPS + 2)
    result, _ = train(folder, "frozen", more, out="goes on", resume=True)
    whole, _ = train(folder, "frozen", more, out="longer")
    assert result.steps == STEPS + 2
    found, expected = (losses(folder / "one" / name)[-2:] for name in ("goes on", "longer"))
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-3)


def test_an_error_in_one_process_ends_all_and_what_was_trained_is_saved(folder: Path) -> None:
    said = [bytes(weights(folder, "broken", place)["said"].tolist()).decode() for place in range(2)]
    assert said == ["EndedElsewhere", "ResodeError"]
    state = load_state(folder / "two" / "broken", trust_source=True)
    assert 0 < state.progress["step"] < STEPS


@pytest.mark.parametrize("kind", NORMS)
def test_batch_norm_of_all_processes_is_that_of_the_whole_batch(folder: Path, kind: str) -> None:
    """Parts of 3 and 5 images, in float64: outputs, gradients and running statistics."""
    norm, x, g = norm_case(kind)
    expected = normalised(norm, x, g)
    parts = [weights(folder, f"norm {kind}", place) for place in range(2)]
    for name, value in expected.items():
        if name in ("y", "x"):
            found = torch.cat([part[name] for part in parts])
        elif name in ("weight", "bias"):
            found = parts[0][name] + parts[1][name]
        else:
            found = parts[0][name]
            assert torch.equal(found, parts[1][name])
        torch.testing.assert_close(found, value, rtol=1e-11, atol=1e-12)


def test_processes_draw_different_random_numbers_that_follow_from_the_step() -> None:
    joint = Joint.__new__(Joint)
    drawn = []
    for place, step in ((1, 0), (1, 1), (2, 0), (1, 0)):
        joint.processes = Processes(place, 3)
        joint.seed(5, step)
        drawn.append(torch.rand(()).item())
    assert drawn[0] == drawn[3] and len(set(drawn)) == 3
    torch.manual_seed(7)
    joint.processes = Processes(0, 3)
    joint.seed(5, 0)
    found = torch.rand(())
    torch.manual_seed(7)
    assert found == torch.rand(())


def test_figures_of_processes_are_summed_or_the_largest_and_no_number_is_one() -> None:
    assert joined([[1.0, 2.0, 3.0], [4.0, 1.0, 5.0]], sums=1) == [5.0, 2.0, 5.0]
    assert joined([[1.0, 2.0], [1.0, math.nan]], sums=1)[0] == 2 and math.isnan(joined([[0.0], [math.nan]], sums=0)[0])


@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_follow_each_other_and_are_even(items: int, count: int) -> None:
    shares = [Processes(place, count).share(range(items)) for place in range(count)]
    assert [i for share in shares for i in share] == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 7}, "multiple of 2"),
        ({"micro_batches": 8}, "each of 2 processes has 4 images"),
        ({"bn": "sync", "compile": True}, "--compile"),
        ({"bn": "sync", "batch_size": 64}, "fewer than one"),
        ({"batch_size": 2, "cutmix": 0.5}, "--cutmix mixes the images that a process has of a step, which is one"),
    ],
)
def test_what_processes_cannot_do_together_is_refused(folder: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        settings_of_one(replace(BASE, **change), TWO, train_data(folder, "frozen"))


def test_synchronised_norms_refuse_to_leave_out_files(folder: Path) -> None:
    with pytest.raises(UsageError, match="--skip-corrupt"):
        settings_of_one(replace(BASE, bn="sync"), TWO, train_data(folder, "skipping"))


def test_processes_that_nobody_numbered_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="torchrun"):
        join("cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join("cpu")[0].alone


@pytest.mark.slow
def test_torchrun_trains_once_and_says_it_once(folder: Path, tmp_path: Path) -> None:
    """As a user types it; and a mistake that both processes meet is one line."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    begin = ["-m", "resode_cli", "finetune", str(folder / MODEL), "--trust-source", "--device", "cpu", "--workers", "0"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*torchrun, str(free_port()), *begin, *more], capture_output=True, text=True, timeout=200)

    data = ["--data", "digits", "--images", "40", "--test-images", "10", "--batch-size", "8", "--max-steps", "2"]
    done = run(*data, "--adjoint", "pc", "--json", "-o", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    assert done.stderr.count("after:") == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *("best.safetensors", "config.toml", "last.safetensors", "log.csv", "state.safetensors")
    ]
    failed = run(*data, "--batch-size", "9", "-o", str(tmp_path / "other"))
    assert failed.returncode != 0 and not (tmp_path / "other").exists()
    assert failed.stderr.count("error: ") == 1 and "multiple of 2" in failed.stderr
