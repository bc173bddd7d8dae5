"""Block classes whose branch is known: where the shortcut is, and what follows the addition.

A class is an entry, not a program. Two kinds of entry:

Surgery   the shortcut is replaced by zero and the activation after the addition by the identity;
          the block's own forward then returns its branch g(x). No forward is written again.
Formula   for blocks whose activation module is shared with the branch: g is written out.

Classes are named by strings, so that neither timm nor torchvision is imported to convert the other's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..parts import BlockRule, Branch
from ..residual import GENERIC, LINEAR, activation_name


@dataclass(frozen=True)
class Surgery:
    shortcut: str
    activation: str | None  # None: the output is linear


@dataclass(frozen=True)
class Formula:
    """The activation is a ReLU in every class entered so."""

    shortcut: str
    branch: Branch


# `block: Any`: nn.Module types its attributes as Tensor | Module.
def _torchvision_basic(block: Any, x: Tensor) -> Tensor:
    x = block.relu(block.bn1(block.conv1(x)))
    return block.bn2(block.conv2(x))


def _torchvision_bottleneck(block: Any, x: Tensor) -> Tensor:
    x = block.relu(block.bn1(block.conv1(x)))
    x = block.relu(block.bn2(block.conv2(x)))
    return block.bn3(block.conv3(x))


def _cifar(block: Any, x: Tensor) -> Tensor:
    return block.branch(x)


BLOCK_CLASSES: dict[str, Surgery | Formula] = {
    "timm.models.resnet.BasicBlock": Surgery("downsample", "act2"),
    "timm.models.resnet.Bottleneck": Surgery("downsample", "act3"),
    "timm.models.resnetv2.PreActBasic": Surgery("downsample", None),
    "timm.models.resnetv2.PreActBottleneck": Surgery("downsample", None),
    "timm.models.resnetv2.Bottleneck": Surgery("downsample", "act3"),
    "torchvision.models.resnet.BasicBlock": Formula("downsample", _torchvision_basic),
    "torchvision.models.resnet.Bottleneck": Formula("downsample", _torchvision_bottleneck),
    "resode_cli.adapters.cifar.CifarBlock": Formula("shortcut", _cifar),
}


class ZeroShortcut(nn.Module):
    """A shortcut that adds nothing."""

    def forward(self, x: Tensor) -> float:
        return 0.0


def _entry(block: nn.Module) -> Surgery | Formula | None:
    return BLOCK_CLASSES.get(f"{type(block).__module__}.{type(block).__qualname__}")


def is_known(block: nn.Module) -> bool:
    return _entry(block) is not None


def has_identity_shortcut(block: nn.Module) -> bool:
    """Whether a block of a known class adds its branch to its input itself: then it is a step."""
    entry = _entry(block)
    assert entry is not None
    shortcut = getattr(block, entry.shortcut)
    return shortcut is None or isinstance(shortcut, nn.Identity)


def _call(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def read_rule(block: nn.Module) -> BlockRule:
    """The rule of a step block. By surgery, `block` returns its branch afterwards."""
    entry = _entry(block)
    if entry is None:
        return BlockRule(_call, GENERIC)
    if isinstance(entry, Formula):
        return BlockRule(entry.branch, "relu")
    activation = activation_name(getattr(block, entry.activation)) if entry.activation else LINEAR
    if activation == GENERIC:
        return BlockRule(_call, GENERIC)
    setattr(block, entry.shortcut, ZeroShortcut())
    if entry.activation:
        setattr(block, entry.activation, nn.Identity())
    return BlockRule(_call, activation)
