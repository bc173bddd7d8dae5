"""Hooks on blocks and on what holds them, set before or after the conversion: they fire and count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resode_cli
from resode_cli.errors import ResodeError
from resode_cli.ode import Adjoint
from resode_cli.surgery.rewrite import deepen, untie

WIDTH = 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layer(x))


class Net(nn.Module):
    """Its blocks are a sequence, or, where `as_list`, a list that its own forward runs."""

    def __init__(self, as_list: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 3)
        blocks = [Block() for _ in range(3)]
        self.blocks = nn.ModuleList(blocks) if as_list else nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1))
        if isinstance(self.blocks, nn.ModuleList):
            for block in self.blocks:
                x = block(x)
        else:
            x = self.blocks(x)
        return self.head(x)


def grey() -> Tensor:
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def block_of(net: nn.Module, i: int) -> nn.Module:
    return net.blocks[i] if isinstance(net, Net) else net.stages["blocks"].blocks[i]


def taped(net: nn.Module) -> list[Tensor]:
    net.train().zero_grad()
    logits = net(grey())
    logits.square().sum().backward()
    return [logits.detach(), *sorted((p.grad for p in net.parameters()), key=lambda g: (g.numel(), float(g.sum())))]


def assert_alike(net: nn.Module, model: nn.Module) -> None:
    expected, found = taped(net), taped(model)
    assert torch.equal(found[0], expected[0])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def on_output(module: nn.Module, args: object, out: Tensor) -> Tensor:
    return out.tanh()


def on_input(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0].tanh(),)


def on_gradient(module: nn.Module, into: tuple[Tensor, ...], out: object) -> tuple[Tensor, ...]:
    return tuple(g / 3 for g in into)


def with_keywords(module: nn.Module, args: object, kwargs: object, out: Tensor) -> Tensor:
    return out.sin()


HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "forward": lambda m: m.register_forward_hook(on_output),
    "forward with keywords": lambda m: m.register_forward_hook(with_keywords, with_kwargs=True),
    "forward, always": lambda m: m.register_forward_hook(on_output, always_call=True),
    "pre-forward": lambda m: m.register_forward_pre_hook(on_input),
    "backward": lambda m: m.register_full_backward_hook(on_gradient),
    "pre-backward": lambda m: m.register_full_backward_pre_hook(lambda _, out: (3 * out[0],)),
}
each_hook = pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)


@pytest.mark.parametrize("method", ["backprop", "checkpoint"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("as_list", [True, False], ids=["list", "sequence"])
@each_hook
def test_a_hook_on_a_block_counts(hook, as_list, when, method):
    net, source = Net(as_list), Net(as_list)
    if when == "before":
        handles = [hook(block_of(each, 1)) for each in (net, source)]
    model, check = resode_cli.convert(source, example=grey())
    model.use_adjoint(Adjoint(method))
    assert check.identical
    if when == "after":
        assert_alike(net, model)
        handles = [hook(block_of(each, 1)) for each in (net, model)]
    assert_alike(net, model)
    for handle in handles:
        handle.remove()
    assert_alike(net, model)


@pytest.mark.parametrize("when", ["before", "after"])
@each_hook
def test_a_hook_on_a_sequence_counts_when_a_stage_takes_its_place(hook, when):
    net, source = Net(False), Net(False)
    if when == "before":
        handles = [hook(each.blocks) for each in (net, source)]
    model, _ = resode_cli.convert(source, example=grey())
    model.use_adjoint(Adjoint("checkpoint"))
    if when == "after":
        handles = [hook(each.blocks) for each in (net, model.net)]
    assert_alike(net, model)
    model.replace_stage("blocks", untie(model.stages["blocks"]))
    model.replace_stage("blocks", deepen(model.stages["blocks"], 3, depth_weights="free"))
    assert_alike(net, model)
    for handle in handles:
        handle.remove()
    assert_alike(net, model)


def test_a_list_keeps_the_hooks_of_the_module_that_runs_it():
    net, source = Net(True), Net(True)
    for each in (net, source):
        each.register_forward_hook(on_output)
    model, check = resode_cli.convert(source, example=grey())
    assert check.identical
    assert_alike(net, model)


def test_a_hook_on_all_modules_sees_the_blocks():
    model, _ = resode_cli.convert(Net(False), example=grey())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        model(grey())
    finally:
        handle.remove()
    assert seen.count(Block) == 3
    assert all(residual.activation == "relu" for residual in model.stages["blocks"].residuals())


def test_hooks_fire_at_every_evaluation_and_the_step_runs_its_branch_again_without_them():
    model, _ = resode_cli.convert(Net(False), example=grey())
    stage, seen = model.stages["blocks"], []
    handle = stage.blocks[0].register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    model.use_adjoint(Adjoint("checkpoint"))
    taped(model)
    assert seen == [True, True]  # both record: the forward pass to see what is read, without keeping it
    assert [residual.activation for residual in stage.residuals()] == ["generic", "relu", "relu"]
    handle.remove()
    assert [residual.activation for residual in stage.residuals()] == ["relu"] * 3


def test_a_block_with_hooks_is_refused_by_name_where_only_its_branch_runs():
    model, _ = resode_cli.convert(Net(False), example=grey(), form="pre")
    model(grey())
    handle = model.stages["blocks"].blocks[2].register_forward_hook(on_output)
    with pytest.raises(ResodeError, match=r"block blocks.2 has hooks, but in form 'pre'"):
        model(grey())
    handle.remove()
    model(grey())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_hooked_block_of_a_compiled_stage_runs_as_it_is():
    net, source = Net(False), Net(False)
    model, _ = resode_cli.convert(source, example=grey())
    model.compile_branches(backend="eager")
    assert_alike(net, model)
    for each in (net, model):
        block_of(each, 1).register_forward_hook(on_output)
    assert_alike(net, model)
    for each in (net, model):
        block_of(each, 1).register_forward_pre_hook(on_input)
    assert_alike(net, model)
