"""Properties of the reader of blocks: whatever a residual block does, its converted network does the same.

Hypothesis makes up the blocks; the reference is the network itself under autograd, in float64.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resode_cli.ode import Adjoint
from resode_cli.surgery.convert import convert

CHANNELS = 4
NORMS = {
    "batch": lambda: nn.BatchNorm2d(CHANNELS),
    "group": lambda: nn.GroupNorm(2, CHANNELS),
    "none": nn.Identity,
}
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "none": nn.Identity}
ADDITIONS = ("x + y", "y + x", "torch.add", "y += x", "y.add_")
SCALES = ("none", "number", "parameter", "per channel", "gate")


class AnyBlock(nn.Module):
    """activation(x + scale · branch(x)), or the same with norm and activation before each convolution."""

    def __init__(self, *, pre: bool, kernels: tuple[int, ...], norm: str, activation: str, addition: str, scale: str):
        super().__init__()
        layers: list[nn.Module] = []
        for place, kernel in enumerate(kernels):
            convolution = nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=kernel // 2, bias=norm == "none")
            before = [NORMS[norm](), ACTIVATIONS[activation]()]
            between = [] if place == len(kernels) - 1 else [ACTIVATIONS[activation]()]
            layers += [*before, convolution] if pre else [convolution, NORMS[norm](), *between]
        self.branch = nn.Sequential(*layers)
        self.last = nn.Identity() if pre else ACTIVATIONS[activation]()
        self.addition, self.kind = addition, scale
        self.number = 0.5
        shape = (CHANNELS, 1, 1) if scale == "per channel" else ()
        self.weight = nn.Parameter(torch.full(shape, 0.7)) if scale in ("parameter", "per channel") else None
        self.gate = nn.Conv2d(CHANNELS, CHANNELS, 1) if scale == "gate" else None

    def scaled(self, y: Tensor) -> Tensor:
        if self.kind == "number":
            return self.number * y
        if self.weight is not None:
            return y * self.weight
        if self.gate is not None:
            return y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1)))
        return y

    def forward(self, x: Tensor) -> Tensor:
        y = self.scaled(self.branch(x))
        if self.addition == "x + y":
            y = x + y
        elif self.addition == "y + x":
            y = y + x
        elif self.addition == "torch.add":
            y = torch.add(x, y)
        elif self.addition == "y += x":
            y = 1 * y
            y += x
        else:
            y = (1 * y).add_(x)
        return self.last(y)


class Net(nn.Module):
    """A stem, equal blocks, and a head."""

    def __init__(self, blocks: list[AnyBlock]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.layer1 = nn.Sequential(*blocks)
        self.head = nn.Linear(CHANNELS, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer1(self.stem(x)).mean((2, 3)))


designs = st.fixed_dictionaries(
    {
        "pre": st.booleans(),
        "kernels": st.lists(st.sampled_from([1, 3]), min_size=1, max_size=3).map(tuple),
        "norm": st.sampled_from(sorted(NORMS)),
        "activation": st.sampled_from(sorted(ACTIVATIONS)),
        "addition": st.sampled_from(ADDITIONS),
        "scale": st.sampled_from(SCALES),
    }
)


@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(designs, st.integers(2, 4), st.integers(0, 2**31))
def test_a_made_up_block_converts_to_itself(design: dict, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    net = Net([AnyBlock(**design) for _ in range(count)]).double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    images = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    labels = torch.arange(3)
    reference = copy.deepcopy(net)
    expected = reference(images)
    F.cross_entropy(expected, labels).backward()
    model, _ = convert(net, example=images)
    assert sum(stage.spec.depth for stage in model.stages.values()) == count, "a block was not taken for a step"
    model.use_adjoint(Adjoint("checkpoint"))
    found = model(images)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    F.cross_entropy(found, labels).backward()
    gradients = {model.file_name(name.removeprefix("net.")): p.grad for name, p in model.named_parameters()}
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-10, msg=name)


class NoStep(AnyBlock):
    """What looks alike and is none: the state is changed on its way to the addition."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + self.scaled(self.branch(x))


@settings(deadline=None, derandomize=True, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(designs, st.integers(0, 2**31))
def test_a_block_that_halves_its_state_is_never_read_as_a_plain_step(design: dict, seed: int) -> None:
    """It may be taken whole, as x + (block(x) − x), but what it computes stays what it was."""
    torch.manual_seed(seed)
    net = Net([AnyBlock(**design), NoStep(**design), AnyBlock(**design), AnyBlock(**design)]).double().eval()
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = copy.deepcopy(net)(images)
    model, _ = convert(net, example=images)
    model.use_adjoint(Adjoint("checkpoint"))
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)
