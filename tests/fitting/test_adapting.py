"""What a fit finds by itself: rates, rounds, which images it has seen."""

from __future__ import annotations

import copy
import signal
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from resode_cli.fitting import fit as fit_module
from resode_cli.fitting.fit import fit
from resode_cli.fitting.images import FitData, held_out
from resode_cli.fitting.objective import logits_error
from resode_cli.fitting.results import FitCallbacks, FitResult, FitStep
from resode_cli.fitting.rounds import PROBED_OVER, RATES
from resode_cli.fitting.settings import FitSettings
from resode_cli.machine.signals import Stopped
from resode_cli.network.model import OdeResNet
from resode_cli.surgery.batch_norm import recalibrate
from resode_cli.training.loop import Loop
from resode_cli.training.teacher import Teacher, distillation_loss

SETTINGS = FitSettings(phases=("logits",), steps=3, batch_size=6, bn="keep")


@pytest.fixture
def probing(monkeypatch) -> None:
    """However short a phase is, rates are tried for it."""
    monkeypatch.setattr("resode_cli.fitting.rounds.SMALL", 1e9)


def run(pair: tuple[OdeResNet, Teacher], data: FitData, settings: FitSettings, **arguments: Any) -> FitResult:
    student, teacher = pair
    return fit(student, teacher, data, settings=settings, device=torch.device("cpu"), **arguments)


@pytest.mark.usefixtures("probing")
def test_the_rate_that_was_best_over_a_short_phase_is_taken(pair, pictures: FitData, monkeypatch):
    monkeypatch.setattr(fit_module, "RATES", (1e-9, 3e-4, 30.0))
    (phase,) = run(pair, pictures, SETTINGS).phases
    assert phase.rate == 3e-4 and phase.ended == "done"


@pytest.mark.usefixtures("probing")
def test_a_probe_leaves_no_trace(pair, pictures: FitData, monkeypatch):
    """Its rates ruin the network, as does the one that is taken; all of it is undone."""
    monkeypatch.setattr(fit_module, "RATES", (30.0, 90.0))
    before = copy.deepcopy(pair[0].state_dict())
    (phase,) = run(pair, pictures, SETTINGS).phases
    assert phase.ended == "reverted"
    assert all(torch.equal(value, before[name]) for name, value in pair[0].state_dict().items())


@pytest.mark.usefixtures("probing")
def test_an_interrupt_within_a_probe_leaves_the_network_as_it_was(pair, pictures: FitData, monkeypatch):
    before, taken = copy.deepcopy(pair[0].state_dict()), []
    update = Loop.update

    def counting(self: Loop) -> None:
        update(self)
        taken.append(self)

    monkeypatch.setattr(Loop, "update", counting)
    result = run(pair, pictures, SETTINGS, callbacks=FitCallbacks(should_stop=lambda: len(taken) == PROBED_OVER + 2))
    assert result.interrupted and not result.phases and len(taken) == PROBED_OVER + 2
    assert all(torch.equal(value, before[name]) for name, value in pair[0].state_dict().items())


def test_a_phase_that_is_hardly_longer_than_a_probe_takes_the_lowest_rate(pair, pictures: FitData):
    (phase,) = run(pair, pictures, SETTINGS).phases
    assert phase.rate == min(RATES)


def test_a_signal_while_statistics_are_estimated_leaves_what_was_judged(pair, pictures: FitData, monkeypatch):
    """It comes after 'blocks', whose network was saved; what is saved now must be that one."""
    calls: list[int] = []
    saved: list[dict[str, Tensor]] = []

    def cut_off(model: OdeResNet, *arguments: Any, **named: Any) -> int:
        calls.append(recalibrate(model, *arguments, **named))
        if len(calls) == 2:
            raise Stopped(signal.SIGINT)
        return calls[-1]

    monkeypatch.setattr(fit_module, "recalibrate", cut_off)
    settings = replace(SETTINGS, phases=("blocks", "logits"), lr=1e-3, logits_lr=1e-3, bn="recalibrate")
    callbacks = FitCallbacks(on_phase=lambda result, model: saved.append(copy.deepcopy(model.state_dict())))
    assert run(pair, pictures, settings, callbacks=callbacks).interrupted and len(saved) == 1
    assert all(torch.equal(value, saved[0][name]) for name, value in pair[0].state_dict().items())


