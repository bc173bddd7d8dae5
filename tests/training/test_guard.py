"""auto in a training run: what it stores, and what happens when a stage drifts."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resode_cli import data
from resode_cli.errors import ResodeError
from resode_cli.files import model_file
from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import Preprocessing
from resode_cli.ode import Adjoint
from resode_cli.surgery.rewrite import deepen
from resode_cli.training import guard, run_folder
from resode_cli.training.finetune import finetune
from resode_cli.training.results import Callbacks
from resode_cli.training.settings import Settings

PRE = Preprocessing(size=8, crop_fraction=1.0)
SETTINGS = Settings(batch_size=16, max_steps=6, lr=0.01, log_every=1, save_every=2)
LEAN = replace(SETTINGS, memory_budget="lean")  # or plain backprop would be chosen, which fits


@pytest.fixture
def model(pico: OdeResNet, tmp_path: Path) -> OdeResNet:
    """As few steps as leave `auto` both to choose: a stage that is reconstructed, and others that are not."""
    for name, stage in pico.stages.items():
        pico.replace_stage(name, deepen(stage, 8))
    model_file.save(pico, tmp_path / "m.safetensors")
    return pico


def train(model: OdeResNet, out: Path, settings: Settings, **kwargs):
    images = data.open_data("digits", PRE, "train", augment=True, images=96, seed=settings.seed)
    test = data.open_data("digits", PRE, "test", images=20)
    return finetune(model, images, test, out=out, settings=settings, device=torch.device("cpu"), **kwargs)


def log(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["split"] == "train"]


def scale_last_norms(model: OdeResNet, factor: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".bn2.weight" in name:
                parameter.mul_(factor)


def test_where_everything_fits_auto_is_plain_backprop(model, tmp_path):
    result = train(model, tmp_path / "run", replace(SETTINGS, max_steps=1))
    assert set(result.adjoints.values()) == {"backprop"} and model.stem.adjoint == Adjoint("backprop")
    assert result.chosen is not None and result.chosen.images == 0  # nothing was measured


def test_auto_is_the_default_and_its_decision_is_stored(model, tmp_path):
    assert Settings().adjoint == "auto" and Settings().on_drift == "anchors"
    told = []
    result = train(model, tmp_path / "run", LEAN, callbacks=Callbacks(on_choice=told.append))
    assert len(told) == 1 and {c.piece for c in told[0].stages} == {"layer1", "layer2", "layer3"}
    assert result.adjoints == {c.piece: c.adjoint.label for c in told[0].stages}
    stored = run_folder.load_state(tmp_path / "run").progress["guard"]["adjoints"]
    assert {name: Adjoint(**values) for name, values in stored.items()} == told[0].adjoints
    history = model_file.load(tmp_path / "run" / "last.safetensors").info.history
    assert [entry for entry in history if entry["command"] == "calibrate"]


def test_a_resumed_run_goes_on_with_the_stored_decision(model, tmp_path, monkeypatch):
    train(model, tmp_path / "whole", LEAN)
    seen = []
    stop = Callbacks(on_step=seen.append, should_stop=lambda: len(seen) >= 3)
    train(model_file.load(tmp_path / "m.safetensors"), tmp_path / "parts", LEAN, callbacks=stop)
    monkeypatch.setattr(guard, "choose_adjoints", lambda *args, **kwargs: pytest.fail("calibrated again"))
    state = run_folder.load_state(tmp_path / "parts")
    train(state.model, tmp_path / "parts", LEAN, resume=state)
    whole, parts = (model_file.load(tmp_path / n / "last.safetensors").state_dict() for n in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


@pytest.mark.parametrize("adjoint", ["pc", "multistep", "auto"])
def test_a_stage_made_to_drift_moves_to_anchors_within_one_step(adjoint, model, tmp_path, assert_ran_by):
    # After the second step the branches are scaled until no reversal contracts; no step may be taken on its gradient.
    scale_last_norms(model, 0.1)
    model_file.save(model, tmp_path / "m.safetensors")
    losses: dict[str, list[float]] = {}
    messages: list[str] = []
    results = {}
    for name in (adjoint, "backprop"):
        loaded = model_file.load(tmp_path / "m.safetensors")
        contraction: list[float] = []

        def spoil(record, loaded=loaded, contraction=contraction):
            if record.step == 2:
                scale_last_norms(loaded, 400.0)
            known = [value for value in record.monitor["contraction"].values() if value is not None]
            contraction.append(max(known, default=0.0))

        callbacks = Callbacks(on_step=spoil, on_message=messages.append)
        settings = replace(
            LEAN if name == "auto" else SETTINGS,
            adjoint=name,
            lr=1e-4,
            clip_grad=1.0,
            grad_tol=0.3,
            drift_tolerance=0.5,
        )
        results[name] = train(loaded, tmp_path / name, settings, callbacks=callbacks)
        losses[name] = [float(row["loss"]) for row in log(tmp_path / name)]
    assert losses[adjoint] == pytest.approx(losses["backprop"], rel=2e-3)
    assert_ran_by(tmp_path / "backprop", "backprop")
    result = results[adjoint]
    assert result.moved_to_anchors or result.recalibrations
    assert any("step 3:" in message for message in messages) and "taken again" in messages[0]
    rows = log(tmp_path / adjoint)
    assert all(float(row["drift_layer1"]) < 0.5 for row in rows[:2])
    assert all(row["drift_layer1"] == "" for row in rows[2:])


def test_the_spoiled_stage_really_does_not_contract(model):
    scale_last_norms(model, 0.1 * 400)
    model.use_adjoint(Adjoint("multistep"))
    images = data.open_data("digits", PRE, "test", images=20)
    model.eval()(next(data.batches(images, 20)).images).square().sum().backward()
    found = [stage.monitor.contraction.item() for stage in model.stages.values()]
    assert any(not value < 1 for value in found)  # not finite counts: the reversal has run away


def test_drift_past_what_was_calibrated_calibrates_again_and_then_anchors(model, tmp_path):
    scale_last_norms(model, 0.02)  # so that a reversal is accurate at first
    messages: list[str] = []
    told = []

    def spoil(record):
        if record.step in (2, 3):
            scale_last_norms(model, 60.0)

    callbacks = Callbacks(on_step=spoil, on_message=messages.append, on_choice=told.append)
    settings = replace(LEAN, lr=1e-5, clip_grad=1.0)
    result = train(model, tmp_path / "run", settings, callbacks=callbacks)
    assert {c.adjoint.method for c in told[0].stages} == {"multistep"}
    assert result.recalibrations + len(result.moved_to_anchors) >= 1
    assert all(stage.adjoint.method == "checkpoint" for stage in model.stages.values())


def test_settings_reach_the_stages(model, tmp_path):
    for settings, expected in (
        ({"adjoint": "checkpoint", "snapshots": 3}, Adjoint("checkpoint", snapshots=3)),
        ({"adjoint": "pc", "corrections": 2, "anchors": "4"}, Adjoint("pc", 4, 2)),
    ):
        train(model, tmp_path / "run", replace(SETTINGS, max_steps=1, on_drift="warn", **settings))
        assert {stage.adjoint for stage in model.stages.values()} == {expected}
    train(model, tmp_path / "run", replace(SETTINGS, max_steps=1, adjoint="pc", anchors="auto"))
    assert {stage.adjoint.method for stage in model.stages.values()} == {"pc"}


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_auto_calibrates_under_autocast(amp, model, tmp_path):
    result = train(model, tmp_path / "run", replace(LEAN, amp=amp, max_steps=2))
    assert result.steps == 2 and result.chosen is not None


def test_a_tolerance_that_a_resumed_run_lowers_binds_stages_that_auto_has_calibrated(model, tmp_path):
    settings = replace(LEAN, grad_tol=0.5, max_steps=2)
    train(model, tmp_path / "run", settings)
    state = run_folder.load_state(tmp_path / "run")
    assert state.progress["guard"]["allowed"], "no stage is reconstructed with drift, so that nothing is tried"
    lower = replace(settings, max_steps=4, drift_tolerance=1e-12, on_drift="stop")
    with pytest.raises(ResodeError, match="allowed 1e-12"):
        train(state.model, tmp_path / "run", lower, resume=state)


def test_a_part_that_keeps_its_activations_all_the_same_is_said_once(model, tmp_path):
    messages: list[str] = []
    model.stages["layer2"].entry.kept[(True,)] = "it writes to its input"
    train(model, tmp_path / "run", replace(SETTINGS, max_steps=3), callbacks=Callbacks(on_message=messages.append))
    said = [message for message in messages if "keeps its activations" in message]
    assert len(said) == 1 and "layer2 transition" in said[0] and said[0].endswith("it writes to its input")
