"""Networks on which the defaults of a fit are judged, and a program that trains them. Not a test.

    python tests/fitting/source_networks.py OUT --data CIFAR [--resnet20 FILE --resnet56 FILE] [--only NAME ...]

writes OUT/NAME.safetensors for each of them, from scratch but for the two whose weights are given, a few minutes each
on two cores. CIFAR: a folder of 32×32 images with train and test; 'digits' stands for itself. The networks differ in
depth, width, block, activation and data. HELD_BACK names those that no default of a fit was chosen on.

The functions below make the networks, as `resode convert source_networks.py:NAME` takes them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

Norm = nn.BatchNorm2d


def convolution(channels: int, out: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, size, stride, size // 2, bias=False)


class SqueezeExcitation(nn.Module):
    """Channels scaled by what a small network makes of their means (Hu et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, channels // 4), nn.Linear(channels // 4, channels)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.up(F.relu(self.down(x.mean((2, 3))))).sigmoid()
        return x * scale[:, :, None, None]


class Block(nn.Module):
    """act(shortcut(x) + branch(x)): He et al. 2015, with two convolutions, or with three as a bottleneck."""

    def __init__(
        self,
        channels: int,
        width: int,
        stride: int,
        act: type[nn.Module],
        *,
        se: bool = False,
        bottleneck: bool = False,
    ) -> None:
        super().__init__()
        out = 4 * width if bottleneck else width
        if bottleneck:
            layers = [convolution(channels, width, 1), Norm(width), act()]
            layers += [convolution(width, width, 3, stride), Norm(width), act()]
            layers += [convolution(width, out, 1), Norm(out)]
        else:
            layers = [convolution(channels, width, 3, stride), Norm(width), act()]
            layers += [convolution(width, out, 3), Norm(out)]
        if se:
            layers.append(SqueezeExcitation(out))
        self.branch = nn.Sequential(*layers)
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Sequential(convolution(channels, out, 1, stride), Norm(out))
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.shortcut(x) + self.branch(x)
        return self.act(total)  # type: ignore[no-any-return]


class PreActivation(nn.Module):
    """x + branch(act(norm(x))): He et al. 2016."""

    def __init__(self, channels: int, width: int, stride: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            Norm(channels),
            act(),
            convolution(channels, width, 3, stride),
            Norm(width),
            act(),
            convolution(width, width, 3),
        )
        same = stride == 1 and channels == width
        self.shortcut = nn.Identity() if same else convolution(channels, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.shortcut(x) + self.branch(x)
        return total


class Network(nn.Module):
    """A convolution, stages of blocks of doubling width, the mean over pixels, and a linear layer.

    block: called with its channels, width and stride. wider: channels that a block gives, for each of its width.
    """

    def __init__(
        self,
        block: Callable[[int, int, int], nn.Module],
        blocks: tuple[int, ...],
        *,
        width: int = 16,
        wider: int = 1,
        channels: int = 3,
        last: type[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(convolution(channels, width, 3), Norm(width), nn.ReLU())
        stages, last_width = [], width
        for i, count in enumerate(blocks):
            own = width * 2**i
            stage = []
            for j in range(count):
                stage.append(block(last_width, own, 2 if i and not j else 1))
                last_width = wider * own
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.last = nn.Sequential(Norm(last_width), last()) if last else nn.Identity()
        self.head = nn.Linear(last_width, 10)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.stages(self.stem(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def pre_activation() -> Network:
    """Pre-activation blocks, four a stage."""
    return Network(lambda c, w, s: PreActivation(c, w, s, nn.ReLU), (4, 4, 4), last=nn.ReLU)


def squeezed() -> Network:
    """Basic blocks with squeeze and excitation, and SiLU."""
    return Network(lambda c, w, s: Block(c, w, s, nn.SiLU, se=True), (3, 3, 3))


def basic32() -> Network:
    """ReLU, basic blocks, five a stage."""
    return Network(lambda c, w, s: Block(c, w, s, nn.ReLU), (5, 5, 5))


def bottlenecks() -> Network:
    """ReLU, bottlenecks of 8 channels, which give 32."""
    return Network(lambda c, w, s: Block(c, w, s, nn.ReLU, bottleneck=True), (4, 4, 4), width=8, wider=4)


def wide() -> Network:
    """GELU, basic blocks of 32 channels, in two stages of few blocks."""
    return Network(lambda c, w, s: Block(c, w, s, nn.GELU), (3, 3), width=32)


def on_digits() -> Network:
    """ReLU, basic blocks, for grey images of 8×8 pixels."""
    return Network(lambda c, w, s: Block(c, w, s, nn.ReLU), (4, 4), channels=1)


@dataclass(frozen=True)
class Source:
    """A network, and how it is trained. made: the SOURCE of `convert`; '' for a function of this file."""

    name: str
    made: str = ""
    data: str = "CIFAR"
    epochs: int = 1
    lr: float = 0.05
    size: str = "32"


SOURCES = (
    Source("resnet20", "cifar:resnet20", epochs=0),
    Source("resnet56", "cifar:resnet56", epochs=0),
    Source("pre_activation"),
    Source("squeezed"),
    Source("basic32"),
    Source("bottlenecks"),
    Source("wide"),
    Source("on_digits", data="digits", epochs=30, size="8"),
)
HELD_BACK = ("basic32", "bottlenecks", "wide", "on_digits")


def data_of(source: Source, given: str) -> str:
    """The data set that a network is for."""
    return given if source.data == "CIFAR" else source.data


def resode(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "resode_cli", *arguments], check=True)


def make(source: Source, out: Path, data: str, weights: str | None) -> None:
    """Train one, or convert the weights that are given."""
    target = out / f"{source.name}.safetensors"
    begun = target if not source.epochs else out / f"{source.name}-untrained.safetensors"
    made = source.made or f"{Path(__file__).resolve()}:{source.name}"
    own = [] if source.made else ["--input-size", source.size]
    loaded = ["--weights", weights] if weights else ["--no-pretrained"]
    resode("convert", made, *own, *loaded, "-o", str(begun), "--force")
    if source.epochs:
        run = out / f"run-{source.name}"
        training = (
            f"--epochs {source.epochs} --batch-size 64 --lr {source.lr} --warmup 50 --bn batch --adjoint backprop"
        )
        training += " --weight-decay 5e-4 --force --trust-source"
        resode("finetune", str(begun), "--data", data_of(source, data), *training.split(), "--out", str(run))
        target.write_bytes((run / "last.safetensors").read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--resnet20")
    parser.add_argument("--resnet56")
    parser.add_argument("--only", nargs="+", choices=[source.name for source in SOURCES])
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        weights = getattr(given, source.name, None)
        if (given.only and source.name not in given.only) or (source.made and weights is None):
            continue
        make(source, given.out, given.data, weights)


if __name__ == "__main__":
    main()
