"""A network that loops over its blocks may decide otherwise later: then it is told, and never given an old answer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_blocks import Block, images
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resode_cli
from resode_cli import Adjoint
from resode_cli.errors import ResodeError
from resode_cli.network.stage import OdeStage
from resode_cli.surgery.rewrite import deepen


class Step(Block):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.g(x)


Body = Callable[[Any, Any, Tensor], Tensor]


class Loops(nn.Module):
    """Runs its blocks as `body` has it, by `self.k`, which is 0 at first."""

    def __init__(self, body: Body, holds: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.k: Any = 0
        self.body = body
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = holds(Step() for _ in range(4))
        self.head = nn.Linear(4, 5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, self.blocks, self.stem(x)).mean((2, 3)))


def body(each: Callable[[Any, int, nn.Module, Tensor], Tensor]) -> Body:
    def run(net: Any, blocks: Any, x: Tensor) -> Tensor:
        for i, block in enumerate(blocks):
            x = each(net, i, block, x)
        return x

    return run


def fewer(net: Any, blocks: Any, x: Tensor) -> Tensor:
    for block in blocks[: len(blocks) - net.k]:
        x = block(x)
    return x


def turned(net: Any, blocks: Any, x: Tensor) -> Tensor:
    for block in reversed(blocks) if net.k else blocks:
        x = block(x)
    return x


def fused(net: Any, blocks: Any, x: Tensor) -> Tensor:
    states = []
    for block in blocks:
        x = block(x)
        states.append(x)
    return sum(states, torch.zeros(())) if net.k else x


def ends_by_size(net: Any, blocks: Any, x: Tensor) -> Tensor:
    for i, block in enumerate(blocks):
        if i == 2 and x.shape[-1] > 6:
            break
        x = block(x)
    return x


def ends_early(net: Any, blocks: Any, x: Tensor) -> Tensor:
    for i, block in enumerate(blocks):
        if i == 4 - net.k:
            break
        x = block(x)
    return x


def around(net: Any, blocks: Any, x: Tensor) -> Tensor:
    y = x
    for block in blocks:
        y = block(y)
    return y + x if net.k else y


def starts_later(net: Any, blocks: Any, x: Tensor) -> Tensor:
    for block in list(blocks)[net.k :]:
        x = block(x)
    return x


def in_place(net: Any, i: int, block: nn.Module, x: Tensor) -> Tensor:
    x = block(x)
    return x.mul_(0.5) if net.k else x


def hooked(net: Any, i: int, block: nn.Module, x: Tensor) -> Tensor:
    x = block(x)
    if net.k and i == 1 and x.requires_grad:
        x.register_hook(lambda gradient: gradient * 0.1)
    return x


def collected(net: Any, i: int, block: nn.Module, x: Tensor) -> Tensor:
    x = block(x)
    if net.k:
        net.kept = x.detach().cpu().numpy()
    return x


def frozen(net: Any, blocks: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return ends_early(net, blocks, x)


LIST, SEQUENCE = nn.ModuleList, lambda blocks: nn.Sequential(*blocks)
NEW = {
    "fewer": fewer,
    "turned round": turned,
    "all of them added": fused,
    "ended early": ends_early,
    "started later": starts_later,
    "one left out": body(lambda net, i, block, x: x if net.k and i == 1 else block(x)),
    "the first left out": body(lambda net, i, block, x: x if net.k and i == 0 else block(x)),
    "the last left out": body(lambda net, i, block, x: x if net.k and i == 3 else block(x)),
    "each scaled": body(lambda net, i, block, x: block(x) * 0.5 if net.k else block(x)),
    "each scaled in place": body(in_place),
    "each twice": body(lambda net, i, block, x: block(block(x)) if net.k else block(x)),
    "the first twice": body(lambda net, i, block, x: block(block(x)) if net.k and i == 0 else block(x)),
    "one twice": body(lambda net, i, block, x: block(block(x)) if net.k and i == 2 else block(x)),
    "detached": body(lambda net, i, block, x: block(x.detach() if net.k else x)),
    "with a hook on a state": body(hooked),
    "collected as numbers": body(collected),
    "frozen and ended early": frozen,
    "given more": body(lambda net, i, block, x: block(x, 0.5) if net.k and i else block(x)),
    "given more by name": body(lambda net, i, block, x: block(x, scale=0.5) if net.k and i == 3 else block(x)),
}


@pytest.mark.parametrize("holds", [LIST, SEQUENCE], ids=["list", "sequence"])
@pytest.mark.parametrize("name", NEW)
def test_a_loop_that_comes_to_do_something_else_is_an_error(name: str, holds: Callable[..., Any]) -> None:
    net = Loops(NEW[name], holds)
    try:
        model, _ = resode_cli.convert(copy.deepcopy(net), example=images())
    except ResodeError as error:  # a sequence that is sliced or asked for its length
        words = ("has no length", "cannot be indexed", "one after the other")
        assert holds is SEQUENCE and any(word in str(error) for word in words)
        return
    torch.testing.assert_close(model(images()), net(images()), rtol=1e-4, atol=1e-5)
    model.net.k = net.k = 1
    words = "stage blocks: here the network does not run its blocks one after the other"
    with pytest.raises(ResodeError, match=words if holds is LIST else f"{words}|has no length"):
        model(images())
    model.net.k = 0
    model(images())


@pytest.mark.parametrize("holds", [LIST, SEQUENCE], ids=["list", "sequence"])
def test_a_loop_that_ends_at_another_size_is_an_error_there(holds: Callable[..., Any]) -> None:
    model, _ = resode_cli.convert(Loops(ends_by_size, holds), example=images(5))
    model(images(6))
    with pytest.raises(ResodeError, match="does not run its blocks one after the other"):
        model(images(7))


def test_what_is_done_after_the_loop_is_the_networks_own() -> None:
    net = Loops(around, LIST)
    model, _ = resode_cli.convert(copy.deepcopy(net), example=images())
    for k in (0, 1):
        model.net.k = net.k = k
        torch.testing.assert_close(model(images()), net(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("holds", [LIST, SEQUENCE], ids=["list", "sequence"])
def test_a_loop_may_ask_its_blocks(holds: Callable[..., Any]) -> None:
    net = Loops(body(lambda net, i, block, x: block(x) if block.use or getattr(block, "again", False) else x), holds)
    for block in net.blocks:
        block.use = True
    model, _ = resode_cli.convert(copy.deepcopy(net), example=images())
    torch.testing.assert_close(model(images()), net(images()), rtol=1e-4, atol=1e-5)
    model.replace_stage("blocks", deepen(model.stages["blocks"], 8))
    model(images())
    model.stages["blocks"].get_submodule("2").use = False
    with pytest.raises(ResodeError, match="one after the other"):
        model(images())
    model.stages["blocks"].get_submodule("2").again = True
    model(images())


class Container(nn.Module):
    """A sequence of the user's own, with a setting."""

    def __init__(self, blocks: Any) -> None:
        super().__init__()
        self.gain = 1.0
        for i, block in enumerate(blocks):
            self.add_module(f"block{i}", block)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x)
        return x if self.gain == 1.0 else self.gain * x


