"""A block is run by what was read of it only where its code is plain; whatever else it looks at is looked at anew."""

from __future__ import annotations

import math
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from small_blocks import Block, Net, assert_alike, blocks_of, images, pair
from timm.layers import drop_path
from torch import Tensor, nn

from resode_cli.errors import ResodeError
from resode_cli.network.reading import read
from resode_cli.network.residual import GENERIC, LINEAR
from resode_cli.surgery.convert import convert

Change = Callable[[nn.Module], object]


def every(change: Change) -> Change:
    """The change in every block of a network."""

    def all_of_them(net: nn.Module) -> None:
        for block in blocks_of(net):
            change(block)

    return all_of_them


def setting(**values: Any) -> Change:
    return every(lambda block: [setattr(block, name, value) for name, value in values.items()])


class Scaled(Block):
    """Its branch times what `factor` says."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.5
        self.child = Child()
        self.prepare()

    def prepare(self) -> None:
        """Hold something more."""

    def factor(self) -> Any:
        return 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.g(x) * self.factor()


class Child(nn.Module):
    k = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x

    def __mul__(self, other: float) -> float:
        return self.k * other

    def __len__(self) -> int:
        return int(2 * self.k)


class Quiet(nn.Module):
    k = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x


class Inner(nn.Module):
    """Called by its block, which asks it for more."""

    k = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.t = 2.0
        self.mix = nn.Conv2d(4, 4, 1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

    def scale(self) -> float:
        return 1 / self.t

    @property
    def is_on(self) -> bool:
        return self.t > 3

    def extra(self, x: Tensor) -> Tensor:
        return x * self.t

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.mix(x))


class Asks(Block):
    """Calls a child in its branch, and looks at it besides."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def factor(self) -> Any:
        return 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.g(x)) * self.factor()


def asks(**given: Any) -> type[nn.Module]:
    return type("Asks", (Asks,), given)


def table_function(k: float = 0.5) -> float:
    return k


def other_function(k: float = 2.0) -> float:
    return k * 1.5


def first_code(table: dict[str, Any] = {"code": table_function.__code__, "defaults": (0.5,)}) -> None:  # noqa: B006
    table_function.__code__, table_function.__defaults__ = table["code"], table["defaults"]


def nameless() -> type[nn.Module]:
    """A class from a text, in a namespace that has no name."""
    space: dict[str, Any] = {"Scaled": Scaled, "CFG": CFG}
    exec("class Named(Scaled):\n    def factor(self):\n        return CFG['k']", space)
    return space["Named"]  # type: ignore[no-any-return]


CFG = {"k": 0.5}


def helper() -> float:
    return float(helper.k)  # type: ignore[attr-defined]


class Asked:
    """Finds its value when it is looked at."""

    value = 0.5

    def __get__(self, block: object, kind: type) -> float:
        return Asked.value


class Settings:
    inner = type("Inner", (), {"k": 0.5})


class Table(dict):  # type: ignore[type-arg]
    k = 0.5


PACKAGE = sys.modules["resode_package"] = types.ModuleType("resode_package")
PACKAGE.part = sys.modules["resode_package.part"] = types.ModuleType("resode_package.part")  # type: ignore[attr-defined]


def factors(**given: Any) -> type[nn.Module]:
    """A class of blocks with these methods."""
    return type("Scaled", (Scaled,), given)


def reset() -> None:
    """Put everything outside the blocks back."""
    helper.k = 0.5  # type: ignore[attr-defined]
    Asked.value = 0.5
    Settings.inner.k = 0.5  # type: ignore[attr-defined]
    PACKAGE.part.k = 0.5
    Quiet.k = 0.5
    CFG["k"] = 0.5
    first_code()
    F.gelu = GELU
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)


def imports_it(self: Any) -> float:
    import resode_package.part  # type: ignore[import-not-found]

    return resode_package.part.k  # type: ignore[no-any-return,attr-defined]


