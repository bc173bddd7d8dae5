"""What a compiled block would lose is an error too: kept tensors, and trained ones that are not the block's own."""

from __future__ import annotations

import logging
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resode_cli.errors import ResodeError
from resode_cli.network.reading import read_split
from resode_cli.network.specs import BlockSpec, StageSpec
from resode_cli.network.stage import OdeStage
from resode_cli.ode import Adjoint

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
OUTSIDE: list[Tensor] = []
METHODS = ("checkpoint", "pc", "multistep", "euler")


class Plain(nn.Module):
    """x + tanh(conv(x)), which keeps nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.box: Any = None

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(self.conv(x))
        self.keep(out)
        return x + out

    def keep(self, out: Tensor) -> None:
        pass


class Attribute(Plain):
    def keep(self, out: Tensor) -> None:
        self.box = out


class Listed(Plain):
    def keep(self, out: Tensor) -> None:
        self.box = [out]


class Named(Plain):
    def keep(self, out: Tensor) -> None:
        self.box = {"out": out}


class Weights(Plain):
    def keep(self, out: Tensor) -> None:
        self.box = self.conv.weight.square()


class State(Plain):
    def forward(self, x: Tensor) -> Tensor:
        self.box = x
        return x + torch.tanh(self.conv(x))


class Outside(Plain):
    def keep(self, out: Tensor) -> None:
        OUTSIDE.append(out)


class Conditioned(Plain):
    """Reads a tensor that is neither its state nor its parameter."""

    condition: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.conv(x)) * self.condition


TAKE = {
    Attribute: lambda block: block.box,
    Listed: lambda block: block.box[0],
    Named: lambda block: block.box["out"],
    Weights: lambda block: block.box,
    State: lambda block: block.box,
    Outside: lambda block: OUTSIDE[-1],
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a record of every line that dynamo traces in pytest's report."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)


def make_stage(block: nn.Module, method: str, *, compiled: bool = True) -> OdeStage:
    """Two steps of one block, in train mode and float64."""
    spec = StageSpec("layer1", "layer1", (), ("0",), (BlockSpec("0", "0"),), (0, 0), Fraction(1))
    stage = OdeStage(spec, transition={}, blocks=[block], splits=[read_split(block)]).double().train()
    stage.use_adjoint(Adjoint(method))
    if compiled:
        stage.compile_branch(backend="aot_eager")
    return stage


def state() -> Tensor:
    return torch.rand(3, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)


@pytest.mark.parametrize("kind", TAKE, ids=lambda kind: kind.__name__)
def test_a_loss_on_what_a_compiled_block_keeps_is_an_error(kind: type[Plain]) -> None:
    for method in METHODS:
        stage = make_stage(block := kind(), method)
        loss = stage(state()).sum()
        with pytest.raises(
            ResodeError, match=rf"{kind.__name__}\) of step \d keeps a tensor while it runs.*'backprop'"
        ):
            (loss + TAKE[kind](block).sum()).backward()
    OUTSIDE.clear()


def test_what_is_kept_and_no_loss_depends_on_is_let_be() -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        stage, x = make_stage(Attribute(), "checkpoint" if compiled else "backprop", compiled=compiled), state()
        stage(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in stage.parameters())])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_a_foreign_trained_tensor_is_an_error_and_a_frozen_one_is_not() -> None:
    for method in METHODS:
        stage = make_stage(block := Conditioned(), method)
        block.condition = torch.rand(1, dtype=torch.float64, requires_grad=True)
        with pytest.raises(ResodeError, match="reads a trained tensor that is no parameter of its own"):
            stage(state())
        block.condition = block.condition.detach()
        stage(state()).sum().backward()