def test_a_container_keeps_its_settings() -> None:
    net = Loops(lambda net, blocks, x: blocks(x), Container)
    model, _ = resode_cli.convert(copy.deepcopy(net), example=images())
    assert [stage.spec.depth for stage in model.stages.values()] == [4]
    for each in (net, model.net):
        each.blocks.gain = 3.0
    torch.testing.assert_close(model(images()), net(images()), rtol=1e-4, atol=1e-5)


ALIKE = {
    "numbered": body(lambda net, i, block, x: block(x) if i < 100 else x),
    "looked at": body(lambda net, i, block, x: block(x) if x.shape[1] == 4 and x.dim() else x),
    "checkpointed": body(lambda net, i, block, x: checkpoint(block, x, use_reentrant=False)),
    "checkpointed by re-entry": body(lambda net, i, block, x: checkpoint(block, x, use_reentrant=True)),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("holds", [LIST, SEQUENCE], ids=["list", "sequence"])
@pytest.mark.parametrize("name", ALIKE)
def test_loops_that_run_their_blocks_have_their_gradients(name: str, holds: Callable[..., Any]) -> None:
    net = Loops(ALIKE[name], holds)
    model, _ = resode_cli.convert(copy.deepcopy(net), example=images())
    model.use_adjoint(Adjoint("checkpoint"))
    for each in (net, model):
        each.train()(images()).square().sum().backward()
    found = {model.file_name(key): p.grad for key, p in model.net.named_parameters()}
    for key, parameter in net.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_stage_by_itself_and_the_sources_own_methods_get_states() -> None:
    model, _ = resode_cli.convert(Loops(NEW["fewer"], LIST), example=images())
    stage = model.stages["blocks"]
    seen: list[Tensor] = []
    with stage.register_forward_hook(lambda module, given, out: seen.append(out * 1)):
        model(images())
    state = model.net.stem(images())
    torch.testing.assert_close(stage(state), seen[0])
    torch.testing.assert_close(model.net(images()), model(images()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_the_model_can_still_be_copied_pickled_compiled_and_exported() -> None:
    model, _ = resode_cli.convert(Loops(NEW["one left out"], LIST), example=images())
    expected = model.eval()(images())
    torch.testing.assert_close(copy.deepcopy(model)(images()), expected)
    torch.testing.assert_close(torch.compile(model, backend="eager")(images()), expected, rtol=1e-4, atol=1e-5)
    model.net.body = None  # which no pickle can hold
    stage = pickle.loads(pickle.dumps(model.stages["blocks"]))
    assert isinstance(stage, OdeStage) and len(stage.emptied) == 3


def test_a_module_that_a_stage_would_not_run_is_refused() -> None:
    model, _ = resode_cli.convert(Loops(lambda net, blocks, x: blocks(x), SEQUENCE), example=images())
    model.stages["blocks"].add_module("extra", nn.ReLU())
    with pytest.raises(ResodeError, match="stage blocks was given extra, which is none of its blocks"):
        model(images())


def test_what_is_exported_is_told_too() -> None:
    model, _ = resode_cli.convert(Loops(NEW["ended early"], LIST), example=images())
    torch.export.export(model, (images(),), strict=False)
    model.net.k = 1
    with pytest.raises(ResodeError, match="does not run its blocks one after the other"):
        torch.export.export(model, (images(),), strict=False)
