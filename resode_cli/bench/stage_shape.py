"""A stage of random blocks, measured where no model file is given.

C, H, W: channels, height and width of a state; N: depth; T: horizon; h = T/N: step size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from ..errors import UsageError, unknown
from ..network.parts import BlockSplit
from ..network.residual import LINEAR
from ..network.specs import BlockSpec, StageSpec
from ..network.stage import OdeStage
from ..ode import SCHEMES

BLOCKS = ("basic", "bottleneck")
WEIGHTS = ("tied", "untied", "smooth")


@dataclass(frozen=True)
class StageShape:
    """A stage of pre-activation blocks with T = 1: what is measured where no model file is given.

    block: 'basic' (two 3×3 convolutions) or 'bottleneck' (C -> C/4 -> C).
    weights: 'tied' (one block for all steps), 'untied' (independent random blocks) or 'smooth' (blocks
        A cos t + B sin t, t = (n + ½)/N, of two random blocks' convolutions A and B).
    """

    channels: int
    height: int
    width: int
    block: str = "basic"
    weights: str = "tied"
    scheme: str = "euler"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("block", self.block, BLOCKS),
            ("weights", self.weights, WEIGHTS),
            ("scheme", self.scheme, tuple(SCHEMES)),
        ):
            if value not in allowed:
                raise unknown(name, value, allowed)
        if min(self.channels, self.height, self.width) < 1:
            raise UsageError("--stage-shape: channels, height and width must be 1 or more")
        if self.block == "bottleneck" and self.channels % 4:
            raise UsageError(f"--block bottleneck needs channels divisible by 4, not {self.channels}")

    def __str__(self) -> str:
        return (
            f"a stage of {self.weights} pre-activation {self.block} blocks, {self.channels} channels,"
            f" {self.height}×{self.width}, T = 1, {self.scheme} rule"
        )

    def build(self, depth: int, seed: int) -> OdeStage:
        """The stage with random weights; those of 'tied' and 'smooth' are one field, whatever the depth."""
        if depth < 1:
            raise UsageError(f"--depths {depth}: must be 1 or more")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            blocks = [self._block() for _ in range({"tied": 1, "untied": depth, "smooth": 2}[self.weights])]
        if self.weights == "smooth":
            a, b = blocks
            blocks = [self._between(a, b, (n + 0.5) / depth) for n in range(depth)]
        names = tuple(f"block{b}" for b in range(len(blocks)))
        spec = StageSpec(
            name="stage",
            container="",
            transition=(),
            source_blocks=names,
            blocks=tuple(BlockSpec(name, name) for name in names),
            schedule=tuple(range(depth)) if len(blocks) == depth else (0,) * depth,
            horizon=Fraction(1),
            scheme=self.scheme,
        )
        return OdeStage(spec, transition={}, blocks=blocks, splits=[BlockSplit(_call, LINEAR)] * len(blocks))

    def _block(self) -> nn.Sequential:
        """A branch (He et al. 2016, "Identity mappings"): BatchNorm, ReLU, convolution, and so on."""
        c = self.channels
        widths = (
            [(c, c, 3), (c, c, 3)] if self.block == "basic" else [(c, c // 4, 1), (c // 4, c // 4, 3), (c // 4, c, 1)]
        )
        layers: list[nn.Module] = []
        for before, after, kernel in widths:
            convolution = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            # In place, as torchvision's and timm's blocks have it: plain backprop gets its due.
            layers += [nn.BatchNorm2d(before), nn.ReLU(inplace=True), convolution]
        return nn.Sequential(*layers)

    def _between(self, a: nn.Sequential, b: nn.Sequential, t: float) -> nn.Sequential:
        block = self._block()
        with torch.no_grad():
            for weight, first, second in zip(_convolutions(block), _convolutions(a), _convolutions(b), strict=True):
                weight.copy_(first * math.cos(t) + second * math.sin(t))
        return block


def _convolutions(block: nn.Module) -> list[Tensor]:
    return [layer.weight for layer in block.modules() if isinstance(layer, nn.Conv2d)]


def _call(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)
