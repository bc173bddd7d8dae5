"""Fitting a rewritten network to the one it came from."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resode_cli.data import Batch
from resode_cli.data.workers import WorkerDied, WorkersStuck
from resode_cli.errors import UsageError
from resode_cli.files import model_file
from resode_cli.fitting import fit as fit_module
from resode_cli.fitting.fit import fit
from resode_cli.fitting.images import FitData, held_out
from resode_cli.fitting.penalties import contraction, roughness
from resode_cli.fitting.results import FitCallbacks, FitResult, PhaseCost, PhaseResult
from resode_cli.fitting.settings import FitSettings
from resode_cli.network.model import OdeResNet
from resode_cli.surgery.rewrite import deepen, tie
from resode_cli.training.loop import training_batches
from resode_cli.training.optimization import create_optimizer
from resode_cli.training.settings import Settings
from resode_cli.training.teacher import Teacher, own_teacher

CPU = torch.device("cpu")
ALL = ("blocks", "logits", "refine")
FAST = FitSettings(
    phases=ALL, steps=12, refine_steps=4, images=48, batch_size=12, lr=3e-3, logits_lr=3e-3, augment=False
)

BRIEF = replace(FAST, steps=3, refine_steps=2)  # where it is not asked what a fit achieves


def state(model: OdeResNet) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def student_of(model: OdeResNet, form: str = "pre") -> OdeResNet:
    for stage in model.stages.values():
        stage.spec = replace(stage.spec, form=form)
    return model


def run(model: OdeResNet, teacher: Teacher, data: FitData, settings: FitSettings = FAST, **arguments) -> FitResult:
    return fit(model, teacher, data, settings=settings, device=CPU, **arguments)


# What a fit leaves alone


@pytest.mark.parametrize("depth_weights", ["replicate", "linear", "tied", "tied+norms", "free"])
def test_no_steps_are_the_rewrite_alone(build_tiny, pictures: FitData, depth_weights: str):
    model = build_tiny()
    plain = copy.deepcopy(model)
    depths = dict.fromkeys(model.stages, 8)
    result = run(
        model,
        own_teacher(model, "tiny"),
        pictures,
        replace(FAST, steps=0),
        depths=depths,
        depth_weights=depth_weights,
    )
    for name, stage in plain.stages.items():
        plain.replace_stage(name, deepen(stage, 8, depth_weights=depth_weights))
    assert result.phases == () and not result.recalibrated
    assert same(state(model), state(plain))
    assert [s.spec for s in model.stages.values()] == [s.spec for s in plain.stages.values()]


def test_a_network_that_is_a_finer_discretisation_of_itself_is_left_alone(build_tiny, pictures: FitData):
    """Branches of zero are solved exactly at any depth: nothing is to be gained, and nothing may move."""
    model = build_tiny()
    with torch.no_grad():
        for stage in model.stages.values():
            for block in stage.blocks:
                block.bn2.weight.zero_()
                block.bn2.bias.zero_()
    teacher = own_teacher(model, "tiny")
    for name, stage in model.stages.items():
        model.replace_stage(name, deepen(stage, 12))
    before = state(model)
    result = run(model, teacher, pictures, replace(FAST, phases=("blocks", "stages", "logits")))
    assert [(phase.ended, phase.steps) for phase in result.phases] == [("settled", 0)] * 3
    assert not result.recalibrated and same(state(model), before)


def test_a_phase_that_makes_things_worse_is_undone(pair, pictures: FitData):
    student, teacher = pair
    before = state(student)
    result = run(student, teacher, pictures, replace(FAST, phases=("logits",), logits_lr=30.0, bn="keep"))
    (phase,) = result.phases
    assert phase.ended == "reverted" and phase.after == phase.before
    assert same(state(student), before)


def test_the_teacher_does_not_move(pair, pictures: FitData):
    student, teacher = pair
    before = state(teacher.net)
    run(student, teacher, pictures, BRIEF)
    assert same(state(teacher.net), before)


# What it achieves


def test_states_and_logits_come_closer(pair, pictures: FitData):
    student, teacher = pair
    depths = dict.fromkeys(student.stages, 8)
    settings = replace(FAST, steps=60, phases=("blocks", "logits"))
    result = run(student, teacher, pictures, replace(settings, substeps=1), depths=depths)
    blocks, logits = result.phases
    assert blocks.after.state_error < 0.7 * blocks.before.state_error
    assert logits.after.logits < 0.7 * logits.before.logits
    assert {stage.spec.depth for stage in student.stages.values()} == {8}


@pytest.mark.parametrize("depth_weights", ["linear", pytest.param("tied+norms", marks=pytest.mark.slow)])
def test_a_shared_parametrisation_is_fitted_and_stays_shared(pair, pictures, tmp_path: Path, depth_weights: str):
    student, teacher = pair
    depths = dict.fromkeys(student.stages, 8)
    settings = replace(FAST, steps=40, phases=("blocks", "logits"))
    result = run(student, teacher, pictures, replace(settings, substeps=0), depths=depths, depth_weights=depth_weights)
    assert result.phases[-1].after.logits < result.phases[0].before.logits
    assert {stage.spec.kind for stage in student.stages.values()} == {depth_weights}


def test_a_tied_network_is_fitted_at_its_own_depth(tiny: OdeResNet, pictures: FitData):
    teacher = own_teacher(tiny, "tiny")
    for name, stage in tiny.stages.items():
        tiny.replace_stage(name, tie(stage))
    result = run(tiny, teacher, pictures, replace(FAST, steps=30, phases=("blocks", "logits")))
    assert result.phases[-1].after.logits < 0.7 * result.phases[0].before.logits
    assert {len(stage.blocks) for stage in tiny.stages.values()} == {1}


def test_penalties_pull_where_they_say(build_tiny, pictures: FitData):
    start, found = build_tiny(), {}
    for name, weights in (("plain", {}), ("bent", {"smooth": 3.0, "contract": 3.0})):
        student = copy.deepcopy(start)
        teacher = own_teacher(student, "tiny")
        run(student_of(student), teacher, pictures, replace(FAST, steps=24, phases=("logits",), states=0.0, **weights))
        x = torch.rand(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        stage = student.stages["layer1"]
        found[name] = (roughness(stage).item(), contraction(stage, 0, x).item())
    assert found["bent"][0] < 0.95 * found["plain"][0]
    assert found["bent"][1] < 0.95 * found["plain"][1]


# How it goes about it


def test_labels_are_not_looked_at(pair, pictures: FitData):
    student, teacher = pair
    other = copy.deepcopy(student)
    run(student, teacher, pictures, BRIEF)
    shuffled = FitData(_Relabelled(pictures.train), _Relabelled(pictures.plain))  # type: ignore[arg-type]
    run(other, teacher, shuffled, BRIEF)
    assert same(state(student), state(other))


class _Relabelled:
    """The same images with other labels."""

    def __init__(self, data) -> None:
        self.data, self.name = data, data.name

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key):
        image, label = self.data[key]
        return image, label + 1 + key[1]

    def received(self, batch):
        return batch


def test_the_seed_decides(build_tiny, pictures: FitData):
    states = []
    start = build_tiny()
    for seed in (0, 0, 1):
        model = copy.deepcopy(start)
        teacher = own_teacher(model, "tiny")
        run(student_of(model), teacher, pictures, replace(BRIEF, seed=seed))
        states.append(state(model))
    assert same(states[0], states[1]) and not same(states[0], states[2])


def test_every_phase_runs_at_its_depth_after_a_prediction(pair, pictures: FitData):
    student, teacher = pair
    phases: list[PhaseResult] = []
    costs: list[PhaseCost] = []
    handed: list[set[int]] = []
    callbacks = FitCallbacks(
        on_costs=costs.extend,
        on_phase=lambda phase, model: (
            phases.append(phase),
            handed.append({stage.spec.depth for stage in model.stages.values()}),
        ),
    )
    coarse = {name: stage.spec.depth for name, stage in student.stages.items()}
    settings = replace(BRIEF, substeps=1)
    result = run(student, teacher, pictures, settings, depths=dict.fromkeys(coarse, 9), callbacks=callbacks)
    assert [phase.depths for phase in phases] == [coarse, coarse, dict.fromkeys(coarse, 9)]
    assert [phase.steps for phase in result.phases] == [3, 3, 2] == [cost.steps for cost in costs]
    assert handed == [{9}] * 3, "what is handed on for saving has the final depth"
    assert all(cost.seconds_per_step > 0 and cost.bytes > 0 for cost in costs)
    # Blocks let go of each run's graph; end to end, all of it is kept.
    assert costs[0].bytes < costs[1].bytes < costs[2].bytes


@pytest.mark.parametrize("count", [3, 7])
def test_fewer_images_than_a_batch_are_one_batch(pair, pictures: FitData, count: int):
    student, teacher = pair
    few = copy.copy(pictures.plain)
    few.indices = few.indices[:count]
    result = run(student, teacher, FitData(few, few), replace(FAST, phases=("logits",), batch_size=64))
    assert result.phases[0].steps == 12


def test_no_steps_of_refine_leave_it_out(pair, pictures: FitData):
    student, teacher = pair
    costs: list[PhaseCost] = []
    result = run(
        student,
        teacher,
        pictures,
        replace(BRIEF, refine_steps=0),
        depths=dict.fromkeys(student.stages, 6),
        callbacks=FitCallbacks(on_costs=costs.extend),
    )
    assert [phase.phase for phase in result.phases] == [cost.phase for cost in costs] == ["blocks", "logits"]
    assert {stage.spec.depth for stage in student.stages.values()} == {6}


def test_an_interrupt_ends_the_phase_and_leaves_the_final_depth(pair, pictures: FitData):
    student, teacher = pair
    steps: list[int] = []
    callbacks = FitCallbacks(on_step=lambda step: steps.append(step.step), should_stop=lambda: len(steps) == 3)
    result = run(student, teacher, pictures, depths=dict.fromkeys(student.stages, 6), callbacks=callbacks)
    assert result.interrupted and len(result.phases) == 1 and result.phases[0].steps == 3
    assert {stage.spec.depth for stage in student.stages.values()} == {6}


@pytest.mark.slow
def test_a_loss_that_stops_falling_ends_the_phase(pair, pictures: FitData):
    student, teacher = pair
    every = len(pictures.plain) - len(held_out(len(pictures.plain)))  # in each batch: no noise
    settings = replace(FAST, phases=("logits",), steps=400, batch_size=every, logits_lr=1e-12)
    (phase,) = run(student, teacher, pictures, settings).phases
    # The first window is the lowest so far, and four more gain nothing.
    assert phase.steps == 200 + 5 * 25


def test_statistics_are_kept_or_re_estimated_as_asked(build_tiny, pictures: FitData):
    start = build_tiny()

    def statistics(bn: str) -> Tensor:
        model = copy.deepcopy(start)
        teacher = own_teacher(model, "tiny")
        for name, stage in model.stages.items():
            model.replace_stage(name, tie(stage))
        callbacks = FitCallbacks(on_message=messages.append)
        run(student_of(model), teacher, pictures, replace(BRIEF, phases=("blocks",), bn=bn), callbacks=callbacks)
        return model.stages["layer1"].blocks[0].bn1.running_mean.clone()

    messages: list[str] = []
    original = tie(start.stages["layer1"]).blocks[0].bn1.running_mean
    assert torch.equal(statistics("keep"), original)
    assert not messages
    assert not torch.equal(statistics("batch"), original)
    assert len(messages) == 1 and "estimated again: loss of the logits" in messages[0]


def test_exact_checkpoints_take_over_where_memory_is_short(pair, pictures: FitData, monkeypatch):
    student, teacher = pair
    costs: list[PhaseCost] = []
    monkeypatch.setattr("resode_cli.fitting.costs.free_bytes", lambda device: 1)
    run(student, teacher, pictures, BRIEF, callbacks=FitCallbacks(on_costs=costs.extend))
    assert {cost.adjoint for cost in costs} == {"checkpoint"}
    assert {stage.adjoint.method for stage in student.stages.values()} == {"checkpoint"}


def test_a_fitted_file_gives_the_same_logits(pair, pictures: FitData, images, tmp_path: Path):
    student, teacher = pair
    run(student, teacher, pictures, BRIEF, depths=dict.fromkeys(student.stages, 6), depth_weights="linear")
    model_file.save(student, tmp_path / "fitted.safetensors")
    loaded = model_file.load(tmp_path / "fitted.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), student(images))


def test_states_and_logits_have_rates_of_their_own(pair, pictures: FitData, monkeypatch):
    student, teacher = pair
    rates: list[float] = []

    def watched(model: OdeResNet, training: Settings) -> torch.optim.Optimizer:
        rates.append(training.lr)
        return create_optimizer(model, training)

    monkeypatch.setattr("resode_cli.training.loop.create_optimizer", watched)
    run(student, teacher, pictures, replace(BRIEF, logits_lr=1e-3))
    assert rates == pytest.approx([FAST.lr, 1e-3, 1e-3])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"phases": ("bloks",)}, "unknown fit phases 'bloks'.*blocks"),
        ({"phases": ("logits", "blocks")}, "in this order"),
        ({"phases": ()}, "in this order"),
        ({"bn": "frozen"}, "unknown fit bn"),
        ({"steps": -1}, "--fit-steps -1"),
        ({"smooth": -0.5}, "--smooth -0.5"),
        ({"temperature": 0.0}, "--temperature 0"),
        ({"lr": 0.0}, "--fit-lr 0"),
        ({"logits_lr": -1.0}, "--fit-logits-lr -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict, message: str):
    with pytest.raises(UsageError, match=message):
        replace(FAST, **change)


@pytest.mark.parametrize("death", [WorkerDied, WorkersStuck])
def test_a_worker_that_dies_in_a_phase_loses_no_step_of_it(death, pair, pictures: FitData, monkeypatch):
    """Five steps of twelve are judged and handed on before it fails; where images are stuck, no one can judge."""
    student, teacher = pair
    before, source, ended = state(student), training_batches, []

    def dying(*arguments: Any, **settings: Any) -> Iterator[Batch]:
        for place, batch in enumerate(source(*arguments, **settings)):
            if place == 5:
                raise death("a process that reads images died")
            yield batch

    monkeypatch.setattr(fit_module, "training_batches", dying)
    callbacks = FitCallbacks(on_phase=lambda result, model: ended.append((result, state(model))))
    with pytest.raises(death):
        run(student, teacher, pictures, replace(FAST, bn="keep"), callbacks=callbacks)
    if death is WorkersStuck:
        assert not ended
        return
    ((result, kept),) = ended
    assert (result.phase, result.steps, result.ended) == ("blocks", 5, "interrupted")
    assert result.after.state_error < result.before.state_error and not same(kept, before)


def test_of_several_labels_a_fit_sees_that_all_logits_moved_alike(tiny: OdeResNet, pictures: FitData):
    tiny.info = replace(tiny.info, multi_label=True)
    teacher = own_teacher(copy.deepcopy(tiny), "tiny")
    head = [layer for layer in tiny.net.modules() if isinstance(layer, torch.nn.Linear)][-1]
    with torch.no_grad():
        head.bias += 50
    result = fit(tiny, teacher, pictures, settings=replace(BRIEF, phases=("logits",), steps=1), device=CPU)
    before = result.phases[0].before
    assert before.logits > 1 and before.agreement < 1
