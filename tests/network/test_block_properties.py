"""Properties of blocks that differ within a network: what adds a branch to its input is a step, and nothing else is.

Hypothesis composes classes of blocks. The reference is the source network under autograd, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import resode_cli
from resode_cli.network.reading import read, whole

CONVERSIONS = settings(deadline=None, derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
READINGS = settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(1, channels),
    "none": lambda _: nn.Identity(),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


class Block(nn.Module):
    """after(added(x, y)) with y = dropped(scaled(branch(x))); the classes below say what each of these is."""

    def __init__(
        self, channels: int, *, kernels: tuple[int, ...], norm: str, activation: str, pre: bool, dropout: float
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for place, kernel in enumerate(kernels):
            convolution = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
            if pre:
                # An activation that writes would write to the state where no norm comes before it.
                writes = activation == "relu in place" and norm == "none" and place == 0
                layers += [NORMS[norm](channels), ACTIVATIONS["relu" if writes else activation](), convolution]
            else:
                layers += [convolution, NORMS[norm](channels)]
                layers += [ACTIVATIONS[activation]()] if place < len(kernels) - 1 else []
        self.layers, self.dropout = nn.ModuleList(layers), dropout
        self.number, self.scalar = 0.4, nn.Parameter(torch.tensor(0.6))
        self.per_channel = nn.Parameter(torch.linspace(0.3, 0.9, channels).reshape(-1, 1, 1))
        self.relu, self.norm, self.shortcut = nn.ReLU(), nn.GroupNorm(1, channels), nn.Conv2d(channels, channels, 1)
        self.drop = nn.Dropout(dropout)

    def branch(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def scaled(self, y: Tensor) -> Tensor:
        return y

    def dropped(self, y: Tensor) -> Tensor:
        return y

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def after(self, z: Tensor) -> Tensor:
        return z

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.added(x, self.dropped(self.scaled(self.branch(x)))))


def in_place(x: Tensor, y: Tensor) -> Tensor:
    y += x
    return y


def onto_a_copy(x: Tensor, y: Tensor) -> Tensor:
    out = x.clone()
    out += y
    return out


SCALES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "none": lambda _, y: y,
    "number": lambda block, y: block.number * y,
    "parameter": lambda block, y: y * block.scalar,
    "per channel": lambda block, y: y * block.per_channel,
}
DROPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "none": lambda _, y: y,
    "module": lambda block, y: block.drop(y),
    "function": lambda block, y: F.dropout(y, block.dropout, block.training),
}
# x: state, y: branch. All but the last add to the state itself; the last is the same in numbers.
ADDITIONS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "x + y": lambda _, x, y: x + y,
    "y + x": lambda _, x, y: y + x,
    "torch.add(x, y)": lambda _, x, y: torch.add(x, y),
    "torch.add(y, x)": lambda _, x, y: torch.add(y, x),
    "x.add(y)": lambda _, x, y: x.add(y),
    "y.add_(x)": lambda _, x, y: y.clone().add_(x),
    "y += x": lambda _, x, y: in_place(x, y.clone()),
    "copy += y": lambda _, x, y: onto_a_copy(x, y),
}
AFTER: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda _, z: z,
    "relu": lambda block, z: block.relu(z),
    "gelu": lambda _, z: F.gelu(z),
    "silu": lambda _, z: F.silu(z),
}
# What looks alike and is no x + y, each with whether the block may be taken for a step as a whole all the same: with
# its branch at zero it returns its input, or its activation, so that its change of the state is a residual function.
NO_STEPS: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], bool]] = {
    "no addition": (lambda _block, _x, y: y, False),
    "half the state": (lambda _, x, y: 0.5 * x + y, False),
    "the state twice": (lambda _, x, y: x + y + x, False),
    "the mean": (lambda _, x, y: (x + y) / 2, False),
    "a product": (lambda _, x, y: x * y, False),
    "a maximum": (lambda _, x, y: torch.maximum(x, y), False),
    "less the state": (lambda _, x, y: y - x, False),
    "twice the state": (lambda _, x, y: torch.add(y, x, alpha=2), False),
    "mirrored": (lambda _, x, y: x.flip(3) + y, False),
    "shuffled channels": (lambda _, x, y: x.roll(1, 1) + y, False),
    "a projection": (lambda block, x, y: block.shortcut(x) + y, False),
    "a norm afterwards": (lambda block, x, y: block.norm(x + y), False),
    "a sum that is added": (lambda block, x, y: block.shortcut(x + y), False),
    "a rectified state": (lambda _, x, y: F.relu(x) + y, True),
    "a state without gradient": (lambda _, x, y: x.detach() + y, True),
    "a decision": (lambda _, x, y: x + y if y.sum() >= 0 else x - y, True),
}


@cache
def block_class(addition: str, scale: str, drop: str, after: str) -> type[Block]:
    """A class that does these, or one of what is no step."""
    added = ADDITIONS[addition] if addition in ADDITIONS else NO_STEPS[addition][0]
    methods = {"added": added, "scaled": SCALES[scale], "dropped": DROPS[drop], "after": AFTER[after]}
    return type("Made", (Block,), methods)


shapes = st.fixed_dictionaries(
    {
        "kernels": st.lists(st.sampled_from([1, 3]), min_size=1, max_size=2).map(tuple),
        "norm": st.sampled_from(sorted(NORMS)),
        "activation": st.sampled_from(sorted(ACTIVATIONS)),
        "pre": st.booleans(),
        "dropout": st.sampled_from([0.2, 0.5]),
    }
)
scales, drops, afters = (st.sampled_from(sorted(choices)) for choices in (SCALES, DROPS, AFTER))
channels = st.integers(2, 4)
seeds = st.integers(0, 2**31)
Design = tuple[type[Block], dict[str, Any]]
residual_blocks = st.tuples(st.builds(block_class, st.sampled_from(sorted(ADDITIONS)), scales, drops, afters), shapes)


class Net(nn.Module):
    """A stem, the blocks, and a head that tells the pixels apart."""

    def __init__(self, width: int, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, width, 3, padding=1), nn.Sequential(*blocks)
        self.head = nn.Linear(width * 25, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).flatten(1))


def randomised(net: nn.Module) -> nn.Module:
    """In float64, with statistics and weights of norms that are not where they start."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return net.double().eval()


