"""Small float64 fields and stages for the tests of the numerics, and what their results are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resode_cli.network.reading import read_split
from resode_cli.network.specs import BlockSpec, StageSpec
from resode_cli.network.stage import OdeStage
from resode_cli.ode import SCHEMES, Adjoint, Field, Monitor, Residual, solve
from resode_cli.sources.cifar import CifarBlock

WIDTH = 5

FieldMaker = Callable[..., Field]
StageMaker = Callable[..., OdeStage]
Gradients = dict[str, Tensor]


class TanhBlock(nn.Module):
    """tanh(x Wᵀ + b): smooth and not linear; counts its own evaluations."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(x @ self.weight.T + self.bias)


class DropoutModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.tanh(self.conv(x)))


class DropoutFunction(nn.Module):
    """Draws random numbers without a layer that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(torch.tanh(self.conv(x)), 0.4, self.training)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.conv(x))


class WritesInput(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x.relu_())) + x


class ModuleResidual(Residual):
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test draws the same numbers, and leaves no trace for the next."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def as_field() -> Callable[..., Field]:
    """A field of arbitrary modules, one residual function each."""

    def make(modules: Sequence[nn.Module], schedule: Sequence[int], step_size: float) -> Field:
        return Field(tuple(ModuleResidual(m) for m in modules), tuple(schedule), step_size)

    return make


@pytest.fixture
def make_field(as_field: Callable[..., Field]) -> FieldMaker:
    """tanh fields of `depth` steps over a horizon.

    tied: one block. runs: 4 blocks, each for a quarter of the depth. smooth: weights A cos t + B sin t at
    t = n/N. alternating: A, B, A, B, … rough: independent weights per step. half: rough below, smooth above.
    """

    def make(kind: str, depth: int, *, horizon: float = 1.0) -> Field:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64)

        scale = WIDTH**-0.5
        if kind == "tied":
            blocks = [TanhBlock(draw(WIDTH, WIDTH) * scale, draw(WIDTH))]
        elif kind in ("rough", "alternating", "runs"):
            count = {"rough": depth, "alternating": 2, "runs": 4}[kind]
            blocks = [TanhBlock(draw(WIDTH, WIDTH) * scale, draw(WIDTH)) for _ in range(count)]
        else:
            a, b, c = draw(WIDTH, WIDTH) * scale, draw(WIDTH, WIDTH) * scale, draw(WIDTH)
            times = torch.arange(depth, dtype=torch.float64) / depth
            blocks = [TanhBlock(a * t.cos() + b * t.sin(), c * t.cos()) for t in times]
            if kind == "half":
                rough = [TanhBlock(draw(WIDTH, WIDTH) * scale, draw(WIDTH)) for _ in range(depth // 2)]
                blocks[: len(rough)] = rough
        per_run = depth // 4 if kind == "runs" else 1
        schedule = [n // per_run % len(blocks) for n in range(depth)]
        return as_field(blocks, schedule, horizon / depth)

    return make


@pytest.fixture
def state() -> Tensor:
    """x_0: a batch of three."""
    return torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def field_gradients() -> Callable[..., list[Tensor]]:
    """∂L/∂x_0 and ∂L/∂θ of L = ½‖x_N‖², whose adjoint at x_N is x_N itself."""

    def run(
        field: Field, adjoint: Adjoint, x: Tensor, *, scheme: str = "euler", monitor: Monitor | None = None
    ) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        plan = adjoint.plan(field.depth, scheme)
        out = solve(field, SCHEMES[scheme], plan, leaf, monitor=monitor or Monitor())
        for residual in field.residuals:
            residual.module.calls = 0  # so that what is counted is the backward pass
        return list(torch.autograd.grad(out.square().sum() / 2, [leaf, *field.parameters()]))

    return run


@pytest.fixture
def make_block() -> Callable[[str], nn.Module]:
    """A block with a shortcut of a class that the package does not know, by the class's name above."""
    classes = {c.__name__: c for c in (Plain, DropoutModule, DropoutFunction, WritesInput)}
    return lambda name: classes[name]()


@pytest.fixture
def make_stage() -> StageMaker:
    """A stage of convolutions and BatchNorm, in train mode; or of the given blocks."""

    def make(
        schedule: Sequence[int] = (0, 0, 0),
        *,
        blocks: Sequence[nn.Module] | None = None,
        scheme: str = "euler",
        horizon: int = 1,
        dtype: torch.dtype = torch.float64,
    ) -> OdeStage:
        count = max(schedule, default=-1) + 1
        if blocks is None:
            blocks = [CifarBlock(4, 4, stride=1, shortcut="A") for _ in range(count)]
        names = tuple(str(b) for b in range(len(blocks)))
        spec = StageSpec(
            name="layer1",
            container="layer1",
            transition=(),
            source_blocks=names,
            blocks=tuple(BlockSpec(name, name) for name in names),
            schedule=tuple(schedule),
            horizon=Fraction(horizon),
            scheme=scheme,
        )
        rules = [read_split(block) for block in blocks]
        return OdeStage(spec, transition={}, blocks=list(blocks), splits=rules).to(dtype).train()

    return make


@pytest.fixture
def images() -> Tensor:
    """A state of four channels, not negative, as after a ReLU."""
    return torch.rand(3, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def stage_gradients() -> Callable[..., Gradients]:
    """Gradients of ½‖x_N‖² by name, 'x' for the input; random layers draw the same numbers every time."""

    def run(stage: OdeStage, adjoint: Adjoint, x: Tensor) -> Gradients:
        stage.use_adjoint(adjoint)
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        out = stage(leaf)
        named = {name: p for name, p in stage.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(out.square().sum() / 2, [leaf, *named.values()])
        return dict(zip(("x", *named), found, strict=True))

    return run


@pytest.fixture
def swept() -> Callable[..., tuple[list[Tensor], Tensor]]:
    """A backward sweep that shares no code with the package: gradients of ½‖x_N‖², and the final x̃_0.

    advance(n, x_n) -> x_{n+1}; step_back(n, x_{n+1}) -> (state for the Jacobian, state to carry).
    """

    def run(field: Field, x: Tensor, advance, step_back) -> tuple[list[Tensor], Tensor]:
        parameters = list(field.parameters())
        total = [torch.zeros_like(p) for p in parameters]
        with torch.no_grad():
            for n in range(field.depth):
                x = advance(n, x)
        a = x
        for n in reversed(range(field.depth)):
            with torch.no_grad():
                at, x = step_back(n, x)
            leaf = at.clone().requires_grad_()
            a, *grads = torch.autograd.grad(advance(n, leaf), [leaf, *parameters], a, materialize_grads=True)
            total = [t + g for t, g in zip(total, grads, strict=True)]
        return [a, *total], x

    return run
