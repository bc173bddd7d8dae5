"""A batch in parts, whose gradients add up: the same step, where a network mixes no images; else refused."""

from __future__ import annotations

import csv
import json
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import nn

from resode_cli import data
from resode_cli.app import main
from resode_cli.errors import ResodeError, UsageError
from resode_cli.files import model_file
from resode_cli.network.model import OdeResNet, freeze_batch_norm
from resode_cli.network.parts import Preprocessing
from resode_cli.ode import Adjoint
from resode_cli.simulation.step import Simulation, predicted
from resode_cli.training import guard, run_folder
from resode_cli.training.finetune import finetune
from resode_cli.training.optimization import optimizer_slots
from resode_cli.training.results import Callbacks
from resode_cli.training.settings import Settings

PRE = Preprocessing(size=8, crop_fraction=1.0)
SETTINGS = Settings(adjoint="backprop", batch_size=10, max_steps=4, lr=0.05, log_every=1, augment=False)


@pytest.fixture
def model(pico: OdeResNet, tmp_path: Path) -> OdeResNet:
    model_file.save(pico, tmp_path / "m.safetensors")
    return pico


def train(out: Path, settings: Settings, **kwargs):
    loaded = model_file.load(out.parent / "m.safetensors")
    images = data.open_data("digits", PRE, "train", augment=settings.augment, images=40, seed=settings.seed)
    result = finetune(loaded, images, None, out=out, settings=settings, device=torch.device("cpu"), **kwargs)
    with (out / "log.csv").open(newline="") as file:
        return result, loaded, list(csv.DictReader(file))


@pytest.mark.parametrize("parts", [2, 4, 10])
def test_a_batch_in_parts_is_the_same_step(parts, model, tmp_path):
    """Ten images in four parts are three, three, three and one: each image counts alike."""
    _, whole, rows = train(tmp_path / "whole", SETTINGS)
    _, split, found = train(tmp_path / "split", replace(SETTINGS, micro_batches=parts))
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for one, other in zip(rows, found, strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-4)
        assert float(one["top1"]) == pytest.approx(float(other["top1"]), rel=1e-6)


@pytest.mark.parametrize("adjoint", ["backprop", "auto"])
def test_images_that_mix_are_not_split(adjoint, model, tmp_path):
    settings = replace(SETTINGS, adjoint=adjoint, micro_batches=2, bn="batch")
    with pytest.raises(ResodeError, match="the network mixes the images .* cannot be run in micro-batches; freeze"):
        train(tmp_path / "run", settings)


def test_images_that_mix_from_three_on_are_not_split_either(model, tmp_path):
    def rolls(_: nn.Module, given: tuple[torch.Tensor]) -> torch.Tensor:
        (x,) = given
        return x + x.roll(1, 0) if len(x) > 2 else x

    model.net.conv1.register_forward_pre_hook(rolls)
    images = data.open_data("digits", PRE, "train", augment=False, images=40)
    settings = replace(SETTINGS, micro_batches=2)
    with pytest.raises(ResodeError, match="cannot be run in micro-batches"):
        finetune(model, images, None, out=tmp_path / "run", settings=settings, device=torch.device("cpu"))


@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
def test_random_layers_do_not_mix_images(batch_norm, model, tmp_path):
    """Parts draw other numbers than the whole, which is no image that sees another; BatchNorm is still found."""
    model.net.linear.register_forward_pre_hook(
        lambda module, given: nn.functional.dropout(given[0], 0.5, training=module.training)
    )
    images = data.open_data("digits", PRE, "train", augment=False, images=40)
    settings = replace(SETTINGS, micro_batches=2, max_steps=1, bn=batch_norm)
    fine = pytest.raises(ResodeError, match="mixes the images") if batch_norm == "batch" else nullcontext()
    with fine:
        finetune(model, images, None, out=tmp_path / "run", settings=settings, device=torch.device("cpu"))


def test_what_contradicts_is_refused():
    with pytest.raises(UsageError, match="--micro-batches 11: a batch has 10 images"):
        replace(SETTINGS, micro_batches=11)
    with pytest.raises(UsageError, match="--teacher-states compares whole batches"):
        replace(SETTINGS, micro_batches=2, teacher_states=0.5)


def test_auto_splits_the_batch_where_that_is_the_fastest_that_fits(model, tmp_path):
    model.train()
    freeze_batch_norm(model)
    settings = replace(SETTINGS, adjoint="auto", batch_size=32)
    held = predicted(Simulation(model, "cpu").step(Adjoint(), (32, 3, 8, 8)))
    told = []
    tight = replace(settings, memory_budget=f"{int(0.6 * held)}B")
    seen: list[object] = []
    stop = Callbacks(on_choice=told.append, on_step=seen.append, should_stop=lambda: len(seen) == 2)
    result, _, _ = train(tmp_path / "run", tight, callbacks=stop)
    assert told[0].micro_batches > 1 and told[0].predicted_bytes <= 0.6 * held
    assert result.steps == 2
    state = run_folder.load_state(tmp_path / "run")
    assert state.progress["guard"]["micro_batches"] == told[0].micro_batches


def test_of_several_parts_the_largest_drift_counts():
    def figures(drift: float | None) -> guard.Figures:
        value = None if drift is None else torch.tensor(drift)
        return {figure: {"layer1": value if figure == "drift" else None} for figure in guard.FIGURES}

    found = guard.together([figures(0.1), figures(0.3), figures(0.2)])
    assert found["drift"]["layer1"] == torch.tensor(0.3) and found["contraction"]["layer1"] is None
    assert guard.together([figures(None), figures(0.2)])["drift"]["layer1"] == torch.tensor(0.2)


