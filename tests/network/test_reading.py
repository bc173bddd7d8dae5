"""A block's branch, read off its own forward: what is a step, what follows the addition, and what is not a step."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resode_cli.network.reading import ByMode, read, runs_its_children
from resode_cli.network.residual import BlockResidual

WIDTH = 6


class Block(nn.Module):
    """A branch of one layer; what is done with it is in the subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.relu = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        self.scale = 0.5


class Linear(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


class InPlace(Block):
    """As ResNets are written: the shared, writing ReLU is both in the branch and after the addition."""

    def forward(self, x: Tensor) -> Tensor:
        identity = self.shortcut(x)
        out = self.norm(self.relu(self.layer(x)))
        out += identity
        return self.relu(out)


class Functions(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.add(self.layer(x).tanh() * self.scale, x))


class Methods(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).add_(x).relu_()


class Silu(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.layer(x), inplace=True)


class Gelu(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.layer(x))


class GeluTanh(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.layer(x), approximate="tanh")


class Mish(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.mish(x + self.layer(x))


class TwoAdditions(Block):
    """A block of attention and a perceptron is one step."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(x)
        return x + self.norm(x)


class Defaults(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        out = self.layer(x)
        if mask is not None:
            out = out * mask
        return x + (out.flip(1) if causal else out)


class OwnDropout(Block):
    """Looks at its mode itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.layer(x), 0.5, training=self.training)


class MakesATensor(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x) * torch.arange(WIDTH)


class Parameter(Block):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.layer(x)


class Counts(Block):
    """Writes to its own buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count.add_(1)
        return x + self.layer(x) * self.count


class PerFeature(Block):
    """Adds one number to every feature, as a context of the whole image is added."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layer(x).mean(1, keepdim=True))


class PerFeatureLinear(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean(1, keepdim=True) + x


class IdentityAtTheEnd(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(F.relu(self.shortcut(x + self.layer(x))))


class TwoActivations(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.silu(x + self.layer(x)))


class Assigns(Counts):
    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return x + self.layer(x)


class Method(Block):
    def branch(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


STEPS = [
    (Linear, "linear"),
    (InPlace, "relu"),
    (Functions, "relu"),
    (Methods, "relu"),
    (Silu, "silu"),
    (Gelu, "gelu"),
    (GeluTanh, "gelu_tanh"),
    (Mish, "generic"),
    (TwoAdditions, "generic"),
    (Defaults, "linear"),
    (OwnDropout, "linear"),
    (MakesATensor, "generic"),
    (Parameter, "linear"),
    (Method, "linear"),
    (Counts, "linear"),
    (PerFeature, "relu"),
    (PerFeatureLinear, "linear"),
    (IdentityAtTheEnd, "relu"),
]
each_step = pytest.mark.parametrize(("kind", "activation"), STEPS, ids=[kind.__name__ for kind, _ in STEPS])


def state() -> Tensor:
    return torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def residual(block: nn.Module) -> BlockResidual:
    rule = read(block).split
    assert rule is not None
    return BlockResidual(block, rule.branch, rule.activation)


def taped(function, block: nn.Module) -> list[Tensor]:
    """The value, its gradients, and where the random numbers stand afterwards; the state must be left alone."""
    x = state().requires_grad_()
    torch.manual_seed(3)
    out = function(x * 1)  # a copy that may be written to, were it allowed
    parameters = list(block.parameters())
    gradients = torch.autograd.grad((out * state().flip(0)).sum(), [x, *parameters], allow_unused=True)
    return [out, *(g for g in gradients if g is not None), torch.get_rng_state()]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@each_step
def test_a_step_is_the_block_and_has_its_gradient(kind, activation, training):
    block = kind().double().train(training)
    untouched = copy.deepcopy(block)
    r = residual(block)
    assert r.activation == activation
    step, expected = taped(lambda x: r.step(x, 1.0), block), taped(untouched, untouched)
    assert all(torch.equal(a, b) for a, b in zip(step, expected, strict=True))
    value, wanted = taped(r, block), taped(lambda x: untouched(x) - x, untouched)
    for a, b in zip(value, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@each_step
def test_reading_and_running_a_branch_leave_block_and_state_alone(kind, activation):
    block = kind().double()
    before = copy.deepcopy(block).__dict__
    r, x = residual(block), state()
    r(x)
    assert torch.equal(x, state())
    assert block.__dict__.keys() == before.keys() and type(block) is kind


def test_a_branch_that_looks_at_its_mode_follows_it():
    block = OwnDropout().double().eval()
    r, x = residual(block), state()
    assert isinstance(r.branch, ByMode)
    assert torch.equal(r(x), block.layer(x))
    block.train()
    torch.manual_seed(0)
    assert (r(x) == 0).double().mean() > 0.2
    block.eval()
    assert torch.equal(r(x), block.layer(x))


def test_a_branch_follows_the_block_that_it_is_given():
    block = Linear().double()
    r, other, x = residual(block), Linear().double(), state()
    assert torch.equal(r.branch(other, x), other.layer(x))


def test_blocks_of_equal_code_share_their_branch_and_others_do_not():
    first, second, third = Functions(), Functions(), Functions()
    third.scale = 0.25  # the code reads it
    a, b, c, d = (read(block).split for block in (first, second, third, Methods()))
    assert a == b == c != d
    x = torch.randn(2, WIDTH)
    twice = residual(first).branch(third, x)
    first.scale = 0.25
    assert torch.equal(residual(third).branch(first, x) / 0.25, first.layer(x).tanh())
    assert torch.equal(twice / 0.25, third.layer(x).tanh())


@pytest.mark.parametrize("kind", [Functions, OwnDropout, Mish])
def test_rules_can_be_pickled(kind):
    block = kind().eval()
    rule, x = read(block).split, torch.randn(2, WIDTH)
    again = pickle.loads(pickle.dumps(rule))
    assert again == rule and torch.equal(again.branch(block, x), rule.branch(block, x))


def test_the_shortcuts_modules_decide_not_the_class():
    block = InPlace()
    block.shortcut = nn.Linear(WIDTH, WIDTH)
    assert read(block).reason == "is a sum of norm (LayerNorm), shortcut (Linear), not of its input and a branch"


class NoAddition(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x * self.layer(x))


class NormAfterwards(Block):
    """Post-norm: what is added to is not what comes out."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.layer(x))


class Half(Block):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + self.layer(x)


class Twice(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x) + x


class Subtracts(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sub(self.layer(x), x)


class Scaled(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.layer(x), x, alpha=2)


class Pair(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.layer(x), x


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (NoAddition, r"ends in norm \(LayerNorm\), not in an addition"),
        (NormAfterwards, r"ends in norm \(LayerNorm\), not in an addition"),
        (Half, r"is a sum of mul, layer \(Linear\), not of its input and a branch"),
        (Twice, "not of its input and a branch"),
        (Subtracts, "not in an addition"),
        (Scaled, "not in an addition"),
        (Pair, "returns more than one tensor"),
        (TwoActivations, "ends in silu, not in an addition"),
    ],
)
def test_what_is_no_step_is_named_with_the_reason(kind, reason):
    reading = read(kind())
    assert reading.split is None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(reading.reason)


class Decides(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x) if x.sum() > 0 else x


class TwoStates(Block):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.layer(y)


@pytest.mark.parametrize("kind", [Decides, TwoStates, Assigns])
def test_a_forward_that_cannot_be_traced_is_unclear(kind):
    reading = read(kind())
    assert reading.split is None and reading.unclear


def test_a_branch_that_writes_to_its_own_buffers_does_so_when_it_runs_and_not_when_it_is_read():
    block = Counts().double()
    r = residual(block)
    assert block.count == 0
    r(state())
    r(state())
    assert block.count == 2
    block.eval()
    r(state())
    assert block.count == 2


class Iterates(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        for i, layer in enumerate(layers):
            self.add_module(f"b{i}", layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class Backwards(Iterates):
    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(list(self.children())):
            x = layer(x)
        return x


class Skips(Iterates):
    def forward(self, x: Tensor) -> Tensor:
        return self.b0(x)


class Adds(Iterates):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("kind", "runs"),
    [(Iterates, True), (nn.Sequential, True), (Backwards, False), (Skips, False), (Adds, False)],
)
def test_what_runs_its_children_one_after_the_other(kind, runs):
    assert runs_its_children(kind(Linear(), Linear())) is runs
