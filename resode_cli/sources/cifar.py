"""The CIFAR-10 ResNets of He et al. 2015 (arXiv:1512.03385), section 4.2, which no library ships.

Depth 6n+2: a 3×3 convolution, three stages of n post-activation basic blocks with 16, 32 and 64
channels, global average pooling and a linear head. Parameter names are those of the common
checkpoints (conv1, bn1, layer1.0.conv1, …, linear).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError, unknown
from ..network.parts import Preprocessing

Shortcut = Literal["A", "B"]
ARGUMENTS = frozenset({"num_classes", "shortcut"})
WEIGHTS = "none"
DEPTHS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110, 1202)}


class SubsampleAndPad(nn.Module):
    """Option A shortcut: every second pixel, and zero channels in equal parts on both sides."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.padding = (0, 0, 0, 0, before, out_channels - in_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], self.padding)


class CifarBlock(nn.Module):
    """relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x))))))."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = (
                SubsampleAndPad(in_channels, out_channels)
                if shortcut == "A"
                else nn.Sequential(
                    nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
                )
            )

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The network. Input (B, 3, H, W), 32×32 in the paper; logits (B, num_classes)."""

    def __init__(
        self, blocks: int, *, num_classes: int = 10, shortcut: Shortcut = "A", widths: Sequence[int] = (16, 32, 64)
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages = []
        channels = widths[0]
        for i, width in enumerate(widths):
            stage = nn.Sequential()
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(CifarBlock(channels, width, stride=stride, shortcut=shortcut))
                channels = width
            stages.append(stage)
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def preprocessing(name: str, net: nn.Module) -> Preprocessing:
    """Images of 32×32 pixels, whole."""
    return Preprocessing(size=32, crop_fraction=1.0)


def build(name: str, *, pretrained: bool = False, num_classes: int | None = None, shortcut: str = "A") -> CifarResNet:
    """cifar:resnet20|32|44|56|110|1202 with option A (parameter-free) or B (projection) shortcuts."""
    if name not in DEPTHS:
        raise unknown("CIFAR network", name, DEPTHS)
    if shortcut not in ("A", "B"):
        raise UsageError(f"unknown shortcut option {shortcut!r} (allowed: A, B)")
    option: Shortcut = "B" if shortcut == "B" else "A"
    return CifarResNet((DEPTHS[name] - 2) // 6, num_classes=num_classes or 10, shortcut=option)