def formatted(self: Any) -> float:
    return float(f"{self.scale}")


def spelled(self: Any) -> float:
    return 2.0 if str(self.scale) == "2.0" else 1.0


def by_percent(self: Any) -> float:
    return 2.0 if "%s" % self.scale == "2.0" else 1.0  # noqa: UP031


def tried(self: Any) -> float:
    try:
        return 1.0 / self.count
    except ZeroDivisionError:
        return 3.0


def freeze(block: nn.Module) -> None:
    block.conv.weight.requires_grad_(False)  # type: ignore[union-attr]


def replaced(block: Any) -> None:
    block.kept = torch.full((2,), 2.0)


GELU = F.gelu
CASES: dict[str, tuple[type[nn.Module], Change]] = {
    "whether a parameter learns": (
        factors(factor=lambda s: 2.0 if all(p.requires_grad for p in s.parameters()) else 1.0),
        every(freeze),
    ),
    "how many numbers learn": (
        factors(factor=lambda s: sum(p.numel() for p in s.parameters() if p.requires_grad) / 100),
        every(freeze),
    ),
    "a number in a set": (factors(factor=lambda s: 2.0 if s.scale in {2.0} else 1.0), setting(scale=2.0)),
    "a number in a dictionary": (factors(factor=lambda s: {2.0: 3.0}.get(s.scale, 1.0)), setting(scale=2.0)),
    "a number in an f-string": (factors(factor=formatted), setting(scale=2.0)),
    "a number spelled out": (factors(factor=spelled), setting(scale=2.0)),
    "a number in a format": (factors(factor=by_percent), setting(scale=2.0)),
    "an import": (factors(factor=imports_it), lambda net: setattr(PACKAGE.part, "k", 2.0)),
    "a package's part": (factors(factor=lambda s: PACKAGE.part.k), lambda net: setattr(PACKAGE.part, "k", 2.0)),
    "a class in a class": (factors(factor=lambda s: Settings.inner.k)  # type: ignore[attr-defined]
   , lambda net: setattr(Settings.inner, "k", 2.0)),
    "a weak reference": (
        factors(prepare=lambda s: setattr(s, "ref", weakref.ref(s.child)), factor=lambda s: s.ref().k),
        every(lambda b: setattr(b.child, "k", 2.0)),
    ),
    "a function in an attribute": (
        factors(prepare=lambda s: setattr(s, "get", lambda c=s.child: c.k), factor=lambda s: s.get()),
        every(lambda b: setattr(b.child, "k", 2.0)),
    ),
    "a child's class attribute": (
        factors(prepare=lambda s: setattr(s, "child", Quiet()), factor=lambda s: s.child.k),
        every(lambda b: setattr(b.child, "k", 2.0)),
    ),
    "a child in a product": (factors(factor=lambda s: s.child * 1.0), every(lambda b: setattr(b.child, "k", 2.0))),
    "a child's length": (factors(factor=lambda s: float(len(s.child))), every(lambda b: setattr(b.child, "k", 2.0))),
    "a descriptor": (factors(odd=Asked(), factor=lambda s: s.odd), lambda net: setattr(Asked, "value", 2.0)),
    "its own way to find attributes": (
        factors(__getattr__=lambda s, n: 1.0 / s.scale if n == "odd" else nn.Module.__getattr__(s, n),
                factor=lambda s: s.odd),
        setting(scale=2.0),
    ),
    "an event": (
        factors(prepare=lambda s: setattr(s, "event", threading.Event()),
                factor=lambda s: 2.0 if s.event.is_set() else 1.0,
                __deepcopy__=lambda s, memo: s),
        every(lambda b: b.event.set()),
    ),
    "an attribute of a dictionary": (
        factors(prepare=lambda s: setattr(s, "table", Table()), factor=lambda s: s.table.k),
        every(lambda b: setattr(b.table, "k", 2.0)),
    ),
    "an attribute of a function": (factors(factor=lambda s: helper()), lambda net: setattr(helper, "k", 2.0)),
    "a function in a namespace": (
        factors(prepare=lambda s: setattr(s, "tools", types.SimpleNamespace(scale=lambda: s.child.k)),
                factor=lambda s: s.tools.scale(), __deepcopy__=lambda s, memo: s),
        every(lambda b: setattr(b.child, "k", 2.0)),
    ),
    "a comparison of plain tensors": (
        factors(prepare=lambda s: setattr(s, "kept", torch.ones(2)),
                factor=lambda s: 2.0 if torch.equal(s.kept, torch.ones(2)) else 1.0),
        every(replaced),
    ),
    "a tensor as an array": (
        factors(prepare=lambda s: setattr(s, "kept", torch.ones(2)), factor=lambda s: float(np.asarray(s.kept)[0])),
        every(replaced),
    ),
    "torch's algorithms": (
        factors(factor=lambda s: 2.0 if torch.are_deterministic_algorithms_enabled() else 1.0),
        lambda net: torch.use_deterministic_algorithms(True),
    ),
    "torch's type of numbers": (
        factors(factor=lambda s: 2.0 if torch.get_default_dtype() == torch.float64 else 1.0),
        lambda net: torch.set_default_dtype(torch.float64),
    ),
    "a child's method": (asks(factor=lambda s: s.inner.scale()), every(lambda b: setattr(b.inner, "t", 4.0))),
    "a child's property": (
        asks(factor=lambda s: 2.0 if s.inner.is_on else 1.0), every(lambda b: setattr(b.inner, "t", 4.0))
    ),
    "a child's method of tensors": (
        asks(forward=lambda s, x: x + s.inner.extra(s.inner(s.g(x)))), every(lambda b: setattr(b.inner, "t", 4.0))
    ),
    "a child's own class": (asks(factor=lambda s: s.inner.k), every(lambda b: setattr(b.inner, "k", 4.0))),
    "a child's child": (
        asks(factor=lambda s: 2.0 if s.inner.mix.bias is None else 1.0),
        every(lambda b: setattr(b.inner.mix, "bias", None)),
    ),
    "a child's tensor": (
        asks(factor=lambda s: 2.0 if s.conv.bias is None else 1.0), every(lambda b: setattr(b.conv, "bias", None))
    ),
    "the length of a child's child": (
        asks(factor=lambda s: float(len(s.inner.body))), every(lambda b: b.inner.body.append(nn.ReLU()))
    ),
    "what a sequence holds": (
        asks(forward=lambda s, x: x + s.inner.body(s.g(x)) * float(sum(1 for _ in s.inner.body))),
        every(lambda b: b.inner.body.append(nn.ReLU())),
    ),
    "a helper's edited code": (
        factors(factor=lambda s: table_function()),
        lambda net: setattr(table_function, "__code__", other_function.__code__),
    ),
    "a helper's edited default": (
        factors(factor=lambda s: table_function()), lambda net: setattr(table_function, "__defaults__", (2.0,))
    ),
    "a function of torch that is replaced": (
        factors(forward=lambda s, x: x + F.gelu(s.g(x))), lambda net: setattr(F, "gelu", torch.tanh)
    ),
    "code without a name": (nameless(), lambda net: CFG.update(k=2.0)),
    "its dictionary of attributes": (factors(factor=lambda s: s.__dict__["scale"]), setting(scale=2.0)),
    "a call of its class": (
        factors(factor=lambda s: 1.0),
        every(lambda b: setattr(type(b), "__call__", lambda s, x: nn.Module.__call__(s, x) * 2)),
    ),
    "a tried division": (factors(prepare=lambda s: setattr(s, "count", 1), factor=tried), setting(count=0)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_whatever_a_block_looks_at_it_looks_at_each_time(name: str) -> None:
    kind, change = CASES[name]
    reset()
    try:
        net, model = pair(kind)
        net.double(), model.double()
        x = torch.randn(3, 3, 5, 5, dtype=torch.float64)
        torch.testing.assert_close(model(x), net(x))
        before = net(x)
        for each in (net, model):
            change(each)
        assert not torch.allclose(net(x), before), "the change changes nothing"
        torch.testing.assert_close(model(x), net(x))
    finally:
        reset()


def test_a_forward_that_a_subclass_gets_later_is_the_one_that_runs() -> None:
    class Heir(Scaled):
        pass

    net, model = pair(Heir)
    assert_alike(net, model)
    Heir.forward = lambda self, x: x - self.g(x)  # type: ignore[method-assign]
    assert_alike(net, model)


def test_a_forward_that_a_librarys_class_gets_later_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models.resnet import BasicBlock

    class Heir(BasicBlock):
        def __init__(self) -> None:
            super().__init__(4, 4)

    net, model = pair(Heir)
    assert_alike(net, model)
    monkeypatch.setattr(BasicBlock, "forward", lambda self, x: x + self.conv1(x))
    assert_alike(net, model)


EPS = 0.5


def shift(x: Tensor, by: float = EPS) -> Tensor:
    return torch.nn.functional.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1] + by


class Classic(Block):
    expansion = 1

    def __init__(self) -> None:
        super().__init__()
        self.downsample: nn.Module | None = None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv(self.relu(self.bn(x)))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Gated(Block):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(4, 4, 1)
        self.gamma = nn.Parameter(torch.full((4, 1, 1), 0.1))
        self.drop = 0.1

    def gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(F.adaptive_avg_pool2d(x, 1)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.g(x)
        return x + drop_path(self.gamma * y * self.gate(y), self.drop, self.training)


class Sized(Block):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))
        self.scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).view(x.shape[0], x.shape[1], x.size(2), -1)
        for i, layer in enumerate(self.layers):
            y = layer(y) / math.sqrt(1 + i)
        return x + self.scale * y.to(x.dtype)


