"""The adjoint methods on a pretrained ResNet-56 and real images: 100 steps per stage, and its own depth."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from resode_cli.data import batches, open_data
from resode_cli.gradients.check_grad import StageAdjoints, check_gradients, choose_as_measured
from resode_cli.gradients.gradient_errors import StageGradient
from resode_cli.network.model import OdeResNet
from resode_cli.ode import Adjoint
from resode_cli.sources.registry import open_source
from resode_cli.surgery.convert import convert
from resode_cli.surgery.rewrite import deepen

pytestmark = [pytest.mark.real, pytest.mark.slow]

METHODS = (Adjoint("multistep", 20), Adjoint("pc", 10), Adjoint("checkpoint", snapshots=12))


@pytest.fixture(scope="module")
def native(shared_data: Path) -> OdeResNet:
    return convert(open_source("cifar:resnet56", weights=shared_data / "resnet56_cifar10.th"))[0]


def batch(model: OdeResNet, folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight images, evenly spaced; the figures in README are of 32."""
    samples = open_data(str(folder), model.info.preprocessing, split, images=8)
    found = next(batches(samples, 8))
    return found.images, found.labels


@pytest.fixture(scope="module")
def rows(native: OdeResNet, cifar10: Path) -> dict[str, list[StageGradient]]:
    torch.set_flush_denormal(True)
    model = copy.deepcopy(native)
    for name, stage in model.stages.items():
        model.replace_stage(name, deepen(stage, 100))
    report = check_gradients(model, *batch(model, cifar10, "test"), methods=METHODS)
    torch.set_flush_denormal(False)
    return {m.name: [row for row in m.stages if row.steps] for m in report.methods}


@pytest.mark.parametrize(
    ("adjoint", "error", "evaluations", "states"),
    [(METHODS[0], 0.02, 1.15, 12), (METHODS[1], 0.03, 2.0, 12), (METHODS[2], 1e-5, 2.1, 12)],
    ids=lambda value: getattr(value, "label", None),
)
def test_at_100_steps(adjoint, error, evaluations, states, rows):
    found = rows[adjoint.label]
    assert [row.steps for row in found] == [100, 100, 100]
    for row in found:
        assert row.relative_error <= error, row
        assert row.evaluations_per_step <= evaluations and row.states_kept <= states, row


def test_auto_gives_anchors_to_the_native_network(native, cifar10):
    model = copy.deepcopy(native)
    calibration = choose_as_measured(model, *batch(model, cifar10, "train"), tolerance=0.02, budget=None)
    assert {choice.adjoint.method for choice in calibration.stages} == {"checkpoint"}
    chosen = StageAdjoints("auto", calibration.adjoints)
    report = check_gradients(model, *batch(model, cifar10, "test"), methods=[chosen])
    assert report.methods[0].largest_error <= 1e-5
