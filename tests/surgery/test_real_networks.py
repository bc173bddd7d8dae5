"""Pretrained CIFAR-10 networks and real images: conversion must not lose a single one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from resode_cli.data import Batch, batches, open_data
from resode_cli.gradients.check_grad import check_gradients
from resode_cli.gradients.gradient_errors import StageGradient
from resode_cli.measuring.evaluate import evaluate
from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import Preprocessing, PreprocessingChoice
from resode_cli.ode import Adjoint
from resode_cli.sources.registry import open_source
from resode_cli.surgery.convert import convert
from resode_cli.surgery.rewrite import deepen, untie

WHOLE = Preprocessing(size=32, crop_fraction=1.0)

pytestmark = [pytest.mark.real, pytest.mark.slow]

# A ResNet-20 as a user might have it: none of its classes is the library's, its names are the checkpoint's.
OWN_RESNET = """
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Residual(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Residual(16, 32, 2), Residual(32, 32, 1), Residual(32, 32, 1))
        self.layer3 = nn.Sequential(Residual(32, 64, 2), Residual(64, 64, 1), Residual(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def resnet20():
    return Net()
"""


@pytest.fixture(autouse=True)
def flush_denormals() -> Iterator[None]:
    """Reconstructed dead channels decay into denormal numbers, on which a CPU is a hundred times slower."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def all_images(cifar10: Path) -> list[Batch]:
    return list(batches(open_data(str(cifar10), WHOLE, "test"), 100))


@pytest.fixture(scope="module")
def some_images(cifar10: Path) -> list[Batch]:
    return list(batches(open_data(str(cifar10), WHOLE, "test", images=1000), 100))


def converted(source: str, weights: Path) -> tuple[nn.Module, OdeResNet]:
    """An untouched copy of the source network, and the model."""
    opened = open_source(source, weights=weights, preprocessing=PreprocessingChoice(size=32, crop_fraction=1.0))
    untouched = copy.deepcopy(opened.net).eval()
    model, check = convert(opened)
    assert check.identical
    return untouched, model


@pytest.fixture(scope="module")
def resnet56(shared_data: Path) -> tuple[nn.Module, OdeResNet]:
    return converted("cifar:resnet56", shared_data / "resnet56_cifar10.th")


@pytest.fixture(scope="module")
def deep56(resnet56: tuple[nn.Module, OdeResNet]) -> OdeResNet:
    model = copy.deepcopy(resnet56[1])
    for name, stage in model.stages.items():
        model.replace_stage(name, deepen(stage, 36))
    return model


def assert_same_logits(first: nn.Module, second: nn.Module, images: list[Batch]) -> None:
    with torch.no_grad():
        for batch in images:
            assert torch.equal(first(batch.images), second(batch.images))


def test_resnet56_scores_what_its_source_scores(resnet56, all_images, some_images):
    source, model = resnet56
    assert [stage.spec.depth for stage in model.stages.values()] == [9, 8, 8]
    assert_same_logits(source, model, some_images[:1])
    result = evaluate(model, all_images)
    assert (result.images, round(result.top1 * result.images)) == (5000, 4151)


def test_resnet20_of_the_users_own_scores_what_the_librarys_does(shared_data, all_images, some_images, tmp_path):
    (tmp_path / "own.py").write_text(OWN_RESNET)
    weights = shared_data / "resnet20_cifar10.th"
    source, own = converted(f"{tmp_path / 'own.py'}:resnet20", weights)
    library, model = converted("cifar:resnet20", weights)
    for net in (own, model):
        assert [stage.spec.depth for stage in net.stages.values()] == [3, 2, 2]
    assert own.stages["layer1"].activation == model.stages["layer1"].activation == "relu"
    assert_same_logits(source, own, some_images[:2])
    assert_same_logits(library, model, some_images[:2])
    result = evaluate(own, all_images)
    assert (result.images, round(result.top1 * result.images)) == (5000, 4051)
    assert torch.equal(evaluate(model, some_images).predictions, result.predictions[::5])


def test_resnet56_keeps_its_accuracy_at_36_steps_per_stage(deep56, some_images):
    assert [stage.spec.depth for stage in deep56.stages.values()] == [36, 36, 36]
    assert evaluate(deep56, some_images).top1 >= 0.775


def test_untie_and_identity_steps_change_no_logit(resnet56, deep56, some_images):
    longer, untied = copy.deepcopy(resnet56[1]), copy.deepcopy(deep56)
    for name, stage in longer.stages.items():
        longer.replace_stage(name, deepen(stage, 20, mode="identity"))
    for name, stage in untied.stages.items():
        untied.replace_stage(name, untie(stage))
    assert_same_logits(longer, resnet56[0], some_images[:1])
    assert_same_logits(untied, deep56, some_images[:1])


def by_stage(model: OdeResNet, images: list[Batch], *methods: Adjoint) -> list[dict[str, StageGradient]]:
    """The gradient check on 16 images of all classes, one dictionary for each method."""
    pixels, labels = (torch.cat([getattr(b, name) for b in images])[::63] for name in ("images", "labels"))
    assert len(labels) == 16 and len(set(labels.tolist())) == 10
    report = check_gradients(model, pixels, labels, methods=methods)
    return [{row.stage: row for row in method.stages} for method in report.methods]


def test_checkpoints_are_exact_at_36_steps(deep56, some_images):
    for rows in by_stage(deep56, some_images, Adjoint("checkpoint"), Adjoint("checkpoint", 6)):
        assert list(rows) == ["stem", "layer1", "layer2", "layer3"]
        assert max(row.relative_error for row in rows.values()) <= 1e-5


def test_carrying_the_corrected_state_is_better_in_every_stage_with_anchors(deep56, some_images):
    euler, pc = by_stage(deep56, some_images, Adjoint("euler", 12), Adjoint("pc", 12))
    for stage in euler:
        assert pc[stage].relative_error < euler[stage].relative_error, stage
        assert pc[stage].relative_error < 0.3, stage


def test_carrying_the_corrected_state_is_no_worse_in_any_stage_without_anchors(deep56, some_images):
    # Neither gradient is of use here: replicated post-activation stages lose their clipped units.
    euler, pc = by_stage(deep56, some_images, Adjoint("euler"), Adjoint("pc"))
    for stage, row in pc.items():
        assert row.relative_error <= euler[stage].relative_error, stage
        assert row.drift is None or row.drift < euler[stage].drift, stage
