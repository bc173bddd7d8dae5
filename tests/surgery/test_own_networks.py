"""A network of the user's own, handed over in Python."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import resode_cli
from resode_cli.errors import ResodeError, UsageError
from resode_cli.surgery.rewrite import deepen


class PreNormBlock(nn.Module):
    """x + W relu(norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x).relu())


class Perceptron(nn.Module):
    """Grey 8×8 images to 3 classes, by a list of residual blocks: no ResNet that any library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(64, 12), nn.ModuleList(PreNormBlock(12) for _ in range(4))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def grey() -> Tensor:
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_module_converts_deepens_and_trains_by_an_adjoint(grey):
    net = Perceptron()
    untouched = copy.deepcopy(net)
    model, check = resode_cli.convert(net, example=grey)
    stage = model.stages["blocks"]
    assert check.identical and check.batch == "images given, 8×8" and stage.spec.depth == 4
    with torch.no_grad():
        assert torch.equal(model(grey), untouched(grey))
    model.replace_stage("blocks", deepen(stage, 12))
    gradients = {}
    for method in ("backprop", "checkpoint"):
        model.use_adjoint(resode_cli.Adjoint(method))
        model.zero_grad()
        model(grey).square().sum().backward()
        gradients[method] = [p.grad.clone() for p in model.parameters()]
    for found, expected in zip(gradients["checkpoint"], gradients["backprop"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_its_file_loads_beside_the_network_alone(grey, tmp_path):
    model, _ = resode_cli.convert(Perceptron(), example=grey)
    path = tmp_path / "own.safetensors"
    resode_cli.save(model, path)
    with pytest.raises(ResodeError, match=r"own.safetensors: made of a network from Python \(.*Perceptron\); load it"):
        resode_cli.load(path)
    again = resode_cli.load(path, source=Perceptron())
    with torch.no_grad():
        assert torch.equal(again(grey), model(grey))
    with pytest.raises(ResodeError, match="own.safetensors: the source network has no 'blocks'"):
        resode_cli.load(path, source=nn.Sequential(nn.Linear(4, 4)))


def test_its_own_preprocessing_is_used():
    class Small(nn.Sequential):
        default_cfg = {"input_size": (3, 20, 20), "mean": (0.5, 0.5, 0.5), "crop_pct": 1.0}

    net = Small(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 18 * 18, 12), PreNormBlock(12), nn.Linear(12, 3))
    model, check = resode_cli.convert(net)
    pre = model.info.preprocessing
    assert (pre.size, pre.mean, pre.crop_fraction) == (20, (0.5, 0.5, 0.5), 1.0)
    assert check.batch == "random images, 20×20" and model.info.num_classes == 3


class OwnParameters(nn.Module):
    """A branch without layers of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + x @ self.weight).relu()


class Ending(OwnParameters):
    def forward(self, x: Tensor) -> Tensor:
        return x + x @ self.weight


def rows_of(*blocks: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), *blocks, nn.Linear(12, 3))


def test_blocks_of_bare_parameters_convert(grey):
    model, check = resode_cli.convert(rows_of(OwnParameters(12), OwnParameters(12)), example=grey)
    assert check.identical and [stage.activation for stage in model.stages.values()] == ["relu"]


def test_pre_form_is_refused_where_blocks_end_differently(grey):
    net = rows_of(OwnParameters(12), OwnParameters(12), Ending(12))
    assert resode_cli.convert(copy.deepcopy(net), example=grey)[1].identical
    with pytest.raises(UsageError, match=r"needs blocks that end alike, .* \(2: relu, 3: relu, 4: linear\)"):
        resode_cli.convert(net, example=grey, form="pre")


def test_a_network_without_residual_blocks_is_refused_with_the_reason():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 224**2, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ResodeError, match="Sequential has no residual steps.*no module in it adds a branch"):
        resode_cli.convert(net)
