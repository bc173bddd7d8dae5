"""What a block decides in Python goes on being decided: by its input, by what it holds, by what its children do."""

from __future__ import annotations

import array
import fractions
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small_blocks import Block, assert_alike, blocks_of, images, pair
from torch import Tensor, nn

BY_INPUT: dict[str, Callable[[Tensor], bool]] = {
    "in a set": lambda x: x.shape[-1] in {7, 14},
    "in a dictionary": lambda x: {7: True}.get(x.shape[-1], False),
    "spelled out": lambda x: "7" in str(x.shape),
    "by its class": lambda x: isinstance(x, Tensor) and x.shape[-1] > 6,
    "compared": lambda x: x.shape[-1] > 6,
}


@pytest.mark.parametrize("name", BY_INPUT)
def test_a_decision_by_the_size_is_taken_at_every_size(name: str) -> None:
    decide = BY_INPUT[name]

    class Decides(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.g(x) * (3.0 if decide(x) else 1.0)

    net, model = pair(Decides)
    for size in (5, 7):
        assert_alike(net, model, size)


@dataclass(slots=True)
class Slots:
    scale: float = 0.5


class Items:
    """Finds its attributes in a dictionary."""

    def __init__(self) -> None:
        self._data = {"scale": 0.5}

    def __getattr__(self, name: str) -> Any:
        return object.__getattribute__(self, "_data")[name]


class Helper:
    k = 0.5

    def by(self, value: float) -> float:
        return value * self.k


class Gate(nn.Module):
    k = 0.5


def namespace() -> Any:
    return type("Config", (), {"scale": 0.5})


HELD: dict[str, tuple[Callable[[], Any], Callable[[Any], float], Callable[[nn.Module], object]]] = {
    "a class": (namespace, lambda c: c.scale, lambda b: setattr(b.held, "scale", 2.0)),
    "slots": (Slots, lambda c: c.scale, lambda b: setattr(b.held, "scale", 2.0)),
    "a configuration": (Items, lambda c: c.scale, lambda b: b.held._data.update(scale=2.0)),
    "a bound method": (lambda: Helper().by, lambda c: c(1.0), lambda b: setattr(b.held.__self__, "k", 2.0)),
    "a fraction": (lambda: fractions.Fraction(1, 2), float, lambda b: setattr(b, "held", fractions.Fraction(2))),
    "an array": (lambda: array.array("d", [0.5]), lambda c: c[0], lambda b: b.held.__setitem__(0, 2.0)),
    "a tensor": (lambda: torch.tensor(0.5), float, lambda b: b.held.fill_(2.0)),
    "a module in a tuple": (lambda: (Gate(),), lambda c: c[0].k, lambda b: setattr(b.held[0], "k", 2.0)),
}


@pytest.mark.parametrize("name", HELD)
def test_what_a_block_holds_may_change(name: str) -> None:
    make, get, change = HELD[name]

    class Holds(Block):
        def __init__(self) -> None:
            super().__init__()
            self.held = make()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.g(x) * get(self.held)

    net, model = pair(Holds)
    assert_alike(net, model)
    for each in (net, model):
        for block in blocks_of(each):
            change(block)
    assert_alike(net, model)


def test_blocks_that_hold_different_numbers_are_read_one_by_one() -> None:
    class Clamps(Block):
        count = 0

        def __init__(self) -> None:
            super().__init__()
            self.held = Slots(100.0 if Clamps.count % 4 == 0 else 0.01)
            Clamps.count += 1

        def forward(self, x: Tensor) -> Tensor:
            return x + self.g(x).clamp(-self.held.scale, self.held.scale)

    net, model = pair(Clamps)
    assert_alike(net, model)


class Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class Gain(nn.Identity):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, input: Tensor) -> Tensor:
        return self.gain * input


@pytest.mark.parametrize(
    "forward",
    [lambda b, x: b.act(x + b.g(x)), lambda b, x: x + b.act(b.g(x)), lambda b, x: b.act(x) + b.g(x)],
    ids=["after", "in the branch", "in the shortcut"],
)
@pytest.mark.parametrize("kind", [Swish, Gain])
def test_layers_that_learn_go_on_learning_whatever_their_name(kind: type[nn.Module], forward: Any) -> None:
    class Learns(Block):
        def __init__(self) -> None:
            super().__init__()
            self.act = kind()

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    try:
        net, model = pair(Learns)
    except Exception as error:
        assert "no residual steps" in str(error)
        return
    for each in (net, model):
        each(images()).square().sum().backward()
    for a, b in zip(blocks_of(net), blocks_of(model), strict=True):
        for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
            assert p.grad is not None and q.grad is not None, name
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5)


class Beta(nn.Module):
    """Swish with a setting of its own, under a name that is known with another formula."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class Capped(Beta):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0, self.beta)


Beta.__name__, Capped.__name__ = "Swish", "ReLU"


@pytest.mark.parametrize("kind", [Beta, Capped])
def test_an_activation_of_the_users_own_is_called_whatever_its_name(kind: type[nn.Module]) -> None:
    class After(Block):
        def __init__(self) -> None:
            super().__init__()
            self.act = kind()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x + self.g(x))

    net, model = pair(After)
    assert_alike(net, model)
    for each in (net, model):
        for block in blocks_of(each):
            block.act.beta = 0.3
    assert_alike(net, model)


class Meter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ticks = 0
        self.seen: list[int] = []
        self.register_buffer("count", torch.zeros(()))

    def by_number(self) -> None:
        self.ticks += 1

    def by_list(self) -> None:
        self.seen.append(1)

    def by_buffer(self) -> None:
        self.count += 1


@pytest.mark.parametrize("method", ["by_number", "by_list", "by_buffer"])
def test_a_method_of_a_child_is_called_every_time(method: str) -> None:
    class Measures(Block):
        def __init__(self) -> None:
            super().__init__()
            self.meter = Meter()

        def forward(self, x: Tensor) -> Tensor:
            getattr(self.meter, method)()
            return x + self.g(x)

    net, model = pair(Measures)
    counted = []
    for each in (net, model):
        meters = [block.meter for block in blocks_of(each)]
        before = [m.ticks + len(m.seen) + float(m.count) for m in meters]
        for _ in range(5):
            each(images())
        counted.append([m.ticks + len(m.seen) + float(m.count) - b for m, b in zip(meters, before, strict=True)])
    assert counted == [[5.0] * 4, [5.0] * 4]
