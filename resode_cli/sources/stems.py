"""The stem of CIFAR networks, for networks made for large images."""

from __future__ import annotations

from torch import nn


def three_by_three(stem: nn.Module) -> nn.Conv2d:
    """A 3×3 convolution of stride 1 with the channels that go into and come out of `stem`."""
    convolutions = [m for m in stem.modules() if isinstance(m, nn.Conv2d)]
    conv = nn.Conv2d(convolutions[0].in_channels, convolutions[-1].out_channels, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
