"""What plain backprop has a gradient for and a planned backward pass has not is an error; against plain autograd."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resode_cli.errors import ResodeError
from resode_cli.ode import SCHEMES, Adjoint, Monitor
from resode_cli.ode.adjoint import solve
from resode_cli.ode.field import Field, Residual

STEPS, WIDTH = 4, 6
METHODS = ["checkpoint", "pc", "multistep", "euler"]
SEEN: list[Tensor] = []


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


class Branch(Residual):
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)


class Keeps(Block):
    """Keeps an activation in a place of some kind."""

    def __init__(self, put: Callable[[Keeps, Tensor], object]) -> None:
        super().__init__()
        self.put = put
        self.box: Any = None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.put(self, out)
        return out


def box(value: object) -> Callable[[Keeps, Tensor], object]:
    def put(block: Keeps, out: Tensor) -> None:
        block.box = value(out) if callable(value) else value

    return put


KEPT: dict[str, tuple[Callable[[Keeps, Tensor], object], Callable[[Keeps], Tensor]]] = {
    "attribute": (box(lambda out: out), lambda b: b.box),
    "list": (box(lambda out: [out]), lambda b: b.box[0]),
    "nested list": (box(lambda out: [[out]]), lambda b: b.box[0][0]),
    "dict": (box(lambda out: {"out": out}), lambda b: b.box["out"]),
    "ordered dict": (box(lambda out: OrderedDict(out=out)), lambda b: b.box["out"]),
    "namespace": (box(lambda out: SimpleNamespace(out=out)), lambda b: b.box.out),
    "deque": (box(lambda out: deque([out])), lambda b: b.box[0]),
    "a list outside": (lambda block, out: SEEN.append(out), lambda b: SEEN[-1]),
    "of the weights alone": (lambda block, out: setattr(block, "box", block.layer.weight.square()), lambda b: b.box),
}


def blocks_of(kind: Callable[[], nn.Module]) -> list[nn.Module]:
    torch.manual_seed(0)
    return [kind() for _ in range(STEPS)]


def run(blocks: list[nn.Module], method: str, x: Tensor) -> Tensor:
    field = Field(tuple(Branch(block) for block in blocks), tuple(range(STEPS)), 0.3)
    return solve(field, SCHEMES["euler"], Adjoint(method).plan(STEPS, "euler"), x, monitor=Monitor())


def state() -> Tensor:
    return torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", KEPT)
def test_a_loss_on_what_a_block_keeps_is_an_error(place: str, method: str) -> None:
    put, take = KEPT[place]
    blocks = blocks_of(lambda: Keeps(put))
    out = run(blocks, method, state())
    loss = out.sum() + take(blocks[1]).sum()
    with pytest.raises(ResodeError, match=r"block Keeps of step \d keeps a tensor while it runs.*'backprop'"):
        loss.backward()
    by_backprop = run(blocks, "backprop", state())
    (by_backprop.sum() + take(blocks[1]).sum()).backward()  # type: ignore[no-untyped-call]


def test_features_that_hooks_collect_are_kept_too() -> None:
    blocks, features = blocks_of(Block), []
    for block in blocks:
        block.layer.register_forward_hook(lambda module, args, out: features.append(out))
    out = run(blocks, "checkpoint", state())
    with pytest.raises(ResodeError, match="keeps a tensor while it runs"):
        (out.sum() + torch.stack(features).square().sum()).backward()


@pytest.mark.parametrize("put", [box(lambda out: out), box(lambda out: out.detach())], ids=["attached", "detached"])
def test_what_is_kept_and_no_loss_depends_on_is_let_be(put: Any) -> None:
    found = []
    for method in ("backprop", "checkpoint"):
        blocks, x = blocks_of(lambda: Keeps(put)), state()
        run(blocks, method, x).square().sum().backward()  # type: ignore[no-untyped-call]
        found.append([x.grad, *(p.grad for block in blocks for p in block.parameters())])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


class Conditioned(Block):
    """Reads a tensor that somebody gives it, as FiLM does."""

    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def by_condition(blocks: list[nn.Module], outside: nn.Linear) -> None:
    scale = outside(torch.ones(WIDTH, dtype=torch.float64))
    for block in blocks:
        block.scale = scale


def by_parameter(blocks: list[nn.Module], outside: nn.Linear) -> None:
    for block in blocks:
        object.__setattr__(block, "scale", outside.bias)


def by_hook(blocks: list[nn.Module], outside: nn.Linear) -> None:
    for block in blocks:
        block.scale = torch.ones((), dtype=torch.float64)
        block.layer.register_forward_hook(lambda module, args, out: out + outside(args[0]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("give", [by_condition, by_parameter, by_hook])
def test_a_trained_tensor_that_is_not_the_blocks_is_an_error(give: Any, method: str) -> None:
    blocks, outside = blocks_of(Conditioned), nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    give(blocks, outside)
    with pytest.raises(ResodeError, match="reads a trained tensor that is no parameter of its own.*'backprop'"):
        run(blocks, method, state())
    run(blocks, "backprop", state()).sum().backward()  # type: ignore[no-untyped-call]
    assert outside.bias.grad is not None
    outside.requires_grad_(False)
    give(blocks, outside)
    assert run(blocks, method, state()).requires_grad


@pytest.mark.parametrize("method", ["checkpoint", "pc"])
def test_hooks_on_parameters_see_their_gradient_once(method: str) -> None:
    found, calls = {}, []
    for hooked in (False, True):
        blocks, x = blocks_of(Block), state()
        if hooked:
            blocks[1].layer.weight.register_hook(lambda gradient: calls.append(1) or gradient * 0.5)
        run(blocks, method, x).square().sum().backward()  # type: ignore[no-untyped-call]
        found[hooked] = blocks[1].layer.weight.grad
    assert calls == [1]
    torch.testing.assert_close(found[True], found[False] * 0.5, rtol=1e-11, atol=0)


class Counts(Block):
    """Moves a buffer in place in every call, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.calls += 1
        self.mean.lerp_(out.detach().mean(0), 0.1)
        return out


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("adjoint", [Adjoint("checkpoint"), Adjoint("checkpoint", snapshots=2), Adjoint("pc")])
def test_buffers_move_once_in_eval_mode_too(adjoint: Adjoint, training: bool) -> None:
    found = []
    for chosen in (Adjoint("backprop"), adjoint):
        blocks = [block.train(training) for block in blocks_of(Counts)]
        field = Field(tuple(Branch(block) for block in blocks), tuple(range(STEPS)), 0.3)
        out = solve(field, SCHEMES["euler"], chosen.plan(STEPS, "euler"), state(), monitor=Monitor())
        out.sum().backward()  # type: ignore[no-untyped-call]
        found.append([b for block in blocks for b in block.buffers()])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


