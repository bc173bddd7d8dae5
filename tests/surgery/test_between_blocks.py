"""What a loop does between its blocks, in training and to gradients, is kept, or the network is refused."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resode_cli.errors import ResodeError
from resode_cli.surgery.convert import convert

Body = Callable[[nn.ModuleList, Tensor], Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(self.bn(x)))


class Net(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(4, 5)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.blocks, self.stem(x)).mean((2, 3)))


def plain(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def dropping(draw: Callable[[], float]) -> Body:
    def body(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            x = x if blocks.training and draw() < 0.2 else block(x)
        return x

    return body


def without_gradients(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for i, block in enumerate(blocks):
        with torch.set_grad_enabled(i >= 2 and torch.is_grad_enabled()):
            x = block(x)
    return x


def detached(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for i, block in enumerate(blocks):
        x = block(x.detach() if i == 1 else x)
    return x


def scaled(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * 0.5)
    return x


BODIES = {
    "layer drop by random": dropping(random.random),
    "layer drop by numpy": dropping(np.random.rand),
    "layer drop by torch": dropping(lambda: float(torch.rand(()))),
    "no_grad around some": without_gradients,
    "detach": detached,
    "hooks on states": scaled,
}


def images() -> Tensor:
    return torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def test_a_plain_loop_converts() -> None:
    model, verification = convert(Net(plain), example=images())
    assert verification.identical and model.stages["blocks"].spec.depth == 4


@pytest.mark.parametrize("name", BODIES)
def test_a_loop_that_does_more_is_kept_or_refused(name: str) -> None:
    torch.manual_seed(1)
    source = Net(BODIES[name])
    expected = gradients(source)
    try:
        model, _ = convert(source, example=images())
    except ResodeError as error:
        assert any(words in str(error) for words in ("in train mode", "gradients", "does not run its blocks"))
        return
    found = gradients(model)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def gradients(net: nn.Module) -> list[Tensor]:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    net.train()
    loss = net(images()).square().sum()
    found = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, net.parameters(), strict=True)]