class Helped(Block):
    @property
    def width(self) -> int:
        return 4

    def forward(self, x: Tensor) -> Tensor:
        if self.width < 1:
            raise ValueError("too narrow")
        return x.add(F.silu(shift(self.g(x)) / self.width))


class HasAHeir(Classic):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class PreActivated(Block):
    """As in many a repository for CIFAR: the shortcut is there where it is needed."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        return self.conv(out) + shortcut


class Various(Block):
    """What blocks ask for that is plain."""

    def __init__(self) -> None:
        super().__init__()
        self.mode = "pre"
        self.shortcut = nn.Identity()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "odd":
            raise ValueError(f"mode {self.mode}")
        y = self.bn(x) if self.mode in ("pre", "both") else x
        for i in range(len(self.layers)):
            y = self.layers[i](y)
        y = timm.layers.drop_path(y, getattr(self, "drop", 0.0), self.training)
        if not isinstance(self.shortcut, nn.Identity):
            x = self.shortcut(x)
        return x + y * self.conv.weight.sum()


@pytest.mark.parametrize(
    ("kind", "activation"),
    [
        (Classic, "relu"),
        (HasAHeir, "relu"),
        (Gated, LINEAR),
        (Sized, LINEAR),
        (Helped, LINEAR),
        (PreActivated, LINEAR),
        (Various, LINEAR),
    ],
)
def test_plain_blocks_are_read(kind: type[nn.Module], activation: str) -> None:
    split = read(kind()).split
    assert split is not None
    assert split.activation == activation != GENERIC


def test_the_pre_form_says_why_a_block_has_to_be_called() -> None:
    kind = asks(factor=lambda s: PACKAGE.part.k)
    with pytest.raises(ResodeError, match=r"form 'pre' .* block blocks\.0, .*it looks at part of PACKAGE"):
        convert(Net(kind), example=images(), form="pre")
