"""Blocks that take more than the state: the same for all of them and for every image, as rotary embeddings are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import resode_cli
from resode_cli.errors import ResodeError
from resode_cli.ode import Adjoint
from resode_cli.sources.find_stages import find_stages
from resode_cli.surgery.rewrite import deepen

WIDTH = 6


class Rotated(nn.Module):
    """x + W(x · table), scaled; both come from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, table: Tensor | None = None, scale: float = 1.0) -> Tensor:
        g = self.linear(self.norm(x) if table is None else self.norm(x) * table)
        return x + scale * g.tanh()


class Tokens(nn.Module):
    """Images to tokens to 3 classes; the table has a row per token, so that it follows the image's size."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, WIDTH, 4, stride=4), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Rotated() for _ in range(4))
        self.register_buffer("frequencies", torch.linspace(0.1, 2.0, WIDTH))

    def table(self, tokens: Tensor, block: int) -> Tensor:
        return torch.cos(torch.arange(tokens.shape[1])[:, None] * self.frequencies)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        table = self.table(x, -1)
        for block in self.blocks:
            x = block(x, table, scale=0.5)
        return self.head(x.mean(1))


class OfTheImage(Tokens):
    def table(self, tokens: Tensor, block: int) -> Tensor:
        return (tokens > 0).to(tokens)


class Learned(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(self.frequencies)


class AnotherForEachHalf(Tokens):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for i, block in enumerate(self.blocks):
            x = block(x, self.table(x, 0) + i // 2)
        return self.head(x.mean(1))


def images(size: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def net() -> Tokens:
    torch.manual_seed(0)
    return Tokens().double()


def test_they_are_steps_and_the_file_says_what_they_take(net, tmp_path):
    untouched = copy.deepcopy(net)
    model, check = resode_cli.convert(net.float(), example=images().float())
    assert check.identical
    assert model.stages["blocks"].spec.further == ("table", "scale")
    model.replace_stage("blocks", deepen(model.stages["blocks"], 8))
    resode_cli.save(model, tmp_path / "own.safetensors")
    again = resode_cli.load(tmp_path / "own.safetensors", source=untouched.float())
    with torch.no_grad():
        assert torch.equal(again(images().float()), model(images().float()))


@pytest.mark.parametrize("method", ["checkpoint", "backprop"])
def test_a_backward_pass_uses_what_its_own_forward_pass_was_given(net, method):
    untouched = copy.deepcopy(net)
    model, _ = resode_cli.convert(net, example=images())
    model.use_adjoint(Adjoint(method))
    # Images of two sizes, so two tables, before any gradient is taken.
    for other in (model, untouched):
        losses = [other(images(size, seed)).square().sum() for size, seed in ((16, 1), (24, 2))]
        sum(losses).backward()
    expected = dict(untouched.named_parameters())
    for name, parameter in model.net.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[model.file_name(name)].grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [OfTheImage, Learned])
def test_what_is_learned_or_differs_between_images_is_not_bound(kind):
    with pytest.raises(
        ResodeError, match=r"blocks.0 \(Rotated\), like 3 more, takes more .* \(table, scale\), learned or"
    ):
        find_stages(kind().double(), images())


def test_a_chain_ends_where_another_is_given():
    found = find_stages(AnotherForEachHalf().double(), images())
    assert [(stage.blocks, stage.further) for stage in found.stages] == [
        (("0", "1"), ("table",)),
        (("2", "3"), ("table",)),
    ]


def test_a_stage_by_itself_runs_with_what_it_last_ran_with(net):
    model, _ = resode_cli.convert(net, example=images())
    stage, state = model.stages["blocks"], torch.randn(2, 16, WIDTH, dtype=torch.float64)
    expected = state
    for block in stage.blocks:
        expected = block(expected, model.net.table(state, -1), scale=0.5)
    torch.testing.assert_close(stage(state, **stage.further), expected)
    with pytest.raises(ResodeError, match="stage blocks takes table, scale beside the state, but was given nothing"):
        stage(state)
    with pytest.raises(ResodeError, match="but was given table"):
        stage(state, torch.ones(WIDTH, dtype=torch.float64))


def test_a_gradient_that_would_be_lost_is_refused(net):
    model, _ = resode_cli.convert(net, example=images())
    model.net.frequencies.requires_grad_()
    with pytest.raises(ResodeError, match="stage blocks: table, scale needs a gradient"):
        model(images())
    with torch.no_grad():
        model(images())


def test_a_stage_that_takes_the_state_alone_is_given_no_more():
    class Plain(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x).flatten(2).transpose(1, 2)
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    model, _ = resode_cli.convert(Plain().double(), example=images())
    with pytest.raises(ResodeError, match="takes nothing beside the state, but was given table"):
        model.stages["blocks"](torch.zeros(2, 16, WIDTH, dtype=torch.float64), torch.ones(WIDTH))
