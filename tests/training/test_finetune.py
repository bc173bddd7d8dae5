"""Training runs: resumable to the bit, interruptible, and never silently wrong."""

from __future__ import annotations

import csv
import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resode_cli import data
from resode_cli.app import main
from resode_cli.errors import ResodeError, UsageError
from resode_cli.files import model_file
from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import Preprocessing
from resode_cli.surgery.rewrite import deepen, untie
from resode_cli.training import run_folder
from resode_cli.training.finetune import finetune
from resode_cli.training.results import Callbacks
from resode_cli.training.resuming import check_resumable
from resode_cli.training.settings import Settings

PRE = Preprocessing(size=8, crop_fraction=1.0)
SETTINGS = Settings(adjoint="pc", batch_size=16, max_steps=6, lr=0.05, log_every=2, save_every=2, on_drift="warn")


@pytest.fixture
def model(pico: OdeResNet) -> OdeResNet:
    for name, stage in pico.stages.items():
        pico.replace_stage(name, untie(deepen(stage, 4)))
    return pico


def train(model: OdeResNet, out: Path, settings: Settings, **kwargs):
    images = data.open_data("digits", PRE, "train", augment=True, images=96, seed=settings.seed)
    test = data.open_data("digits", PRE, "test", images=20)
    return finetune(model, images, test, out=out, settings=settings, device=torch.device("cpu"), **kwargs)


def rows(out: Path, split: str) -> list[dict[str, str]]:
    with (out / "log.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["split"] == split]


def stop_after(step: int) -> Callbacks:
    seen = []
    return Callbacks(on_step=seen.append, should_stop=lambda: len(seen) >= step)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_resumed_equals_uninterrupted_to_the_bit(model, tmp_path, optimizer, assert_ran_by) -> None:
    """Stopped where a state is saved in any case, and in between."""
    settings = replace(SETTINGS, optimizer=optimizer, epochs=2, max_steps=8, bn="batch", lr=0.01)
    model_file.save(model, tmp_path / "m.safetensors")
    train(model, tmp_path / "whole", settings)
    whole = model_file.load(tmp_path / "whole" / "last.safetensors").state_dict()
    losses = [row["loss"] for row in rows(tmp_path / "whole", "train")]
    assert len(losses) == 4
    for stop in (2, 3):
        folder = tmp_path / f"stopped at {stop}"
        part = train(model_file.load(tmp_path / "m.safetensors"), folder, settings, callbacks=stop_after(stop))
        assert part.interrupted and part.steps == stop
        state = run_folder.load_state(folder)
        done = train(state.model, folder, settings, resume=state)
        assert done.steps == 8 and not done.interrupted
        parts = model_file.load(folder / "last.safetensors").state_dict()
        assert all(torch.equal(whole[k], parts[k]) for k in whole)
        assert [row["loss"] for row in rows(folder, "train")] == losses
        assert_ran_by(folder, "pc")
    assert_ran_by(tmp_path / "whole", "pc")


def test_checkpoint_trains_exactly_as_backprop(model, tmp_path, assert_ran_by) -> None:
    model_file.save(model, tmp_path / "m.safetensors")
    for method in ("backprop", "checkpoint"):
        loaded = model_file.load(tmp_path / "m.safetensors")
        train(loaded, tmp_path / method, replace(SETTINGS, adjoint=method, bn="batch"))
        assert_ran_by(tmp_path / method, method)
    states = [model_file.load(tmp_path / m / "last.safetensors").state_dict() for m in ("backprop", "checkpoint")]
    assert all(torch.allclose(states[0][k], states[1][k], rtol=1e-4, atol=1e-6) for k in states[0])


def test_training_lowers_the_loss_and_writes_the_drift(model, tmp_path, assert_ran_by) -> None:
    result = train(model, tmp_path / "run", replace(SETTINGS, epochs=4, max_steps=24, bn="batch"))
    assert result.after.loss < result.before.loss
    logged = rows(tmp_path / "run", "train")
    assert float(logged[-1]["loss"]) < float(logged[0]["loss"])
    assert all(math.isfinite(float(row["drift_layer1"])) for row in logged)
    assert_ran_by(tmp_path / "run", "pc")


def test_only_the_chosen_stage_changes(model, tmp_path) -> None:
    before = {k: v.clone() for k, v in model.net.named_parameters()}
    train(model, tmp_path / "run", replace(SETTINGS, stages=("3",)))
    changed = {k for k, v in model.net.named_parameters() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith("layer3.") for k in changed)


@pytest.mark.parametrize("bn", ["frozen", "batch"])
def test_batch_norm_policy(model, tmp_path, bn) -> None:
    before = model.net.bn1.running_mean.clone()
    train(model, tmp_path / "run", replace(SETTINGS, bn=bn))
    assert torch.equal(model.net.bn1.running_mean, before) == (bn == "frozen")


def test_bf16_autocast_trains(model, tmp_path, assert_ran_by) -> None:
    result = train(model, tmp_path / "run", replace(SETTINGS, amp="bf16", bn="batch"))
    assert math.isfinite(result.after.loss)
    assert_ran_by(tmp_path / "run", "pc")


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_learning_rate_schedules(model, tmp_path, schedule) -> None:
    rates = []
    callbacks = Callbacks(on_step=lambda record: rates.append(record.lr))
    train(model, tmp_path / "run", replace(SETTINGS, schedule=schedule, max_steps=6), callbacks=callbacks)
    if schedule == "cosine":
        expected = [0.05 * (1 + math.cos(math.pi * n / 6)) / 2 for n in range(6)]
    else:
        expected = [0.05] * 6 if schedule == "constant" else [0.05, 0.05, 0.05, 0.005, 0.0005, 0.0005]
    assert rates == pytest.approx(expected)


def test_milestones_are_shares_of_the_run(model, tmp_path) -> None:
    rates = []
    callbacks = Callbacks(on_step=lambda record: rates.append(record.lr))
    settings = replace(SETTINGS, schedule="step", milestones="1/3, 2/3", max_steps=6)
    train(model, tmp_path / "run", settings, callbacks=callbacks)
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005])


