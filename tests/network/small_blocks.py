"""Small networks of four blocks each, beside their conversion: what is done to the one is done to the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resode_cli.surgery.convert import convert


class Block(nn.Module):
    act: nn.Module
    held: Any

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def g(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(x)))


class Net(nn.Module):
    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(*(block() for _ in range(4)))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def images(size: int = 5) -> Tensor:
    return torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(0))


def pair(block: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A network and its conversion, of equal weights."""
    nets = []
    for _ in range(2):
        torch.manual_seed(1)
        nets.append(Net(block))
    return nets[0].eval(), convert(nets[1], example=images())[0].eval()


def blocks_of(net: nn.Module) -> list[nn.Module]:
    if hasattr(net, "stages"):
        return [block for stage in net.stages.values() for block in stage.blocks]
    return list(net.blocks)


def assert_alike(net: nn.Module, model: nn.Module, size: int = 5) -> None:
    torch.testing.assert_close(model(images(size)), net(images(size)), rtol=1e-4, atol=1e-5)
