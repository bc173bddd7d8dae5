"""A converted network is changed as its source would be: the same change of both, and the same answer of both."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

import resode_cli
from resode_cli.ode import Adjoint

WIDTH = 12


class Block(nn.Module):
    """What blocks of these tests are made of; what they do is in the subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.act = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        self.inner = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.scale, self.p, self.times, self.flag, self.calls = 0.5, 0.25, 1, True, 0
        self.table, self.factors, self.function = {"scale": 0.5}, [0.5, 2.0], torch.tanh
        self.settings = Settings()
        self.array = numpy.array([0.5])

    def branch(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.shortcut(x) + self.branch(x))


class Settings:
    def __init__(self) -> None:
        self.scale = 0.5

    def scaled(self, x: Tensor) -> Tensor:
        return self.scale * x


class Scaled(Block):
    def forward(self, x):
        return F.relu(x + self.scale * self.layer(x))


class Dropped(Block):
    def forward(self, x):
        return x + F.dropout(self.layer(x), self.p, self.training)


class Calculates(Block):
    def forward(self, x):
        return x + self.layer(x) * (1 - self.p) / 0.5**self.scale


class Decides(Block):
    """As drop-path is written."""

    def forward(self, x):
        out = self.layer(x)
        if self.training and self.p > 0:
            out = out * torch.rand(len(x), 1).ge(self.p) if False else F.dropout(out, self.p)
        return F.relu(x + out)


class Repeats(Block):
    def forward(self, x):
        out = x
        for _ in range(self.times):
            out = self.layer(out)
        return F.silu(x + out)


class Flagged(Block):
    def forward(self, x):
        return x + (self.layer(x) if self.flag else self.norm(x))


class Table(Block):
    def forward(self, x):
        return F.relu(x + self.table["scale"] * self.layer(x) * self.factors[0])


class Object(Block):
    def forward(self, x):
        return F.relu(x + self.settings.scaled(self.layer(x)))


class Array(Block):
    def forward(self, x):
        return x + self.layer(x) * float(self.array[0])


class Function(Block):
    def forward(self, x):
        return x + self.function(self.layer(x))


class Counter(Block):
    def forward(self, x):
        self.calls += 1
        return x + self.layer(x) / self.calls


class TorchCoin(Block):
    def forward(self, x):
        if self.training and torch.rand(()) > 0.5:
            return x
        return x + self.layer(x)


class NumpyCoin(Block):
    def forward(self, x):
        return x + self.layer(x) * (float(numpy.random.rand()) if self.training else 1.0)


class PythonCoin(Block):
    def forward(self, x):
        return x + self.layer(x) * (random.random() if self.training else 1.0)


class Shape(Block):
    def forward(self, x):
        return x + (self.layer(x) if x.shape[0] > 4 else self.norm(x))


class WithoutGradient(Block):
    def forward(self, x):
        with torch.no_grad():
            weight = self.norm(x)
        return x + weight * self.layer(x)


class ModeOfAChild(Block):
    def forward(self, x):
        return x + F.dropout(self.layer(x), 0.5, self.norm.training)


class Checkpointed(Block):
    def forward(self, x):
        return x + checkpoint(self.branch, x, use_reentrant=False)


class Random(Block):
    """torchvision's stochastic depth: a child with a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = StochasticDepth(0.25, "row")

    def forward(self, x):
        return F.relu(x + self.drop(self.layer(x)))


class Gained(Block):
    def forward(self, x):
        return x + self.gain * self.layer(x)


class Shared(Block):
    """One module under two names, which a trace knows by the first."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.act

    def forward(self, x):
        return self.again(x + self.layer(self.act(x)))


class SharedGain(Gained):
    def __init__(self) -> None:
        super().__init__()
        self.bias = self.gain

    def forward(self, x):
        return x + self.gain * self.layer(x) + 0 * self.bias


class Inner(Block):
    def forward(self, x):
        out = x
        for layer in self.inner:
            out = layer(out)
        return F.relu(x + out)


def decorated(forward):
    @functools.wraps(forward)
    def run(self, x):
        return forward(self, 2 * x) - x

    return run


class Decorated(Block):
    @decorated
    def forward(self, x):
        return x + self.layer(x)


class Undecorated(Block):
    @torch.compiler.disable
    def forward(self, x):
        return x + self.scale * self.layer(x)


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)
        torch.manual_seed(1)
        for parameter in (*self.down.parameters(), *self.up.parameters()):
            nn.init.normal_(parameter)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def sets(name: str, value: object) -> Callable[[nn.Module], None]:
    return lambda block: setattr(block, name, copy.deepcopy(value))


def negated(module: nn.Module, args: object, out: Tensor) -> Tensor:
    return -out


def halved(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] / 2,)


def cut(module: nn.Module, into: tuple[Tensor, ...], out: object) -> tuple[Tensor, ...]:
    return tuple(g / 3 for g in into)


def own_forward(block: nn.Module) -> None:
    block.forward = lambda x: x - block.layer(x)


def quantised(block: nn.Module) -> None:
    block.act = nn.Sequential(block.act, nn.Hardtanh(0, 0.5))  # as an observer or a fake quantisation is put there


