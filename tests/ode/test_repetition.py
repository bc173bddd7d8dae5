"""A re-evaluation is the forward pass's, whatever a block draws from; or an error names the block. Against autograd."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from resode_cli.errors import ResodeError
from resode_cli.ode import SCHEMES, Adjoint, Field, Monitor, Residual, solve

STEPS, WIDTH = 4, 6


class Block(nn.Module):
    """A branch of one layer; subclasses do something to it that depends on more than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


class NumpyDropout(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.from_numpy(np.random.rand(*x.shape) > 0.5)


class NumpyNormal(Block):
    """numpy keeps a spare normal number from one call to the next, where the words of its state do not change."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + np.random.normal())


class Coin(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if random.random() < 0.5 else 0.1)


class OwnGenerator(Block):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.rand(x.shape, dtype=x.dtype, generator=self.generator)


class ListedGenerators(Block):
    def __init__(self) -> None:
        super().__init__()
        self.generators: list[Any] = [np.random.default_rng(0), random.Random(1), np.random.RandomState(2)]

    def forward(self, x: Tensor) -> Tensor:
        scale = self.generators[0].random() + self.generators[1].random() + self.generators[2].rand()
        return super().forward(x) * scale


class Dropout(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5)


class DrawsByData(Block):
    """Draws more numbers the larger its input is."""

    def forward(self, x: Tensor) -> Tensor:
        count = int(x.detach().abs().sum()) % 5 + 1
        return super().forward(x) * torch.rand(count, dtype=x.dtype).sum()


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class WeightNorm(Block):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.layer)


class BatchNorm(Block):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, dtype=torch.float64, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Counter(Block):
    """Its output depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class CountingBuffer(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class RunningScale(Block):
    """As an observer of quantisation: scaled by an average of what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.ones((), dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = 0.5 * self.seen + 0.5 * x.detach().abs().max()
        return super().forward(x) / self.seen


class Spectral(Block):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.spectral_norm(self.layer)


class HiddenGenerator(Block):
    """Draws from a generator that no attribute holds."""

    def __init__(self) -> None:
        super().__init__()
        source = random.Random(5)
        self.draw: Callable[[], float] = lambda: source.random()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (0.5 + self.draw())


class AsksForGradients(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if torch.is_grad_enabled() else 2.0)


REPEATED = {
    "plain": Block,
    "numpy": NumpyDropout,
    "random": Coin,
    "a generator of its own": OwnGenerator,
    "generators in a list": ListedGenerators,
    "dropout": Dropout,
    "as many numbers as the data say": DrawsByData,
    "checkpointed inside": Checkpointed,
    "weight norm": WeightNorm,
    "BatchNorm": BatchNorm,
    "BatchNorm, cumulative": lambda: BatchNorm(momentum=None),
    "whether gradients are recorded": AsksForGradients,
}
REFUSED = {
    "a counter": Counter,
    "a counter in a buffer": CountingBuffer,
    "a running scale": RunningScale,
    "numpy's spare normal": NumpyNormal,
    "a generator out of sight": HiddenGenerator,
}
EXACT = {
    "all": Adjoint("checkpoint"),
    "spaced": Adjoint("checkpoint", anchors=3),
    "binomial": Adjoint("checkpoint", snapshots=2),
}


class Branch(Residual):
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)


def blocks_of(kind: Callable[[], nn.Module], *, tied: bool) -> tuple[list[nn.Module], tuple[int, ...]]:
    torch.manual_seed(0)
    blocks = [kind() for _ in range(1 if tied else STEPS)]
    return blocks, (0,) * STEPS if tied else tuple(range(STEPS))


def gradients(kind: Callable[[], nn.Module], adjoint: Adjoint, *, tied: bool, scheme: str = "euler") -> list[Tensor]:
    """Of a loss after two steps of training, so that states that outlive a step count; the buffers last."""
    blocks, schedule = blocks_of(kind, tied=tied)
    field = Field(tuple(Branch(block) for block in blocks), schedule, 0.3)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    found: list[Tensor] = []
    for _ in range(2):
        x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
        out = solve(field, SCHEMES[scheme], adjoint.plan(STEPS, scheme), x, monitor=Monitor())
        parameters = [p for block in blocks for p in block.parameters()]
        found += torch.autograd.grad(out.square().sum(), [x, *parameters])
    found += [b.detach().clone().double() for block in blocks for b in block.buffers()]
    # The generators go on from where one forward pass leaves them, whatever was evaluated again.
    return [*found, torch.rand(1), torch.tensor([random.random(), np.random.rand()])]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("plan", EXACT)
@pytest.mark.parametrize("kind", REPEATED)
def test_exact_methods_are_autograds(kind: str, plan: str, tied: bool) -> None:
    expected = gradients(REPEATED[kind], Adjoint("backprop"), tied=tied)
    found = gradients(REPEATED[kind], EXACT[plan], tied=tied)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["numpy", "random", "a generator of its own", "generators in a list", "dropout"])
def test_the_second_evaluation_of_heun_too(kind: str) -> None:
    expected = gradients(REPEATED[kind], Adjoint("backprop"), tied=False, scheme="heun")
    found = gradients(REPEATED[kind], Adjoint("checkpoint"), tied=False, scheme="heun")
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("plan", EXACT)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_repeated_is_an_error_that_names_the_block(kind: str, plan: str, tied: bool) -> None:
    with pytest.raises(ResodeError, match=f"block {REFUSED[kind].__name__}, step .*'backprop'"):
        gradients(REFUSED[kind], EXACT[plan], tied=tied)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_power_iteration_is_right_once_it_has_converged_and_refused_before(tied: bool) -> None:
    """Spectral norm in train mode improves its vectors in every forward pass."""
    expected = gradients(Spectral, Adjoint("backprop"), tied=tied)
    try:
        found = gradients(Spectral, Adjoint("checkpoint"), tied=tied)
    except ResodeError as error:
        assert "block Spectral, step" in str(error)
        return
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", REFUSED)
def test_plain_backprop_takes_them_all(kind: str) -> None:
    assert all(torch.isfinite(g).all() for g in gradients(REFUSED[kind], Adjoint("backprop"), tied=False))


@pytest.mark.parametrize("method", ["pc", "multistep"])
@pytest.mark.parametrize("kind", ["a counter", "a running scale", "a generator out of sight"])
def test_reversals_compare_where_they_hold_a_state(kind: str, method: str) -> None:
    with pytest.raises(ResodeError, match=f"block {REFUSED[kind].__name__}"):
        gradients(REFUSED[kind], Adjoint(method, anchors=2), tied=False)
