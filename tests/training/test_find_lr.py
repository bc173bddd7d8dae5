"""--find-lr: what a curve says, that the real steps are taken, and that nothing is left of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import contents, run

from resode_cli.app import main
from resode_cli.data import open_data
from resode_cli.errors import ResodeError
from resode_cli.files import model_file
from resode_cli.ode import Adjoint
from resode_cli.training import find_lr as module
from resode_cli.training.find_lr import HIGHEST, LOWEST, Losses, find_lr, read_off
from resode_cli.training.settings import Settings
from resode_cli.training.step import Steps

CPU = torch.device("cpu")
RATES = torch.logspace(-7, 1, 100, dtype=torch.float64).tolist()


def curve(falls_at: float, rises_at: float) -> list[float]:
    """A loss that falls by 2 around one rate and rises past another, with a little noise."""
    draws = torch.randn(100, generator=torch.Generator().manual_seed(0)).tolist()
    return [
        3 - 2 / (1 + (falls_at / lr) ** 1.5) + (lr / rises_at) ** 2 * 0.5 + 0.02 * draw
        for lr, draw in zip(RATES, draws, strict=True)
    ]


@pytest.mark.parametrize("falls_at", [1e-4, 1e-3, 1e-2])
def test_the_suggestion_is_where_the_loss_falls_fastest(falls_at: float) -> None:
    found = read_off(RATES, curve(falls_at, 1.0), "")
    assert found.steepest is not None and found.lowest is not None
    assert abs(math.log10(found.steepest / falls_at)) < 0.4 and falls_at < found.lowest < 1
    assert len(found.curve) == 100 and found.curve[7].lr == RATES[7]


def test_a_loss_that_falls_nowhere_suggests_nothing() -> None:
    draws = torch.rand(100, generator=torch.Generator().manual_seed(1)).tolist()
    assert read_off(RATES, [2 + 0.3 * draw for draw in draws], "").steepest is None
    assert read_off(RATES, [2 + lr for lr in RATES], "").steepest is None
    with pytest.raises(ResodeError, match="--find-lr: no number, after 2 of the smallest rates"):
        read_off(RATES, [1.0, 1.0], "no number")


def test_it_ends_where_the_loss_diverges() -> None:
    losses = Losses()
    for value in [2.0] * 20 + [1.0] * 20:
        losses.append(value)
        assert losses.diverged() is None
    losses.append(200.0)
    assert losses.diverged() == "the loss is 4 times the least"
    lost = Losses()
    lost.append(1.0)
    lost.append(math.nan)
    assert lost.diverged() == "the loss or a gradient is no number any more" and lost.values == [1.0]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"optimizer": "adamw", "layer_decay": 0.5, "bn": "batch", "accumulate": 2, "mixup": 0.4, "ema": 0.9},
        {
            "adjoint": "checkpoint",
            "unfreeze_every": 4,
            "schedule": "plateau",
            "plateau_factor": 0.5,
            "warmup": 7,
            "clip_grad": 1.0,
        },
        {"weights_dtype": "bf16"},
        {"adjoint": "heun", "weights_dtype": "bf16-master", "channels_last": True},
    ],
)
def test_nothing_is_left_of_the_steps(more: dict[str, Any], here: Path, monkeypatch: Any) -> None:
    rates: list[list[float]] = []
    step = module.GrowingRate.step_update

    def watched(self: Any, number: int) -> None:
        step(self, number)
        rates.append([group["lr"] for group in self.optimizer.param_groups])

    monkeypatch.setattr(module.GrowingRate, "step_update", watched)
    model = model_file.load("m.safetensors", trust_source=True)
    model.use_adjoint(Adjoint("pc"))
    model.net.conv1.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    history, random = model.info.history, torch.get_rng_state()
    images = open_data("digits", model.info.preprocessing, "train", images=32)
    settings = Settings(**{"batch_size": 8, "adjoint": "backprop", "freeze": ("linear.bias",), **more})
    found = find_lr(model, images, settings, CPU, steps=20)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {stage.spec.scheme for stage in model.stages.values()} == {"euler"}
    assert {a.method for a in model.adjoints.values()} <= {"pc", "checkpoint"} and model.info.history == history
    assert torch.equal(torch.get_rng_state(), random)
    assert [n for n, p in model.net.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert all(p.grad is None for p in model.parameters())
    largest = [max(groups) for groups in rates]
    assert largest[0] == pytest.approx(LOWEST) and largest == sorted(largest) and len(found.curve) <= len(largest)
    assert len({round(rate, 12) for rate in rates[-1]}) > 1 or "layer_decay" not in more
    assert found.curve[0].loss == pytest.approx(found.curve[1].loss, rel=0.5)


def test_the_losses_are_those_of_a_run_at_that_rate(here: Path, capsys: Any) -> None:
    """At rates that change nothing: the first two losses of the run that has the settings."""
    assert main(run("-o", "new", "--log-every", "1", "--lr", "1e-7", "--schedule", "constant", steps=2)) == 0
    rows = [line.split(",") for line in (here / "new" / "log.csv").read_text().splitlines()]
    losses = [float(row[3]) for row in rows if row[0] == "train"]
    capsys.readouterr()
    assert main(run("-o", "again", "--find-lr", "--json", steps=20)) == 0
    found = json.loads(capsys.readouterr().out)["curve"]
    assert [point["loss"] for point in found[:2]] == pytest.approx(losses, rel=1e-5)


def test_the_command_prints_a_table_and_writes_nothing(here: Path, capsys: Any) -> None:
    before = contents(here / "run")
    assert main(run("-o", "new", "--find-lr", "--bn", "batch", "--max-steps", "40")) == 0
    said = capsys.readouterr()
    assert "learning-rate range test" in said.out and ("suggested: --lr" in said.out or "no suggestion" in said.out)
    assert not (here / "new").exists() and contents(here / "run") == before
    assert main(run("-o", "new", "--find-lr", "--json", "--max-steps", "20", "--optimizer", "adamw")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["find_lr"] and found["suggestion"] == found["steepest"] and found["steps"] == 20
    assert LOWEST <= found["curve"][0]["lr"] < found["curve"][-1]["lr"] <= HIGHEST
    assert {"lr", "loss", "smoothed"} == set(found["curve"][0])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-o", "run", "--resume"], "--find-lr looks at a run before it begins"),
        (["-o", "new", "--dry-run"], "--dry-run takes no step, --find-lr some"),
        (["-o", "new", "--max-steps", "19"], "--max-steps 19: --find-lr needs 20 steps or more"),
    ],
)
def test_what_it_does_not_go_with(more: list[str], message: str, here: Path, capsys: Any) -> None:
    assert main(run("--find-lr", *more)) == 2
    assert message in capsys.readouterr().err


def test_drift_that_is_to_stop_a_run_ends_the_test(here: Path, monkeypatch: Any) -> None:
    model = model_file.load("m.safetensors", trust_source=True)
    images = open_data("digits", model.info.preprocessing, "train", images=24)
    take, taken = Steps.take, []

    def stopped(self: Any, batch: Any) -> Any:
        taken.append(batch)
        if len(taken) > 25:
            raise ResodeError("states are off")
        return take(self, batch)

    monkeypatch.setattr(Steps, "take", stopped)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = find_lr(model, images, Settings(batch_size=8, adjoint="backprop"), CPU, steps=40)
    assert found.ended == "states are off" and len(found.curve) == 25
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ResodeError, match="states are off"):
        find_lr(model, images, Settings(batch_size=8, adjoint="backprop"), CPU, steps=40)
