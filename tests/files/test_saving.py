"""`save` writes what `load` gives back, or nothing: whatever was done to the network in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from resode_cli.errors import NonFiniteWarning, ResodeError
from resode_cli.files.model_file import load, save
from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import PreprocessingChoice
from resode_cli.sources.registry import open_source
from resode_cli.surgery.convert import convert

Change = Callable[[OdeResNet], object]


@pytest.fixture
def model() -> OdeResNet:
    return convert(open_source("cifar:resnet20", pretrained=False, preprocessing=PreprocessingChoice(size=16)))[0]


def first_blocks(model: OdeResNet) -> nn.ModuleList:
    return next(iter(model.stages.values())).blocks


def with_classes(model: OdeResNet) -> None:
    model.info = model.info.with_classes(["a", "b", "c"])


def compiled(model: OdeResNet) -> None:
    model.net = torch.compile(model.net)


def share(model: OdeResNet) -> None:
    blocks = first_blocks(model)
    blocks[1].conv1.weight = blocks[0].conv1.weight


CHANGES: dict[str, Change] = {
    "eps": lambda m: setattr(m.net.bn1, "eps", 0.5),
    "a hook": lambda m: m.net.linear.register_forward_hook(lambda module, args, out: out * 2),
    "a stride": lambda m: setattr(m.net.conv1, "stride", (2, 2)),
    "padding": lambda m: setattr(m.net.conv1, "padding_mode", "reflect"),
    "another layer of the same tensors": lambda m: setattr(first_blocks(m)[0], "bn2", Doubled(first_blocks(m)[0].bn2)),
    "another precision of a layer": lambda m: m.net.linear.double(),
    "weights of two blocks made one": share,
    "a negative variance": lambda m: m.net.bn1.running_var.fill_(-1),
    "a counter of another shape": lambda m: setattr(m.net.bn1, "num_batches_tracked", torch.tensor([1, 2])),
    "fewer class names than classes": with_classes,
    "a compiled network": compiled,
}


class Doubled(nn.BatchNorm2d):
    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features)
        self.load_state_dict(norm.state_dict())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_a_logit_that_is_no_number_hides_no_change(model: OdeResNet, tmp_path: Path) -> None:
    with torch.no_grad():
        model.net.linear.bias[0] = torch.nan
    with pytest.warns(NonFiniteWarning):
        save(model, tmp_path / "as-it-is.safetensors")
        load(tmp_path / "as-it-is.safetensors")
    model.net.conv1.padding_mode = "circular"
    with pytest.raises(ResodeError, match="another function"):
        save(model, tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", CHANGES)
def test_what_would_load_as_another_function_is_not_written(name: str, model: OdeResNet, tmp_path: Path) -> None:
    CHANGES[name](model)
    path = tmp_path / "m.safetensors"
    with pytest.raises(ResodeError) as caught:
        save(model, path)
    assert not list(tmp_path.iterdir())
    assert ".tmp" not in str(caught.value)


KEPT: dict[str, Change] = {
    "nothing": lambda m: None,
    "another precision of all": lambda m: m.double(),
    "a new head": lambda m: setattr(m.net, "linear", nn.Linear(64, 7)),
    "other weights": lambda m: nn.init.normal_(m.net.linear.weight),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", KEPT)
def test_what_is_written_loads_as_the_same_function(
    name: str, training: bool, model: OdeResNet, tmp_path: Path
) -> None:
    KEPT[name](model)
    model.train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save(model, tmp_path / "m.safetensors")
    assert model.training == training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    loaded = load(tmp_path / "m.safetensors").eval()
    images = torch.randn(2, 3, 16, 16, dtype=next(loaded.parameters()).dtype)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model.eval()(images), rtol=0, atol=0)