def made(design: Design, width: int) -> Block:
    kind, shape = design
    return kind(width, **shape)


def passed(net: nn.Module, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of the images; those of parameters are left where they belong."""
    leaf = images.clone().requires_grad_()
    torch.manual_seed(seed)
    logits = net(leaf)
    F.cross_entropy(logits, torch.arange(len(images))).backward()
    return logits, leaf.grad


def steps_of(model: resode_cli.OdeResNet) -> set[str]:
    """The paths of the blocks that became steps."""
    return {f"{s.spec.container}.{block.origin}" for s in model.stages.values() for block in s.spec.blocks}


def assert_same(model: resode_cli.OdeResNet, source: nn.Module, images: Tensor, adjoint: resode_cli.Adjoint, seed: int):
    """Logits, all gradients and all buffers, in the mode that both are in."""
    model.use_adjoint(adjoint)
    expected, at_images = passed(source, images, seed)
    found, at_same = passed(model, images, seed)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(at_same, at_images, rtol=1e-8, atol=1e-10)
    parameters = {model.file_name(name.removeprefix("net.")): p for name, p in model.named_parameters()}
    buffers = {model.file_name(name.removeprefix("net.")): b for name, b in model.named_buffers()}
    for name, parameter in source.named_parameters():
        wanted, gradient = parameter.grad, parameters[name].grad
        if wanted is None:  # it is there for others of the made-up blocks
            assert gradient is None or not gradient.any(), name
        else:
            torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    for name, buffer in source.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-10, atol=1e-10)


exact_adjoints = st.sampled_from(
    [
        resode_cli.Adjoint("checkpoint"),
        resode_cli.Adjoint("checkpoint", 2),
        resode_cli.Adjoint("checkpoint", snapshots=1),
        resode_cli.Adjoint("multistep", 1),
    ]
)


@CONVERSIONS
@given(channels, st.lists(residual_blocks, min_size=2, max_size=4), exact_adjoints, seeds)
def test_a_network_of_differing_blocks_converts_to_itself(width, designs, adjoint, seed):
    """In eval and in train mode, where it draws its dropout and moves its statistics as the source does."""
    torch.manual_seed(seed)
    net = randomised(Net(width, [made(design, width) for design in designs]))
    source, images = copy.deepcopy(net), torch.randn(3, 3, 5, 5, dtype=torch.float64)
    model, _ = resode_cli.convert(net, example=images)
    assert steps_of(model) == {f"body.{n}" for n in range(len(designs))}
    assert_same(model, source, images, resode_cli.Adjoint("checkpoint"), seed)
    model.zero_grad()
    source.zero_grad()
    assert_same(model.train(), source.train(), images, adjoint, seed)


no_step_blocks = st.tuples(
    st.sampled_from(sorted(NO_STEPS)), scales, st.sampled_from(["none", "module"]), st.sampled_from(["linear", "relu"])
)


@CONVERSIONS
@given(channels, st.lists(residual_blocks, min_size=3, max_size=3), no_step_blocks, shapes, seeds)
def test_what_is_no_step_stays_as_it_is_between_steps(width, designs, kind, shape, seed):
    torch.manual_seed(seed)
    first, *others = (made(design, width) for design in designs)
    net = randomised(Net(width, [first, block_class(*kind)(width, **shape), *others]))
    source, images = copy.deepcopy(net), torch.randn(3, 3, 5, 5, dtype=torch.float64)
    model, _ = resode_cli.convert(net, example=images)
    found, steps = steps_of(model), {"body.0", "body.2", "body.3"}
    assert found == steps or (NO_STEPS[kind[0]][1] and found == steps | {"body.1"})
    assert_same(model, source, images, resode_cli.Adjoint("checkpoint"), seed)
    model.zero_grad()
    source.zero_grad()
    assert_same(model.train(), source.train(), images, resode_cli.Adjoint("checkpoint"), seed)


@READINGS
@given(channels, st.sampled_from(sorted(ADDITIONS)), scales, drops, afters, shapes, st.booleans(), seeds)
def test_a_branch_is_read_as_the_block_writes_it(width, addition, scale, drop, after, shape, training, seed):
    torch.manual_seed(seed)
    block = block_class(addition, scale, drop, after)(width, **shape)
    randomised(block).train(training)
    split = read(block).split
    if addition == "copy += y":  # whether a copy is the state itself, its reader does not say
        assert split is None or split.branch is whole
        return
    assert split is not None and split.activation == after and split.branch is not whole
    source, x = copy.deepcopy(block), torch.randn(2, width, 5, 5, dtype=torch.float64)
    torch.manual_seed(seed)
    found = split.branch(block, x.clone())
    torch.manual_seed(seed)
    assert torch.equal(found, source.dropped(source.scaled(source.branch(x.clone()))))


@READINGS
@given(channels, no_step_blocks, shapes, st.booleans(), seeds)
def test_what_is_no_step_is_never_read_as_one(width, kind, shape, training, seed):
    torch.manual_seed(seed)
    block = block_class(*kind)(width, **shape)
    randomised(block).train(training)
    reading = read(block)
    assert reading.split is None and reading.reason
    if not NO_STEPS[kind[0]][1]:  # and indeed it is none
        x = torch.randn(2, width, 5, 5, dtype=torch.float64)
        block.eval()
        assert not torch.allclose(block(x), block.after(x + block.scaled(block.branch(x))), rtol=1e-3, atol=1e-3)