@pytest.mark.parametrize("text", ["", "1", "0,1/2", "2/3,1/3", "1/2,1/2", "1/0", "a third", "nan"])
def test_milestones_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="shares of the run" if text else "of --schedule step|shares of the run"):
        replace(SETTINGS, schedule="step", milestones=text)


def test_milestones_go_with_steps_alone() -> None:
    with pytest.raises(UsageError, match="--schedule cosine has none"):
        replace(SETTINGS, milestones="1/3")


def test_warmup_rises_linearly(model, tmp_path) -> None:
    rates = []
    callbacks = Callbacks(on_step=lambda record: rates.append(record.lr))
    train(model, tmp_path / "run", replace(SETTINGS, schedule="constant", warmup=4), callbacks=callbacks)
    assert rates == pytest.approx([0, 0.0125, 0.025, 0.0375, 0.05, 0.05])


def scale_last_norms(model: OdeResNet, factor: float) -> None:
    """Steps so large that no reversal can find its way back."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".bn2.weight" in name:
                parameter.mul_(factor)


def test_drift_is_reported_once_per_stage(model, tmp_path) -> None:
    scale_last_norms(model, 3.0)
    messages: list[str] = []
    callbacks = Callbacks(on_message=messages.append)
    train(model, tmp_path / "run", replace(SETTINGS, lr=1e-6, adjoint="euler"), callbacks=callbacks)
    assert any("layer1" in m and "not backprop's" in m for m in messages)
    assert len([m for m in messages if "stage layer1" in m]) == 1


@pytest.mark.parametrize("bn", ["frozen", "batch"])
def test_a_drifting_stage_moves_to_anchors_before_its_gradient_is_used(model, tmp_path, bn, assert_ran_by) -> None:
    scale_last_norms(model, 40.0)
    model_file.save(model, tmp_path / "m.safetensors")
    settings = replace(SETTINGS, lr=1e-4, clip_grad=1.0, bn=bn)
    result = train(model, tmp_path / "run", replace(settings, adjoint="euler", on_drift="anchors"))
    assert "layer1" in result.moved_to_anchors
    assert model.stages["layer1"].adjoint.method == "checkpoint"
    exact = model_file.load(tmp_path / "m.safetensors")
    train(exact, tmp_path / "exact", replace(settings, adjoint="checkpoint"))
    assert_ran_by(tmp_path / "exact", "checkpoint")
    assert len(result.moved_to_anchors) == 3
    for name, value in exact.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, rtol=1e-4, atol=1e-6), name


def test_states_that_overflow_stop_the_run(model, tmp_path) -> None:
    scale_last_norms(model, 1e20)
    with pytest.raises(ResodeError, match="off by|loss is"):
        train(model, tmp_path / "run", replace(SETTINGS, adjoint="euler"))


def test_drift_can_stop_the_run(model, tmp_path) -> None:
    scale_last_norms(model, 40.0)
    with pytest.raises(ResodeError, match="layer"):
        train(model, tmp_path / "run", replace(SETTINGS, lr=1e-6, adjoint="euler", on_drift="stop"))


def test_a_loss_that_is_not_finite_stops_the_run(model, tmp_path) -> None:
    with torch.no_grad():
        model.net.linear.weight.fill_(1e38)
    with pytest.raises(ResodeError, match="the loss is (nan|inf) at step 1; nothing was saved yet"):
        train(model, tmp_path / "run", SETTINGS)


def test_resume_refuses_another_order_of_images(model, tmp_path) -> None:
    train(model, tmp_path / "run", SETTINGS, callbacks=stop_after(2))
    state = run_folder.load_state(tmp_path / "run")
    images = data.open_data("digits", PRE, "train", images=96)
    with pytest.raises(UsageError, match="batch_size was 16, is 8"):
        check_resumable(state, images, None, replace(SETTINGS, batch_size=8))


def test_a_state_is_not_taken_for_a_model(model, tmp_path) -> None:
    train(model, tmp_path / "run", SETTINGS)
    with pytest.raises(ResodeError, match="state of a run"):
        model_file.load(tmp_path / "run" / "state.safetensors")


def test_a_resumed_command_keeps_the_settings_it_does_not_name(model, tmp_path, monkeypatch, assert_ran_by) -> None:
    monkeypatch.chdir(tmp_path)
    model_file.save(model, tmp_path / "m.safetensors")
    begin = ["finetune", "m.safetensors", "--data", "digits", "-o", "run", "--images", "64", "--test-images", "20"]
    assert (
        main([*begin, "--adjoint", "pc", "--lr", "0.02", "--batch-size", "16", "--max-steps", "2", "--stage", "3"]) == 0
    )
    assert main([*begin, "--resume", "--max-steps", "4"]) == 0
    state = run_folder.load_state(tmp_path / "run")
    kept = {name: state.settings[name] for name in ("adjoint", "lr", "batch_size", "max_steps", "stages")}
    assert kept == {"adjoint": "pc", "lr": 0.02, "batch_size": 16, "max_steps": 4, "stages": ["layer3"]}
    assert state.progress["step"] == 4
    assert_ran_by(tmp_path / "run", "pc")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_can_go_on(model, tmp_path, kind, start) -> None:
    model_file.save(model, tmp_path / "m.safetensors")
    arguments = "finetune m.safetensors --data digits --adjoint pc --epochs 500 --save-every 5 --batch-size 16"
    arguments += " --images 96 --test-images 20 -o run --log-every 5 --eval-every 500 --trust-source"
    process = start(*arguments.split(), until="run/last.safetensors")
    process.send_signal(kind)
    _, stderr = process.communicate(timeout=120)
    if kind == signal.SIGINT:
        assert process.returncode == 130 and "--resume" in stderr and "Traceback" not in stderr
    steps = run_folder.load_state(tmp_path / "run").progress["step"]
    assert steps >= 5 and model_file.load(tmp_path / "run" / "last.safetensors")
    if kind == signal.SIGKILL:
        assert steps % 5 == 0  # the last save; what was done since is lost, no more
