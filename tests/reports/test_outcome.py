"""What is said of a fitted network's accuracy at the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resode_cli.fitting.settings import FitSettings
from resode_cli.measuring.evaluate import Evaluation
from resode_cli.network.model import OdeResNet
from resode_cli.reports.outcome import outcome_line, points_lost
from resode_cli.surgery.rewrite import tie


def result(source: float | None, fitted: float | None, agreement: float = 0.9, out_of_time: bool = False) -> Any:
    def column(top1: float | None) -> Any:
        evaluation = None if top1 is None else Evaluation(top1, 1.0, 0.5, 1000)
        return SimpleNamespace(evaluation=evaluation, figures=SimpleNamespace(agreement=agreement, images=256))

    columns = (column(source), column(None), column(fitted))
    return SimpleNamespace(columns=columns, fit=SimpleNamespace(out_of_time=out_of_time))


def line(found: Any, model: OdeResNet, form: Any = None, **settings: Any) -> str:
    teacher = SimpleNamespace(name="net")
    plan: Any = SimpleNamespace(settings=FitSettings(**settings), form=form, teacher=teacher)
    return outcome_line(found, plan, model, source=Path("net.safetensors"), out=Path("deep.safetensors"))


@pytest.fixture
def fitted(tiny: OdeResNet) -> OdeResNet:
    for stage in tiny.stages.values():
        stage.spec = replace(stage.spec, form="pre")
    return tiny


def test_points_are_those_of_the_source_less_those_of_the_fitted_network():
    assert points_lost(result(0.8102, 0.7984)) == pytest.approx(1.18)
    assert points_lost(result(0.80, 0.81)) == pytest.approx(-1)
    assert points_lost(result(None, None)) is None


def test_more_than_a_point_calls_for_advice_and_less_does_not(fitted: OdeResNet):
    assert line(result(0.8102, 0.8002), fitted) == "deep.safetensors ends 1.00 points below its source"
    assert "What may help" in line(result(0.8102, 0.8001), fitted)
    assert line(result(0.8, 0.802), fitted) == "deep.safetensors ends 0.20 points above its source"


def test_the_advice_is_what_was_not_done_yet(fitted: OdeResNet):
    said = line(result(0.8, 0.7, out_of_time=True), fitted, minutes=3.0)
    assert "--fit-minutes 6" in said and "--form exact" in said
    assert "resode finetune deep.safetensors --data DIR --teacher net.safetensors" in said
    assert "--fit-minutes" not in line(result(0.8, 0.7), fitted)
    assert "--fit-steps 80" in line(result(0.8, 0.7), fitted, steps=40)
    assert "--form" not in line(result(0.8, 0.7), fitted, form="pre")
    for name, stage in fitted.stages.items():
        fitted.replace_stage(name, tie(stage))
    assert "--depth-weights tied+norms" in line(result(0.8, 0.7), fitted)


def test_without_labels_agreement_is_what_is_known(fitted: OdeResNet):
    said = line(result(None, None, agreement=0.97), fitted)
    assert "97.0%" in said and "--data" in said and "What may help" not in said
    assert "What may help" in line(result(None, None, agreement=0.9), fitted)