CHANGES: list[tuple[type[Block], Callable[[nn.Module], object]]] = [
    (Scaled, sets("scale", 0.0)),
    (Scaled, sets("scale", 2)),
    (Scaled, sets("scale", torch.tensor(0.1))),
    (Scaled, sets("scale", nn.Parameter(torch.ones(())))),
    (Dropped, sets("p", 0.9)),
    (Calculates, sets("p", 0.9)),
    (Calculates, sets("scale", 3.0)),
    (Decides, sets("p", 0.0)),
    (Decides, sets("p", 0.9)),
    (Repeats, sets("times", 3)),
    (Flagged, sets("flag", False)),
    (Table, lambda block: block.table.update(scale=3.0)),
    (Table, lambda block: block.factors.insert(0, 3.0)),
    (Table, sets("table", {"scale": 3.0})),
    (Object, lambda block: setattr(block.settings, "scale", 3.0)),
    (Array, lambda block: block.array.fill(3.0)),
    (Function, sets("function", torch.sin)),
    (Random, lambda block: setattr(block.drop, "p", 0.75)),
    (Random, sets("drop", nn.Identity())),
    (Block, sets("act", nn.SiLU())),
    (Block, lambda block: setattr(block, "act", None) or setattr(block, "act", nn.Identity())),
    (Block, lambda block: setattr(block.act, "forward", torch.sigmoid)),
    (Block, quantised),
    (Block, sets("shortcut", nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False))),
    (Block, sets("branch", torch.sin)),
    (Block, own_forward),
    (Block, lambda block: setattr(block, "__class__", Scaled)),
    (Block, lambda block: setattr(block, "layer", LoRA(block.layer))),
    (Block, lambda block: parametrizations.weight_norm(block.layer)),
    (Block, lambda block: parametrizations.orthogonal(block.layer)),
    (Block, lambda block: prune.l1_unstructured(block.layer, "weight", 0.5)),
    (Gained, lambda block: prune.l1_unstructured(block, "gain", 0.5)),
    (Gained, lambda block: nn.utils.parametrize.register_parametrization(block, "gain", nn.Softplus(), unsafe=True)),
    (Shared, sets("again", nn.SiLU())),
    (Shared, sets("act", nn.SiLU())),
    (SharedGain, lambda block: setattr(block, "gain", nn.Parameter(torch.zeros(WIDTH)))),
    (Inner, lambda block: block.inner.append(nn.Tanh())),
    (Inner, lambda block: block.inner.__setitem__(0, nn.Tanh())),
    (Block, lambda block: block.register_forward_hook(negated)),
    (Block, lambda block: block.register_forward_pre_hook(halved)),
    (Block, lambda block: block.act.register_forward_hook(negated)),
    (Block, lambda block: block.layer.register_forward_hook(negated)),
    (Block, lambda block: block.shortcut.register_forward_pre_hook(halved)),
    (Block, lambda block: block.register_full_backward_hook(cut)),
    (Block, lambda block: block.register_full_backward_pre_hook(lambda _, out: (3 * out[0],))),
    (Decorated, sets("scale", 0.0)),
    (Undecorated, sets("scale", 0.0)),
    (Checkpointed, sets("act", nn.SiLU())),
    *((kind, lambda block: None) for kind in (Counter, TorchCoin, NumpyCoin, PythonCoin, Shape)),
    *((kind, lambda block: None) for kind in (WithoutGradient, ModeOfAChild)),
]
names = [f"{kind.__name__}-{i}" for i, (kind, _) in enumerate(CHANGES)]
each_change = pytest.mark.parametrize(("kind", "change"), CHANGES, ids=names)
# What draws from a generator or counts is another function when it is evaluated again.
NOT_REPEATED = (Counter, NumpyCoin, PythonCoin)


def network(kind: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), kind(), kind(), nn.Linear(WIDTH, 3))


def pair(kind: type[nn.Module], before: Callable[[nn.Module], object] = lambda net: None, **arguments):
    """A network, and another of the same weights that is converted."""
    net, source = network(kind), network(kind)
    for each in (net, source):
        before(each)
    model = resode_cli.convert(source, example=grey(), **arguments)[0]
    return net, model


def grey() -> Tensor:
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def blocks_of(net: nn.Module) -> list[nn.Module]:
    if isinstance(net, nn.Sequential):
        return [net[2], net[3]]
    return [block for stage in net.stages.values() for block in stage.blocks]


def outcome(net: nn.Module, training: bool, *, gradients: bool = True) -> list[Tensor]:
    """Logits, gradients and buffers by name, and where the generators stand afterwards."""
    net.train(training).zero_grad()
    torch.manual_seed(3), numpy.random.seed(3), random.seed(3)
    logits = net(grey())
    after = [torch.get_rng_state(), torch.tensor([numpy.random.rand(), random.random()])]
    if not gradients:
        return [logits.detach(), *after]
    logits.square().sum().backward()
    found = {name.removeprefix("net."): p for name, p in net.named_parameters()}
    return [logits.detach(), *after, *(p.grad for _, p in by_block(found))]


def by_block(tensors: dict[str, nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return sorted(
        (name.replace("2.3.", "3.").replace("2.2.", "2."), p) for name, p in tensors.items() if p.grad is not None
    )


def assert_alike(net: nn.Module, model: nn.Module, *, gradients: bool = True) -> None:
    for training in (False, True, False):
        expected, found = outcome(net, training, gradients=gradients), outcome(model, training, gradients=gradients)
        assert torch.equal(found[0], expected[0])
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["backprop", "checkpoint"])
@each_change
def test_a_change_of_a_block_after_its_conversion_is_followed(kind, change, method):
    if method == "checkpoint" and issubclass(kind, NOT_REPEATED):
        pytest.skip("what is evaluated again is another function")
    net, model = pair(kind)
    model.use_adjoint(Adjoint(method))
    assert_alike(net, model)
    for each in (net, model):
        for block in blocks_of(each)[1:]:
            change(block)
    assert_alike(net, model)
    for each in (net, model):
        change(blocks_of(each)[0])
    assert_alike(net, model)
