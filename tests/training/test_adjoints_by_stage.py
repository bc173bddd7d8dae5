"""Runs whose stages go by different adjoints: their gradients, their forward rules, and the watch over each stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resode_cli import data
from resode_cli.app import main
from resode_cli.files import model_file
from resode_cli.gradients.probe import relative_error
from resode_cli.network.model import OdeResNet, freeze_batch_norm
from resode_cli.network.parts import Preprocessing
from resode_cli.ode import Adjoint
from resode_cli.surgery.rewrite import deepen
from resode_cli.training import run_folder
from resode_cli.training.finetune import finetune
from resode_cli.training.loop import training_batches
from resode_cli.training.objective import Objective
from resode_cli.training.results import Callbacks
from resode_cli.training.settings import Settings

PRE = Preprocessing(size=8, crop_fraction=1.0)
SETTINGS = Settings(batch_size=16, max_steps=1, lr=0.01, weight_decay=0.0, log_every=1, save_every=2, augment=False)
BEGIN = "finetune m.safetensors --data digits --images 48 --test-images 20 --batch-size 16 --max-steps 2 --device cpu"
Gradients = dict[str, torch.Tensor]


@pytest.fixture
def model(pico: OdeResNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OdeResNet:
    """In double precision, with steps that can be run backwards, but not exactly."""
    for name, stage in pico.stages.items():
        pico.replace_stage(name, deepen(stage, 8))
    with torch.no_grad():
        for name, parameter in pico.named_parameters():
            if ".bn2.weight" in name:
                parameter.mul_(0.3)
    pico.double()
    model_file.save(pico, tmp_path / "m.safetensors")
    monkeypatch.chdir(tmp_path)
    return pico


def images(settings: Settings) -> data.ImageData:
    return data.open_data("digits", PRE, "train", augment=settings.augment, images=96, seed=settings.seed)


def train(model: OdeResNet, out: Path, settings: Settings, **more):
    return finetune(model, images(settings), None, out=out, settings=settings, device="cpu", **more)


def gradients_of_the_first_step(adjoint: str, tmp_path: Path) -> Gradients:
    loaded, found = model_file.load(tmp_path / "m.safetensors"), {}

    def look(_: object) -> None:
        found.update({name: p.grad.clone() for name, p in loaded.net.named_parameters() if p.grad is not None})

    train(loaded, tmp_path / f"run {adjoint}", replace(SETTINGS, adjoint=adjoint), callbacks=Callbacks(on_step=look))
    return found


def by_hand(tmp_path: Path, adjust: Callable[[OdeResNet], None]) -> Gradients:
    """Gradients of the first batch of such a run."""
    model = model_file.load(tmp_path / "m.safetensors")
    model.use_adjoint(Adjoint("backprop"))
    adjust(model)
    model.train()
    freeze_batch_norm(model)
    batches = training_batches(images(SETTINGS), range(96), 16, seed=SETTINGS.seed, epoch=0)
    batch = next(batches)
    batches.close()
    Objective(model, None, SETTINGS)(batch.images, batch.labels)[0].backward()
    return {name: p.grad for name, p in model.net.named_parameters() if p.grad is not None}


def stage_error(exact: Gradients, found: Gradients, stage: str) -> float:
    names = [name for name in exact if name.startswith(f"{stage}.")]
    assert names
    return relative_error([exact[name] for name in names], [found[name] for name in names])


def test_the_gradients_are_those_of_a_model_with_one_stage_set_by_hand(model, tmp_path, assert_ran_by):
    exact, everywhere = by_hand(tmp_path, lambda m: None), by_hand(tmp_path, lambda m: m.use_adjoint(Adjoint("euler")))
    one = by_hand(tmp_path, lambda m: m.stages["layer3"].use_adjoint(Adjoint("euler")))
    for adjoint in ("layer3=euler", "backprop,3=euler"):  # where everything fits, auto is plain backprop
        found = gradients_of_the_first_step(adjoint, tmp_path)
        assert found.keys() == exact.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, one[name], rtol=1e-10, atol=1e-14)
        assert stage_error(exact, found, "layer3") > 1e-4
        assert stage_error(everywhere, found, "layer1") > 1e-4
        named = {"layer1": "backprop", "layer2": "backprop", "layer3": "euler"}
        assert_ran_by(tmp_path / f"run {adjoint}", named)


@pytest.mark.parametrize(
    ("adjoint", "methods"),
    [
        ("pc,layer3=euler", ("pc", "pc", "euler")),
        ("layer1=multistep,layer2=pc:corrections=1,layer3=euler", ("multistep", "pc", "euler")),
        ("checkpoint,1=heun,2=rk4", ("heun", "rk4", "checkpoint")),
    ],
)
def test_every_stage_ends_with_the_method_that_names_it(adjoint, methods, model, tmp_path, assert_ran_by):
    named = dict(zip(("layer1", "layer2", "layer3"), methods, strict=True))
    result = train(model, tmp_path / "run", replace(SETTINGS, adjoint=adjoint, max_steps=4))
    assert_ran_by(tmp_path / "run", named)
    assert {name: stage.adjoint.method for name, stage in model.stages.items()} == named
    assert {name: label.split(",")[0] for name, label in result.adjoints.items()} == named


def test_a_forward_rule_is_switched_in_the_stage_that_asks_for_it_alone(model, tmp_path, assert_ran_by):
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    kept = {name: stage.spec.scheme for name, stage in model.stages.items()}
    inputs: dict[str, torch.Tensor] = {}
    for name, stage in model.stages.items():
        stage.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach()}))
    model.eval()(x)
    given = dict(inputs)
    before = {name: stage.eval()(given[name]).detach() for name, stage in model.stages.items()}
    messages: list[str] = []
    callbacks = Callbacks(on_message=messages.append)
    train(model, tmp_path / "run", replace(SETTINGS, adjoint="pc,layer2=heun", lr=1e-30), callbacks=callbacks)
    assert {name: stage.spec.scheme for name, stage in model.stages.items()} == {**kept, "layer2": "heun"}
    for name, stage in model.stages.items():
        same = torch.allclose(stage.eval()(given[name]), before[name], rtol=1e-12, atol=1e-12)
        assert same == (name != "layer2"), name
    assert_ran_by(tmp_path / "run", {"layer1": "pc", "layer2": "heun", "layer3": "pc"})
    assert [m for m in messages if m.startswith("adjoint heun: the forward rule of layer2 is now heun; on ")]
    last = model_file.load(tmp_path / "run" / "last.safetensors")
    assert {name: stage.spec.scheme for name, stage in last.stages.items()} == {**kept, "layer2": "heun"}
    switch = next(entry for entry in last.info.history if entry["command"] == "switch-scheme")
    assert switch["stages"] == {"layer2": "heun"} and switch["max_logit_difference"] > 0


@pytest.mark.parametrize("adjoint", ["pc,layer1=heun,layer3=euler", "layer3=euler"])
def test_a_resumed_run_goes_on_to_the_bit(adjoint, model, tmp_path, assert_ran_by):
    settings = replace(SETTINGS, adjoint=adjoint, max_steps=6, memory_budget="lean" if "pc" not in adjoint else None)
    train(model, tmp_path / "whole", settings)
    seen: list[object] = []
    stop = Callbacks(on_step=seen.append, should_stop=lambda: len(seen) >= 3)
    part = train(model_file.load(tmp_path / "m.safetensors"), tmp_path / "parts", settings, callbacks=stop)
    assert part.interrupted and part.steps == 3
    state = run_folder.load_state(tmp_path / "parts")
    assert state.settings["adjoint"] == adjoint
    train(state.model, tmp_path / "parts", settings, resume=state)
    whole, parts = (model_file.load(tmp_path / n / "last.safetensors").state_dict() for n in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    ended = {name: stage.adjoint.method for name, stage in model.stages.items()}
    assert ended["layer3"] == "euler" and (ended["layer1"] == "heun") == ("heun" in adjoint)
    for name in ("whole", "parts"):
        assert_ran_by(tmp_path / name, ended)


def scale_last_norms(model: OdeResNet, stage: str, factor: float) -> None:
    with torch.no_grad():
        for name, parameter in model.stages[stage].named_parameters():
            if "bn2.weight" in name:
                parameter.mul_(factor)


def test_one_stage_that_drifts_moves_to_anchors_and_the_others_stay(model, tmp_path, assert_ran_by):
    scale_last_norms(model, "layer3", 300.0)
    messages: list[str] = []
    settings = replace(SETTINGS, adjoint="pc,layer3=euler", max_steps=3, lr=1e-6, clip_grad=1.0)
    result = train(model, tmp_path / "run", settings, callbacks=Callbacks(on_message=messages.append))
    assert_ran_by(tmp_path / "run", "pc", moved=["layer3"])
    assert result.moved_to_anchors == ("layer3",) and "stage layer3 is moved to anchors" in messages[0]


def test_what_was_moved_to_anchors_is_not_chosen_anew(model, tmp_path):
    """One stage that was chosen and one that was named drift at once: each is answered in its own way."""
    for name in model.stages:
        scale_last_norms(model, name, 0.1)
    told = []

    def spoil(record) -> None:
        if record.step == 22:  # past the steps in which a choice is not made again
            for name in ("layer1", "layer3"):
                scale_last_norms(model, name, 3000.0)

    callbacks = Callbacks(on_choice=told.append, on_step=spoil)
    settings = replace(
        SETTINGS, adjoint="layer3=euler", memory_budget="lean", max_steps=24, lr=1e-9, clip_grad=1.0, grad_tol=0.3
    )
    result = train(model, tmp_path / "run", settings, callbacks=callbacks)
    first, again = ({c.piece: c for c in chosen.stages} for chosen in told)
    assert first["layer1"].own_drift is not None and first["layer3"].adjoint == Adjoint("euler")
    assert first["layer3"].error is None and first["layer3"].reason.startswith("as asked for")
    assert result.moved_to_anchors == ("layer3",) and result.recalibrations == 1
    assert again["layer3"].adjoint.method == "checkpoint" == model.stages["layer3"].adjoint.method
    assert model.stages["layer1"].adjoint == again["layer1"].adjoint


def test_the_plan_around_a_named_stage_is_within_its_budget(model, tmp_path):
    free, told = [], []
    train(model, tmp_path / "free", replace(SETTINGS, batch_size=64), callbacks=Callbacks(on_choice=free.append))
    budget = int(0.6 * free[0].predicted_bytes)
    settings = replace(SETTINGS, adjoint="layer2=checkpoint:bits=4", memory_budget=f"{budget}B", batch_size=64)
    loaded = model_file.load(tmp_path / "m.safetensors")
    train(loaded, tmp_path / "tight", settings, callbacks=Callbacks(on_choice=told.append))
    assert told[0].predicted_bytes <= budget
    assert loaded.stages["layer2"].adjoint == Adjoint("checkpoint", bits=4)
    assert {c.adjoint.method for c in told[0].stages} != {"backprop"}


def test_commands_and_recipes_name_every_stages_method(model, tmp_path, capsys, assert_ran_by):
    Path("mine.toml").write_text('[finetune]\nadjoint = "pc,3=euler:anchors=4"\ncorrections = 1\n')
    begin = [*BEGIN.split(), "--recipe", "mine.toml"]
    labels = {"layer1": "pc, 1 correction", "layer2": "pc, 1 correction", "layer3": "euler, anchors 4, 1 correction"}
    line = "; ".join(f"{name} {label}" for name, label in labels.items())
    assert main([*begin, "-o", "dry", "--dry-run"]) == 0
    assert f"adjoints: stem checkpoint; {line}\n" in capsys.readouterr().out and not Path("dry").exists()
    assert main([*begin, "-o", "run"]) == 0
    assert f"adjoints: {line}\n" in capsys.readouterr().out
    assert_ran_by(tmp_path / "run", {"layer1": "pc", "layer2": "pc", "layer3": "euler"})
    assert run_folder.load_state(tmp_path / "run").settings["adjoint"] == "pc,layer3=euler:anchors=4"
    again = [*BEGIN.split(), "-o", "run", "--resume", "--max-steps", "3"]
    assert main([*again, "--adjoint", "layer3=euler:anchors=4 , pc", "--json"]) == 0  # the same, spelled otherwise
    assert json.loads(capsys.readouterr().out)["adjoints"] == labels
    assert main([*again[:-1], "4", "--adjoint", "pc,layer3=euler"]) == 2
    assert "--adjoint pc,layer3=euler: the run has pc,layer3=euler:anchors=4, and keeps it" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_stage_that_there_is_not_is_one_line_before_any_work(more, model, tmp_path, capsys):
    # Nor is the data looked at.
    assert main([*BEGIN.replace("digits", "none").split(), "-o", "run", "--adjoint", "layr3=euler", *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "unknown stage 'layr3'; did you mean layer3" in error
    assert not (tmp_path / "run" / "log.csv").exists()
