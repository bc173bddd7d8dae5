"""The residual function of a block: every row of the table in residual.py."""

from __future__ import annotations

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resode_cli.errors import UsageError
from resode_cli.network.reading import read_split
from resode_cli.network.residual import ACTIVATIONS, BlockResidual, activation_name, check_form
from resode_cli.sources.cifar import CifarBlock

# The formulas again, so that nothing is compared with itself.
FORMULAS = {
    "relu": lambda z: z.clamp_min(0),
    "silu": lambda z: z * torch.sigmoid(z),
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
    "gelu_tanh": lambda z: z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2,
    "hardswish": lambda z: z * (z + 3).clamp(0, 6) / 6,
}


class Shift(nn.Module):
    """g(x) = w ⊙ tanh(x) + b: any values of g, at any x."""

    def __init__(self, w: Tensor, b: Tensor) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(w), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        return self.w * torch.tanh(x) + self.b


def call(module, x):
    return module(x)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def residual(activation, form="exact", size=200):
    w, b = 2 * draw(2, size)
    return BlockResidual(Shift(w, b), call, activation, form)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def gradients(function, module, x, weights):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad((function(leaf) * weights).sum(), [leaf, *module.parameters()])


@pytest.mark.parametrize("activation", FORMULAS)
def test_exact_form_is_the_block_minus_the_state(activation):
    r, a, x = residual(activation), FORMULAS[activation], 3 * draw(5, 200)
    assert_same(r(x), a(x + r.module(x)) - x)


@pytest.mark.parametrize("activation", FORMULAS)
def test_exact_form_has_the_blocks_gradient(activation):
    r, a, x, v = residual(activation), FORMULAS[activation], 3 * draw(5, 200), draw(5, 200).flip(0)
    expected = gradients(lambda z: a(z + r.module(z)) - z, r.module, x, v)
    assert_same(gradients(r, r.module, x, v), expected)


def test_every_activation_is_covered():
    assert ACTIVATIONS.keys() == FORMULAS.keys()


@pytest.mark.parametrize("activation", FORMULAS)
def test_activations_satisfy_the_identity_the_formula_needs(activation):
    z = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    a = ACTIVATIONS[activation]
    assert_same(a(z), FORMULAS[activation](z))
    assert_same(a(z) - a(-z), z)


@pytest.mark.parametrize("x", [0.0, 1.0, -1.0], ids=lambda x: f"x={x}")
@pytest.mark.parametrize("g", [0.0, 1.0, -1.0], ids=lambda g: f"g={g}")
def test_relu_has_autograds_gradient_at_ties(g, x):
    # g = 0 after a zero-initialised norm, x = 0 after a ReLU, and x + g = 0 without either.
    size = (3,)
    r = BlockResidual(Shift(torch.zeros(size).double(), torch.full(size, g).double()), call, "relu")
    state, v = torch.full(size, x).double(), draw(3)
    expected = gradients(lambda z: F.relu(z + r.module(z)), r.module, state, v)
    found = gradients(lambda z: z + r(z), r.module, state, v)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(state + r(state), F.relu(state + r.module(state)))


def test_linear_output_is_the_branch():
    r, x = residual("linear"), draw(5, 200)
    assert torch.equal(r(x), r.module(x))


def test_a_generic_block_is_the_block_minus_the_state():
    block, x = nn.Sequential(nn.Linear(6, 6), nn.Mish()).double(), draw(5, 6)
    assert_same(BlockResidual(block, call, "generic")(x), block(x) - x)


@pytest.mark.parametrize("activation", FORMULAS)
def test_pre_form_activates_before_the_branch_and_drops_the_clip(activation):
    r, x = residual(activation, "pre"), 3 * draw(5, 200)
    expected = r.module(FORMULAS[activation](x))
    assert_same(r(x), expected)
    assert_same(r.step(x, 1.0), x + expected)


def test_pre_form_of_a_linear_output_is_the_branch():
    r, x = residual("linear", "pre"), draw(5, 200)
    assert torch.equal(r(x), r.module(x))


def test_pre_form_of_a_generic_block_is_refused():
    with pytest.raises(UsageError, match="layer1.0"):
        check_form("pre", "generic", "layer1.0")
    check_form("exact", "generic", "layer1.0")
    check_form("pre", "relu", "layer1.0")


@pytest.mark.parametrize("activation", FORMULAS)
def test_the_unit_step_is_the_block_to_the_last_bit(activation):
    r = BlockResidual(Shift(*draw(2, 2000).float()), call, activation)
    x = draw(5, 2000).float()
    assert torch.equal(r.step(x, 1.0), ACTIVATIONS[activation](x + r.module(x)))


def test_the_unit_step_of_a_convolutional_block_is_its_forward():
    torch.manual_seed(0)
    block = CifarBlock(8, 8, stride=1, shortcut="A")
    rule, x = read_split(block), torch.randn(4, 8, 9, 9)
    assert torch.equal(BlockResidual(block, rule.branch, rule.activation).step(x, 1.0), block(x))


def test_the_unit_step_of_a_generic_block_is_its_forward():
    torch.manual_seed(0)
    block, x = nn.Sequential(nn.Linear(50, 50), nn.Mish()), torch.randn(9, 50)
    assert torch.equal(BlockResidual(block, call, "generic").step(x, 1.0), block(x))


@pytest.mark.parametrize("form", ["exact", "pre"])
@pytest.mark.parametrize("activation", [*FORMULAS, "linear"])
def test_a_shorter_step_scales_the_residual(activation, form):
    r, x = residual(activation, form), draw(5, 200)
    assert_same(r.step(x, 0.3), x + 0.3 * r(x))


class Swish(nn.Module):
    """A user's class, which may do anything. timm has its own of this name."""


class LeakyRelu(nn.ReLU):
    """A subclass that is another function."""


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (None, "linear"),
        (nn.Identity(), "linear"),
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.SiLU(), "silu"),
        (Swish(), "generic"),
        (timm.layers.Swish(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.Hardswish(), "hardswish"),
        (nn.Mish(), "generic"),
        (nn.LeakyReLU(), "generic"),
        (nn.ReLU6(), "generic"),
        (nn.PReLU(), "generic"),
        (LeakyRelu(), "generic"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_activation_name(module, name):
    assert activation_name(module) == name