@pytest.mark.parametrize(("optimizer", "slots"), [("momentum", 1), ("adamw", 2), ("sgd", 1), ("lion", 1)])
def test_what_an_optimizer_keeps_is_found_by_a_step(optimizer, slots):
    random = torch.get_rng_state()
    assert optimizer_slots(Settings(optimizer=optimizer)) == slots
    assert torch.equal(random, torch.get_rng_state())


def test_a_dry_run_says_what_a_run_would_take_and_writes_nothing(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    run = ["finetune", "m.safetensors", "--trust-source", "--data", "digits", "-o", "out", "-b", "16", "--json"]
    assert main([*run, "--dry-run", "--max-steps", "7"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dry_run"] and found["steps"] == 7 and found["adjoints"]["stem"] == "backprop"
    trained = sum(p.numel() for p in model.parameters())
    assert found["trained"] == trained and found["optimizer"] == found["gradients"] == 4 * trained
    total = found["weights"] + found["gradients"] + found["optimizer"] + found["activations"]
    assert total < found["predicted_bytes"] <= 1.1 * total
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert main([*run, "--dry-run", "--adjoint", "checkpoint", "--bits", "4"]) == 0
    coded = json.loads(capsys.readouterr().out)
    assert coded["activations"] < found["activations"] and "4 bits" in coded["adjoints"]["layer2"]
    assert main([*run, "--dry-run", "--memory-budget", "1KiB"]) == 1
    assert "a training step takes at least" in capsys.readouterr().err
    assert main([*run, "--dry-run", "--resume"]) == 2
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_dry_run_fails_where_a_step_would_not_fit(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("resode_cli.training.dry_run.free_bytes", lambda device: 1000)
    run = ["finetune", "m.safetensors", "--trust-source", "--data", "digits", "-o", "out", "-b", "16"]
    assert main([*run, "--dry-run", "--adjoint", "backprop"]) == 1
    assert (
        "are free; use --adjoint auto, a smaller --batch-size ('auto' finds one), or --accumulate auto"
        in capsys.readouterr().err
    )


def test_a_network_that_cannot_be_simulated_is_told_so(model, tmp_path):
    def decides(_: nn.Module, given: tuple[torch.Tensor]) -> torch.Tensor:
        (x,) = given
        return x if float(x.detach().sum()) > 1e9 else x * 1

    model.net.conv1.register_forward_pre_hook(decides)
    with pytest.raises(ResodeError, match="cannot be run without numbers"):
        Simulation(model, "cpu").step(Adjoint(), (4, 3, 8, 8))
    told: list[str] = []
    images = data.open_data("digits", PRE, "train", augment=False, images=40)
    settings = replace(SETTINGS, adjoint="auto", max_steps=1)
    run = {"settings": settings, "device": torch.device("cpu"), "callbacks": Callbacks(on_message=told.append)}
    result = finetune(model, images, None, out=tmp_path / "run", **run)
    assert set(result.adjoints.values()) == {"checkpoint"} and any(
        "evaluates every part again" in text for text in told
    )
    with pytest.raises(ResodeError, match="leave out the budget, or give --adjoint checkpoint"):
        run["settings"] = replace(settings, memory_budget="1GiB")
        finetune(model, images, None, out=tmp_path / "other", **run)


@lru_cache
def grid(size: int) -> torch.Tensor:
    return torch.linspace(0.9, 1.1, size)


def test_a_cache_of_the_users_own_holds_no_simulated_tensors(model, tmp_path):
    class Scales(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * grid(x.shape[-1])

    grid.cache_clear()
    model.net.conv1 = nn.Sequential(model.net.conv1, Scales())
    Simulation(model, "cpu").step(Adjoint("checkpoint"), (4, 3, 8, 8))
    assert type(grid(8)) is torch.Tensor
    assert type(model(torch.randn(2, 3, 8, 8))) is torch.Tensor


def test_what_a_network_keeps_elsewhere_is_no_simulated_tensor_unsaid(model):
    kept: list[torch.Tensor] = []
    model.net.conv1.register_forward_hook(lambda module, given, out: kept.append(out))
    with pytest.raises(ResodeError, match="it keeps tensors that it computes, outside of its modules"):
        Simulation(model, "cpu").step(Adjoint(), (4, 3, 8, 8))


def test_a_budget_holds_given_parts_and_a_teacher_too(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = ["finetune", "m.safetensors", "--trust-source", "--data", "digits", "-o", "out", "-b", "64"]
    run += ["--dry-run", "--json"]
    assert main([*run, "--micro-batches", "4"]) == 0
    free = json.loads(capsys.readouterr().out)["predicted_bytes"]
    budget = int(0.9 * free)
    assert main([*run, "--micro-batches", "4", "--memory-budget", f"{budget}B"]) == 0
    assert json.loads(capsys.readouterr().out)["predicted_bytes"] <= 1.02 * budget
    assert main([*run, "--teacher", "m.safetensors"]) == 0
    taught = json.loads(capsys.readouterr().out)["predicted_bytes"]
    assert main(run) == 0
    plain = json.loads(capsys.readouterr().out)["predicted_bytes"]
    assert taught - plain == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
