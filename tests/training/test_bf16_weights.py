"""--weights-dtype: weights in bfloat16 that learn from updates below their precision, and resume to the bit."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import run
from torch import Tensor, nn

from resode_cli import data
from resode_cli.app import main
from resode_cli.errors import ResodeError, UsageError
from resode_cli.files import model_file
from resode_cli.measuring.evaluate import evaluate
from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import Preprocessing
from resode_cli.ode import Adjoint
from resode_cli.training import bf16_weights
from resode_cli.training.bf16_weights import Bf16Optimizer, lower, raised, rounded_at_random
from resode_cli.training.finetune import finetune
from resode_cli.training.optimization import create_optimizer
from resode_cli.training.results import Callbacks
from resode_cli.training.run_folder import load_state
from resode_cli.training.settings import Settings

PRE = Preprocessing(size=8, crop_fraction=1.0)
ULP = 2.0**-7  # of bfloat16 numbers from 1 to 2
SETTINGS = Settings(adjoint="backprop", batch_size=8, max_steps=4, lr=0.05, weights_dtype="bf16", eval_every=2)


def train(model: OdeResNet, out: Path, settings: Settings, **kwargs: Any) -> Any:
    images = data.open_data("digits", PRE, "train", augment=True, images=32, seed=settings.seed)
    test = data.open_data("digits", PRE, "test", images=20)
    return finetune(model, images, test, out=out, settings=settings, **kwargs)


@pytest.fixture
def start(pico: OdeResNet, tmp_path: Path) -> Path:
    model_file.save(pico, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


# Rounding.


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_takes_the_nearer_neighbour_more_often(sign: float) -> None:
    x = torch.full((40_000,), sign * (1 + 0.25 * ULP))
    found = rounded_at_random(x, seeded()).float()
    assert set(found.tolist()) == {sign, sign * (1 + ULP)}
    assert ((found - sign) / (sign * ULP)).mean().item() == pytest.approx(0.25, abs=0.01)


def test_rounding_leaves_what_needs_none() -> None:
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(rounded_at_random(exact.float(), seeded()), exact)
    odd = torch.tensor([math.inf, -math.inf, 0.0, -0.0])
    assert torch.equal(rounded_at_random(odd, seeded()).float(), odd)
    assert rounded_at_random(torch.tensor([math.nan]), seeded()).isnan().all()
    last = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    assert rounded_at_random(last, seeded()).is_contiguous(memory_format=torch.channels_last)


def moved(weights_dtype: str, update: float, steps: int) -> Tensor:
    """How far weights of 1 come by so many updates of one size, in units of their last place."""
    layer = nn.Linear(64, 64, bias=False)
    nn.init.ones_(layer.weight)
    settings = Settings(momentum=0.0, weight_decay=0.0, lr=update * ULP, weights_dtype=weights_dtype)
    optimizer = create_optimizer(layer, settings)
    for _ in range(steps):
        layer.weight.grad = torch.full_like(layer.weight, -1.0)
        optimizer.step()
    assert layer.weight.dtype == torch.bfloat16
    with raised(optimizer):
        return (layer.weight.detach().clone() - 1) / ULP


def test_updates_far_below_the_last_place_move_weights_by_their_expectation(monkeypatch: pytest.MonkeyPatch) -> None:
    """500 of a thousandth of it: half a place. The deviation of the mean of 4096 weights is 0.011."""
    found = moved("bf16", 1e-3, 500)
    assert found.mean().item() == pytest.approx(0.5, abs=0.05)
    assert set(found.unique().tolist()) <= {float(n) for n in range(8)}
    assert moved("bf16-master", 1e-3, 500).mean().item() == pytest.approx(0.5, rel=1e-2)
    monkeypatch.setattr(bf16_weights, "rounded_at_random", lambda x, generator: x.bfloat16())
    assert not moved("bf16", 1e-3, 500).any(), "rounded to the nearest, they would be none"


def test_parts_are_stepped_as_all_together_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def stepped() -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
        optimizer = create_optimizer(net, replace(SETTINGS, optimizer="adamw"))
        for _ in range(3):
            for p in net.parameters():
                p.grad = torch.randn(p.shape).to(p.dtype)
            optimizer.step()
        assert isinstance(optimizer, Bf16Optimizer)
        assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}
        return [p.detach().clone() for p in net.parameters()]

    together = stepped()
    monkeypatch.setattr(bf16_weights, "PART", 1)
    assert all(torch.equal(one, other) for one, other in zip(together, stepped(), strict=True))
    assert [p.dtype for p in together] == [torch.bfloat16] * 2 + [torch.float32] * 2 + [torch.bfloat16] * 2


# Runs.


def test_with_masters_the_first_step_is_that_of_float32_to_the_gradients_rounding(start: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, max_steps=1, momentum=0.0)
    found = {}
    for name, more in {
        "master": {"weights_dtype": "bf16-master"},
        "amp": {"weights_dtype": None, "amp": "bf16"},
        "float32": {"weights_dtype": None},
    }.items():
        train(model_file.load(start), tmp_path / name, replace(settings, **more))
        found[name] = load_file(tmp_path / name / "last.safetensors")
    before = load_file(start)
    assert all(torch.equal(value, found["amp"][name]) for name, value in found["master"].items())
    for name, value in found["float32"].items():
        step = (value - before[name]).norm().item() if value.is_floating_point() else 0.0
        assert (found["master"][name].float() - value.float()).norm().item() <= 0.1 * step + 1e-6, name


def at_every_step(model: OdeResNet, look: Callable[[OdeResNet], Any]) -> Callbacks:
    return Callbacks(on_step=lambda _: look(model))


@pytest.mark.parametrize("kind", ["bf16", "bf16-master"])
def test_only_trained_convolutions_and_linear_layers_are_lowered(kind: str, start: Path, tmp_path: Path) -> None:
    model, seen = model_file.load(start), []
    note = at_every_step(model, lambda m: seen.append({name: p.dtype for name, p in m.net.named_parameters()}))
    settings = replace(SETTINGS, weights_dtype=kind, freeze=("conv1",), bn="batch", max_steps=2)
    train(model, tmp_path / "run", settings, callbacks=note)
    kinds = {name for name, dtype in seen[-1].items() if dtype == torch.bfloat16}
    layers = {f"{name}.weight" for name, m in model.net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert kinds == layers - {"conv1.weight"} | {"linear.bias"}
    before, last = load_file(start), load_file(tmp_path / "run" / "last.safetensors")
    assert torch.equal(before["conv1.weight"], last["conv1.weight"])
    assert {value.dtype for value in last.values() if value.is_floating_point()} == {torch.float32}
    exact = all(torch.equal(value, value.bfloat16().float()) for name, value in last.items() if name in kinds)
    assert exact is (kind == "bf16")
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "after the run, the model is one as any other"
    assert all(torch.equal(value, last[name]) for name, value in model.file_state().items())


def test_the_best_model_has_the_accuracy_that_chose_it(start: Path, tmp_path: Path) -> None:
    train(model_file.load(start), tmp_path / "run", replace(SETTINGS, lr=1e-3, best_by="loss"))
    best = model_file.load(tmp_path / "run" / "best.safetensors")
    measured: Any = best.info.history[-1]["measured"]
    test = data.open_data("digits", PRE, "test", images=20)
    assert evaluate(best, data.batches(test, 20)).loss == pytest.approx(measured["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"weights_dtype": "bf16-master", "optimizer": "lamb"},
        {"optimizer": "adamw", "ema": 0.9, "accumulate": 2, "clip_grad": 0.5, "bn": "batch"},
        {"weights_dtype": "bf16-master", "ema": 0.9, "channels_last": True},
    ],
)
def test_a_resumed_run_repeats_the_whole_one_to_the_bit(more: dict[str, Any], start: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, **more)
    train(model_file.load(start), tmp_path / "whole", settings)
    seen: list[Any] = []
    stop = Callbacks(on_step=seen.append, should_stop=lambda: len(seen) >= 3)
    assert train(model_file.load(start), tmp_path / "parts", settings, callbacks=stop).interrupted
    state = load_state(tmp_path / "parts")
    train(state.model, tmp_path / "parts", settings, resume=state)
    for name in ("last", "state", "best"):
        one, other = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("whole", "parts"))
        assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
    train(model_file.load(start), tmp_path / "other", replace(settings, seed=1))
    other = load_file(tmp_path / "other" / "last.safetensors")
    assert any(not torch.equal(value, one[key]) for key, value in other.items())


@pytest.mark.slow
def test_a_killed_run_repeats_the_uninterrupted_one(here: Path) -> None:
    more = ["--weights-dtype", "bf16", "--save-every", "3", "--epochs", "100", "--optimizer", "adamw", "--ema", "0.9"]
    assert main(run("-o", "whole", *more, steps=30)) == 0
    command = [sys.executable, "-m", "resode_cli", *run("-o", "parts", *more, steps=30)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not Path("parts/state.safetensors").exists():
        time.sleep(0.005)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert main(run("-o", "parts", "--resume", steps=30)) == 0
    for name in ("state", "last"):
        one, other = (load_file(f"{folder}/{name}.safetensors") for folder in ("whole", "parts"))
        assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("adjoint", ["checkpoint", "pc", "euler", "multistep"])
def test_gradients_are_backprops_to_the_rounding_of_bfloat16(adjoint: str, pico: OdeResNet) -> None:
    lower(pico)
    x = torch.randn(8, 3, 8, 8)
    found = []
    for method in ("backprop", adjoint):
        pico.use_adjoint(Adjoint(method, anchors=None if method in ("backprop", "checkpoint") else 1))
        pico.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = pico.eval()(x).float().square().sum()
        torch.autograd.backward(loss)
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in pico.parameters())
        found.append([p.grad.double() for p in pico.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 0.02 * one.norm() + 1e-6


def test_a_plan_counts_the_smaller_weights(here: Path, capsys: Any) -> None:
    def foreseen(*more: str) -> dict[str, Any]:
        assert main(run("-o", "dry", "--dry-run", "--json", *more, steps=1)) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    plain = foreseen("--amp", "bf16")
    low, master = (foreseen("--weights-dtype", kind) for kind in ("bf16", "bf16-master"))
    model = model_file.load("m.safetensors")
    lowered = sum(p.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) for p in m.parameters())
    assert plain["weights"] - low["weights"] == plain["gradients"] - low["gradients"] == 2 * lowered
    assert low["optimizer"] == plain["optimizer"] and low["predicted_bytes"] < plain["predicted_bytes"]
    assert master["optimizer"] - low["optimizer"] == 4 * plain["trained"]


# Refusals.


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--weights-dtype", "bf16", "--amp", "fp16"], "--amp fp16 computes in float16: leave out one"),
        (["--weights-dtype", "bf16", "--optimizer", "lamb"], "use --weights-dtype bf16-master, or another optimizer"),
        (["--weights-dtype", "fp8"], "unknown weights dtype 'fp8'"),
    ],
)
def test_contradictions_are_refused(more: list[str], message: str, here: Path, capsys: Any) -> None:
    assert main(run("-o", "new", *more)) == 2
    assert message in capsys.readouterr().err


def test_a_resumed_run_keeps_its_weights_dtype(here: Path, capsys: Any) -> None:
    assert main(run("-o", "run", "--resume", "--weights-dtype", "bf16", steps=4)) == 2
    assert "--weights-dtype bf16: the run has unset, and keeps it" in capsys.readouterr().err


def test_a_model_in_float64_and_a_run_that_does_not_begin_leave_no_bfloat16(pico: OdeResNet, tmp_path: Path) -> None:
    with pytest.raises(ResodeError, match="this one is in float64"):
        train(pico.double(), tmp_path / "run", SETTINGS)
    model = pico.float()
    with pytest.raises(ResodeError, match="cannot be run in micro-batches"):
        train(model, tmp_path / "run", replace(SETTINGS, micro_batches=2, bn="batch"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with pytest.raises(UsageError, match="computes in float16"):
        replace(SETTINGS, amp="fp16")
