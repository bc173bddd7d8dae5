"""Every optimizer of timm resumes to the bit, by the names of the parameters, or is refused before a run begins."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from timm.optim import list_optimizers
from torch import nn

from resode_cli.errors import ResodeError, UsageError
from resode_cli.training.optimization import create_optimizer
from resode_cli.training.optimizer_state import OptimizerState, Saved, check_optimizer
from resode_cli.training.settings import Settings

SETTINGS = Settings(lr=0.01)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for n in range(first, last):
        torch.manual_seed(100 + n)
        images, labels = torch.randn(4, 1, 4, 4), torch.randint(0, 3, (4,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch):
    """kron compiles itself, which says nothing about resuming and takes most of the time."""
    monkeypatch.setattr(torch, "compile", lambda function=None, **_: function or (lambda f: f))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", list_optimizers())
def test_three_steps_and_three_resumed_ones_are_six(name: str) -> None:
    settings = replace(SETTINGS, optimizer=name)
    try:
        check_optimizer(settings)
    except UsageError as error:
        assert f"--optimizer {name} cannot be used here" in str(error)
        assert name == "adahessian" or name.startswith(("bnb", "fused"))
        return
    whole = network()
    optimizer = create_optimizer(whole, settings)
    steps(whole, optimizer, 0, 6)

    first = network()
    optimizer = create_optimizer(first, settings)
    state = OptimizerState(optimizer, first)
    steps(first, optimizer, 0, 3)
    saved = state.pack()
    text = json.dumps(saved.values, allow_nan=False)
    second = network()
    second.load_state_dict(first.state_dict())
    optimizer = create_optimizer(second, settings)
    OptimizerState(optimizer, second).restore(Saved(saved.tensors, json.loads(text)))
    steps(second, optimizer, 3, 6)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_parameters_are_found_by_name() -> None:
    net = network()
    optimizer = create_optimizer(net, SETTINGS)
    state = OptimizerState(optimizer, net)
    steps(net, optimizer, 0, 1)
    saved = state.pack()
    other = network()
    other[0].requires_grad_(False)
    with pytest.raises(UsageError, match="trained other parameters"):
        OptimizerState(create_optimizer(other, SETTINGS), other).restore(saved)


def test_what_cannot_be_written_is_refused() -> None:
    net = network()
    optimizer = create_optimizer(net, SETTINGS)
    state = OptimizerState(optimizer, net)
    optimizer.state[net[0].weight]["made"] = object()
    with pytest.raises(ResodeError, match="holds a object, which cannot be saved"):
        state.pack()