def test_three_images_are_enough(pair, pictures: FitData):
    few = copy.copy(pictures.plain)
    few.indices = few.indices[:3]
    depths = dict.fromkeys(pair[0].stages, 9)
    result = run(pair, FitData(few, few), replace(SETTINGS, bn="recalibrate"), depths=depths)
    assert [phase.steps for phase in result.phases] == [3]


def test_stages_that_are_not_deepened_keep_their_weights_apart(pair, pictures: FitData):
    run(pair, pictures, SETTINGS, depths={"layer1": 9}, depth_weights="tied")
    assert {name: stage.spec.kind for name, stage in pair[0].stages.items() if stage.spec.depth} == {
        "layer1": "tied",
        "layer2": "untied",
        "layer3": "untied",
    }


@pytest.mark.usefixtures("probing")
def test_refine_goes_on_at_half_the_rate_that_was_found_for_logits(pair, pictures: FitData, monkeypatch):
    monkeypatch.setattr(fit_module, "RATES", (4e-5,))
    settings = replace(SETTINGS, phases=("logits", "refine"))
    logits, refine = run(pair, pictures, settings, depths=dict.fromkeys(pair[0].stages, 6)).phases
    assert (logits.phase, logits.rate) == ("logits", 4e-5) and (refine.phase, refine.rate) == ("refine", 2e-5)


def test_rounds_go_on_until_time_is_over(pair, pictures: FitData, monkeypatch):
    monkeypatch.setattr("resode_cli.fitting.rounds.FIRST", {"logits": 8})
    seen: list[FitStep] = []
    callbacks = FitCallbacks(on_step=seen.append)
    settings = replace(SETTINGS, steps=None, minutes=0.1, logits_lr=1e-3)
    result = run(pair, pictures, settings, callbacks=callbacks)
    assert len(result.phases) > 1 and result.seconds < 20
    assert [phase.round for phase in result.phases] == list(range(1, len(result.phases) + 1))
    assert [step.total for step in seen if step.step == 1] == [phase.steps for phase in result.phases]
    after_one_round = [step.agreement for step in seen if step.round == 2]
    assert set(after_one_round) == {result.phases[0].after.agreement}


def test_a_phase_goes_on_with_the_images_that_the_one_before_has_not_seen(pair, pictures: FitData):
    """42 images in batches of 6: two phases of three steps see 36 different ones."""
    trained = [i for i in range(len(pictures.plain)) if i not in held_out(len(pictures.plain))]
    seen: list[int] = []

    class Watched:
        name = pictures.train.name

        def __len__(self) -> int:
            return len(pictures.train)

        def __getitem__(self, key: Any) -> Any:
            seen.append(key[1])
            return pictures.train[key]

        def received(self, batch: Any) -> Any:
            return batch

    settings = replace(SETTINGS, phases=("blocks", "logits"), lr=1e-4, logits_lr=1e-4, workers=0)
    run(pair, FitData(Watched(), pictures.plain), settings)  # type: ignore[arg-type]
    assert len(seen[:36]) == len(set(seen[:36])) == 36 and set(seen) <= set(trained)


def some_logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    return one.float(), other.float()


def test_the_error_of_logits_is_the_distillation_loss_of_a_high_temperature():
    """τ² KL → Σ_k (z_k − z'_k)² / 2K per image, of logits less their mean (Hinton et al. 2015, equation 4)."""
    student, teacher = some_logits()
    spread = (teacher - teacher.mean(1, keepdim=True)).square().sum()
    expected = distillation_loss(student.double(), teacher.double(), 300.0, several=False)
    found = logits_error(student, teacher, several=False) * spread / (2 * student.numel())
    assert float(found) == pytest.approx(float(expected), rel=2e-2)


def test_a_softmax_does_not_see_what_all_logits_have_in_common_and_sigmoids_do():
    student, teacher = some_logits()
    moved = teacher + 5
    assert logits_error(moved, teacher, several=False) < 1e-10 < logits_error(moved, teacher, several=True)
    one = teacher[:, :1]
    assert float(logits_error(one + one.norm(), one, several=False)) == pytest.approx(len(one))