class Sees(Block):
    """Does something with its state that saves no tensor for a backward pass."""

    def __init__(self, see: Callable[[Sees, Tensor], object]) -> None:
        super().__init__()
        self.see = see
        self.kept = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.see(self, x)
        return super().forward(x)


SEES = {
    "the state": lambda block, x: setattr(block, "kept", x),
    "a mean": lambda block, x: setattr(block, "kept", x.mean()),
    "a shifted sum": lambda block, x: setattr(block, "kept", (x + block.layer.bias).sum()),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kept", SEES)
def test_what_is_kept_without_any_saved_activation_is_an_error_too(kept: str, method: str) -> None:
    blocks = blocks_of(lambda: Sees(SEES[kept]))
    out = run(blocks, method, state())
    with pytest.raises(ResodeError, match=r"block Sees of step \d keeps a tensor while it runs"):
        (out.sum() + blocks[2].kept.sum()).backward()


@pytest.mark.parametrize("method", METHODS)
def test_a_hook_on_the_gradient_of_the_state_is_an_error(method: str) -> None:
    blocks = blocks_of(lambda: Sees(lambda block, x: x.register_hook(lambda g: 2 * g)))
    with pytest.raises(ResodeError, match="block Sees of step 0 puts a hook on its state"):
        run(blocks, method, state())


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_of_another_block_of_the_stage_is_foreign(method: str) -> None:
    blocks = blocks_of(Block)
    first, second = blocks[:2]
    second.layer.register_forward_hook(lambda module, args, out: out * first.layer.bias)
    with pytest.raises(ResodeError, match="block Block of step 1 reads a trained tensor that is no"):
        run(blocks, method, state())


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_without_images_passes(method: str) -> None:
    x = torch.zeros(0, WIDTH, dtype=torch.float64, requires_grad=True)
    run(blocks := blocks_of(Block), method, x).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and x.grad.shape == x.shape
    assert all(not p.grad.any() for block in blocks for p in block.parameters() if p.grad is not None)
